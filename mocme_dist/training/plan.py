"""Plan of a run before it starts: bytes per rank, bytes on the wire, steps; refuses runs that cannot fit.

Sizes come from the packed data set, dense parameters are counted on a model without storage, and requests on the first
batches, which are a function of (seed, step). Memory for the whole run is exact; temporary memory of a step, a ranking
or a checkpoint is counted by the tensors at its peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import QuerySampler
from mocme_dist.config import Config
from mocme_dist.config.schema import FeaturesConfig, LaunchConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import features_manifest
from mocme_dist.errors import ConfigError
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.optim import choose_optimizer, state_widths
from mocme_dist.partition import RowPartition
from mocme_dist.prefetch import DEPTH
from mocme_dist.training.build import (
    block_rows,
    feature_modalities,
    looks_up_ahead,
    model_blocks,
    model_settings,
    resolve_modalities,
)
from mocme_dist.training.dense_plan import copied_bytes, dense_bytes
from mocme_dist.training.evidence_plan import EvidencePlan

# Resident memory of a rank without data, measured on Linux with torch 2.13's CPU build: the interpreter with
# torch, numpy and TensorBoard; what DeepSpeed, torch.compile (100 MiB with a warm cache, 280 without) and a Ray worker
# add. A CUDA context adds more.
PROCESS_BYTES = 375 << 20
DEEPSPEED_BYTES, COMPILER_BYTES, RAY_BYTES = 75 << 20, 190 << 20, 110 << 20
# Width of features that are not extracted yet.
ASSUMED_WIDTH = 1024
# Number of batches whose requests are counted; a few are enough, because they hardly differ between steps.
_COUNTED_STEPS = 3


class Node(NamedTuple):
    """A machine: the number of ranks it can run, and its memory in bytes."""

    name: str
    ranks: int
    memory: int


@dataclass(frozen=True)
class Requests:
    """Vectors that a step needs, the maximum over ranks and the first steps.

    Attributes:
        wanted: U, of a rank. asked: V, unique rows that an owner encodes; both of a micro-batch.
        sent: vectors that leave a rank in a step.
    """

    wanted: int
    asked: int
    sent: int


@dataclass(frozen=True)
class Plan:
    """Bytes and steps of a run; bytes are those of the rank that needs most.

    Attributes:
        resident: memory for the whole run, by kind.
        passing: temporary memory, by phase; phases follow each other, so the largest counts.
        wire: bytes that a rank sends in a step, by kind.
        notes: assumptions and warnings.
        evidence_s: estimated seconds to find the evidence of valid and test; 0 without evidence.
    """

    world_size: int
    rows_per_rank: int
    dense_parameters: int
    steps_per_epoch: int
    requests: Requests
    resident: dict[str, int]
    passing: dict[str, int]
    wire: dict[str, int]
    mapped: int
    notes: tuple[str, ...] = field(default=())
    evidence_s: float = 0.0

    @property
    def peak(self) -> int:
        """Return the largest resident memory of a rank."""
        return sum(self.resident.values()) + max(self.passing.values())

    def summary(self) -> str:
        """Return the peak and its largest kinds in one line."""
        kinds = sorted({**self.resident, **self.passing}.items(), key=lambda kind: -kind[1])
        largest = ", ".join(f"{name} {_size(size)}" for name, size in kinds[:4])
        return f"{self.world_size} rank(s) need {_size(self.peak)} each ({largest})"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**asdict(self), "notes": list(self.notes), "peak": self.peak}

    def lines(self) -> Iterator[str]:
        """Yield the lines of a table."""
        yield f"{self.world_size} rank(s) of {self.rows_per_rank:,} rows; {self.dense_parameters:,} dense parameters"
        r = self.requests
        needs = f"requests {r.wanted:,} vectors, encodes {r.asked:,}, sends {r.sent:,}"
        yield f"{self.steps_per_epoch:,} steps per epoch; in each a rank {needs}"
        yield "memory of a rank:"
        for name, size in self.resident.items():
            yield f"  {name:<34}{_size(size):>12}"
        for name, size in self.passing.items():
            yield f"  {name:<34}{_size(size):>12}  for a while"
        yield f"  {'peak':<34}{_size(self.peak):>12}"
        shared = "shared by the ranks of a machine; leaves when memory is short"
        yield f"  {'graph, mapped from disk':<34}{_size(self.mapped):>12}  {shared}"
        yield "sent by a rank in a step:"
        for name, size in self.wire.items():
            yield f"  {name:<34}{_size(size):>12}"
        if self.evidence_s:
            yield f"evidence of neighbours: about {self.evidence_s:,.1f} s to find for valid and test"
        yield from (f"note: {note}" for note in self.notes)


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Planner:
    """Counts what a run needs, from its configuration and packed data set; starts nothing.

    Attributes:
        dataset: missing features are counted with an assumed width.
        world_size: number of ranks.
    """

    config: Config
    dataset: Dataset
    world_size: int

    @property
    def partition(self) -> RowPartition:
        """Return the ranges of entities of the ranks."""
        return RowPartition(self.dataset.num_entities, self.world_size)

    @property
    def rows(self) -> int:
        """Return the rows of the first rank, which has the most."""
        first, last = self.partition.bounds(0)
        return last - first

    @property
    def sampler(self) -> QuerySampler:
        """Return the sampler of the run's queries."""
        train = self.config.train
        return QuerySampler(len(self.dataset.triples("train")), train.batch_size, train.seed)

    def plan(self, under_ray: bool) -> Plan:
        """Return the plan of the run.

        Args:
            under_ray: whether ranks are Ray workers.
        """
        config, dataset, world_size = self.config, self.dataset, self.world_size
        notes: list[str] = []
        features, widths = self._features(notes)
        with torch.device("meta"):
            model = MoCME(widths, dataset.num_relations, model_settings(config, len(widths)))
        dense = sum(p.numel() for p in model.parameters())
        requests = self.count_requests()
        evidence = EvidencePlan(config, dataset, world_size)
        resident = {
            "process": PROCESS_BYTES + self._process_extras(under_ray),
            **self._row_bytes(model.blocks.width),
            **{f"features: {name}": size for name, size in features.items()},
            **dense_bytes(config.deepspeed, dense, world_size),
            "batches: places of the pool": 4 * dataset.num_entities,
            "batches: features made ahead": self._ahead_bytes(widths, requests),
        }
        passing = {
            "a step": self._step_bytes(model, requests) + copied_bytes(config.deepspeed, model, world_size),
            "a ranking": self._ranking_bytes(model) + evidence.num_bytes,
            "a checkpoint": 12 * dense,
        }
        in_engine = model.blocks.width * dataset.num_entities if config.entities.sharding == "zero" else 0
        return Plan(
            world_size=world_size,
            rows_per_rank=self.rows,
            dense_parameters=dense,
            steps_per_epoch=self.sampler.steps_per_epoch,
            requests=requests,
            resident=resident,
            passing=passing,
            wire=wire_bytes(requests, model.blocks.total, dense + in_engine, world_size),
            mapped=24 * len(dataset.triples("train")) + sum(dataset.known(name).num_bytes for name in ("train", "all")),
            notes=(*notes, *self._idle_ranks(), *evidence.notes()),
            evidence_s=evidence.seconds if evidence.spaces else 0.0,
        )

    def _idle_ranks(self) -> list[str]:
        """Return a note if a batch has too few chunks for every rank to get one."""
        config, world_size = self.config, self.world_size
        num_micro, chunk = config.deepspeed.gradient_accumulation_steps, config.negatives.chunk_size
        chunks, needed = config.train.batch_size // chunk, world_size * num_micro
        if chunks >= needed:
            return []
        cut = f" in {num_micro} micro-batches each" if num_micro > 1 else ""
        return [
            f"a batch has {chunks} chunk(s) of {chunk} queries for {world_size} ranks{cut}: some have none to score; "
            "set train.batch_size "
            f"to {needed * chunk:,} or a smaller negatives.chunk_size"
        ]

    def _row_bytes(self, D: int) -> dict[str, int]:
        """Return bytes of the table of width D, of its optimizer, and of the engine's copies if it holds the table."""
        config, dataset = self.config, self.dataset
        if config.entities.sharding == "zero":
            holders = self.world_size if config.deepspeed.stage >= 1 else 1
            whole = 4 * dataset.num_entities * D
            # Flat copies, masters, buckets and temporaries of DeepSpeed's step: counted as measured, thirteen tables in
            # all.
            copies = 9 * whole if config.deepspeed.engine != "torch" else 2 * whole
            return {
                "rows": whole,
                "rows: gradients": whole,
                "rows: engine's copies": copies,
                "rows: optimizer": 2 * whole // holders,
            }
        optimizer = choose_optimizer(config.entities.optimizer, dataset.num_entities)
        # Pages of the state are allocated as rows are first touched: a short run needs less.
        state = 4 * self.rows * sum(state_widths(optimizer, D).values())
        return {"rows": {"float32": 4, "bfloat16": 2}[config.entities.dtype] * self.rows * D, "rows: optimizer": state}

    def _process_extras(self, under_ray: bool) -> int:
        deepspeed = DEEPSPEED_BYTES if self.config.deepspeed.engine != "torch" else 0
        return deepspeed + (COMPILER_BYTES if self.config.compile != "off" else 0) + (RAY_BYTES if under_ray else 0)

    def _features(self, notes: list[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the bytes per rank of each modality's features, and the widths of the fused ones."""
        config, dataset = self.config, self.dataset
        sizes, widths = {}, {}
        modalities = resolve_modalities(config.modalities, dataset)
        if "structure" in modalities:
            widths["structure"] = model_blocks(config.fusion, config.experts, modalities).width
        for name in feature_modalities(config.modalities, config.evidence.spaces, dataset):
            dataset.bring_features(name, 0, 0)
            features = features_manifest(dataset.directory, name)
            if features is not None:
                width, share = features.width, features.present / max(dataset.num_entities, 1)
                number_bytes = 2 if features.dtype == "float16" else 4
            else:
                width, share = ASSUMED_WIDTH, dataset.modalities[name]["entities"] / max(dataset.num_entities, 1)
                number_bytes = 4
                notes.append(f"features of {name} are not extracted yet: counted with {width} numbers per entity")
            values = 0 if config.features.residency == "mmap" else int(self.rows * share) * width * number_bytes
            # Presence, and the position of each row's values.
            sizes[name] = values + 9 * self.rows
            if name in modalities:
                widths[name] = width
        return sizes, widths

    def count_requests(self) -> Requests:
        """Return the requests between ranks, counted on the batches of the first steps."""
        config, dataset, partition, sampler = self.config, self.dataset, self.partition, self.sampler
        negatives = config.num_negatives
        W, wanted, asked, sent = self.world_size, 0, 0, 0
        if negatives == 0:  # every rank needs every vector
            return Requests(dataset.num_entities, self.rows, (W - 1) * self.rows)
        known, triples_T3 = dataset.known("train"), dataset.triples("train")
        num_micro, chunk = config.deepspeed.gradient_accumulation_steps, config.negatives.chunk_size
        makers = [
            BatchMaker(triples_T3, known, partition.num_rows, sampler, chunk, negatives, rank, W, num_micro)
            for rank in range(W)
        ]
        for step in range(min(_COUNTED_STEPS, sampler.steps_per_epoch)):
            sent_W = np.zeros(W, dtype=np.int64)
            for number in range(num_micro):
                ids = [maker.make(step, number).ids_U for maker in makers]
                cuts = [np.searchsorted(ids_U, partition.starts()) for ids_U in ids]
                counts_WW = np.stack([np.diff(cut) for cut in cuts])
                wanted = max(wanted, max(map(len, ids)))
                sent_W += counts_WW.sum(0) - counts_WW.diagonal()
                for owner in range(W):
                    pieces = [ids_U[cut[owner] : cut[owner + 1]] for ids_U, cut in zip(ids, cuts, strict=True)]
                    asked = max(asked, len(np.unique(np.concatenate(pieces))))
            sent = max(sent, int(sent_W.max()))
        return Requests(wanted, asked, sent)

    def _ahead_bytes(self, widths: dict[str, int], requests: Requests) -> int:
        """Return the bytes of features in prefetched batches, which exist during rankings and checkpoints, too."""
        if not looks_up_ahead(self.config.features, self.config.deepspeed, self.config.launch.gpus > 0):
            return 0
        return (DEPTH + 1) * requests.asked * 4 * sum(width for name, width in widths.items() if name != "structure")

    def _step_bytes(self, model: MoCME, requests: Requests) -> int:
        """Return the bytes of activations, exchanged vectors, loss and update in one step."""
        config = self.config
        D, n, blocks = model.blocks.total, config.negatives, model.blocks.num
        one_vs_all = config.train.loss == "one_vs_all"
        chunks = -(
            -(config.train.batch_size // n.chunk_size)
            // (self.world_size * config.deepspeed.gradient_accumulation_steps)
        )
        queries, candidates = chunks * n.chunk_size, requests.wanted if one_vs_all else n.count
        pools = candidates if one_vs_all else chunks * n.count
        vectors = requests.asked * D * 5 + (requests.wanted + requests.sent) * D * 2
        loss = queries * D * 8 + pools * D * 3 + queries * candidates * 7 * blocks
        if config.compile == "off":  # the plain form stores the differences to all candidates and their squares
            loss += queries * candidates * D * 13 // 2
        return 4 * (requests.asked * _numbers_per_entity(model, True) + vectors + loss)

    def _ranking_bytes(self, model: MoCME) -> int:
        """Return the bytes of fused vectors or a piece of them, of queries, of an encoded block, and a scored tile."""
        config, dataset = self.config, self.dataset
        D, evaluation = model.blocks.total, config.evaluation
        held = min(4 * self.rows * D, evaluation.vectors_mb << 20)
        queries = min(2 * max(len(dataset.triples(split)) for split in ("valid", "test")), 1 << 16)  # of one pass
        block = block_rows(evaluation, dataset.num_entities) * _numbers_per_entity(model, False)
        # The plain form stores (16, tile, D); the kernels store no distances.
        tile = 3 * evaluation.query_block * evaluation.tile_rows + (
            3 * 16 * evaluation.tile_rows * D if config.compile == "off" else 0
        )
        return held + 4 * (4 * queries * D + block + tile)


def exchange_bytes(sent: int, width: int) -> int:
    """Return the bytes of `sent` fused vectors, which are float32 for any type of the engine."""
    return 4 * sent * width


def wire_bytes(requests: Requests, width: int, dense: int, world_size: int) -> dict[str, int]:
    """Return the bytes that a rank sends in one step, by kind."""
    if world_size == 1:
        return {"fused vectors": 0, "their gradients": 0, "ids, a step ahead": 0, "dense gradients": 0}
    vectors = exchange_bytes(requests.sent, width)
    # Gradients of sent vectors return; a request is 8 bytes per id. A ring sends each dense gradient about twice.
    ids, ring = 8 * requests.sent, 2 * 4 * dense * (world_size - 1) // world_size
    return {"fused vectors": vectors, "their gradients": vectors, "ids, a step ahead": ids, "dense gradients": ring}


def _numbers_per_entity(model: MoCME, training: bool) -> int:
    """Return the count of numbers in memory at the peak of encoding one entity, backward pass included when
    training."""
    M, K, D = len(model.modalities), model.settings.num_experts, model.blocks.width
    S, hidden = M * K, model.settings.projection_hidden or model.settings.width
    mlp = [name for name in model.modalities if name != "structure" or model.settings.structure == "mlp"]
    raw = sum(buffer.numel() for name, buffer in model.projections.named_buffers() if name.endswith("mean_F"))
    if not training:
        return 2 * raw + len(mlp) * hidden + 3 * M * D + 3 * S * D
    estimated = model.settings.fusion.estimator == "mine"
    pairs = (M * K * (K - 1) + M * (M - 1)) // 2 if estimated else 0
    views = S + M if pairs else 0
    # With `bounded`, the half of the rows that gives the estimates has no backward pass.
    kept = 6 if model.settings.fusion.bounded else 12
    mine = views * (2 * D + 4 * model.settings.fusion.hidden) + kept * pairs * model.settings.fusion.hidden
    return 3 * raw + 3 * len(mlp) * hidden + 6 * M * D + 6 * S * D + mine + 4 * D


def check_plan(plan: Plan, launch: LaunchConfig, features: FeaturesConfig, nodes: Sequence[Node]) -> None:
    """Refuse a run that does not fit on the machines.

    Raises:
        ConfigError: it does not fit; with the numbers, and what to change.
    """
    # With GPUs, step and ranking use their memory, which is unknown here; torch raises an error if it is full. Rows and
    # their state pass through the host when they are saved.
    on_device = launch.gpus > 0
    needed = (
        sum(size for kind, size in plan.resident.items() if not kind.startswith("dense")) if on_device else plan.peak
    )
    room = sum(min(node.ranks, node.memory // needed) for node in nodes)
    if room >= plan.world_size:
        return
    shown = ", ".join(f"{node.name}: {_size(node.memory)} for {node.ranks}" for node in nodes[:4]) + (
        ", ..." if len(nodes) > 4 else ""
    )
    remedies = "; ".join(_remedies(plan, mapped=features.residency == "mmap"))
    raise ConfigError(f"plan: {plan.summary()}, but only {room} fit ({shown}); {remedies}")


def _remedies(plan: Plan, mapped: bool) -> list[str]:
    """Return what to change, the largest saving first; `mapped` says that features take no memory."""
    saved: dict[str, int] = {"more workers or nodes (launch.workers)": plan.resident["rows"]}
    if plan.resident["rows: optimizer"] > plan.resident["rows"]:
        saved["entities.optimizer=adagrad"] = plan.resident["rows: optimizer"]
    features = sum(size for name, size in plan.resident.items() if name.startswith("features: "))
    if features and not mapped:
        saved["features.residency=mmap"] = features
    saved["a smaller experts.width"] = plan.resident["rows"] // 2
    transient = max(plan.passing, key=plan.passing.__getitem__)
    saved["a smaller train.batch_size" if transient == "a step" else "a smaller evaluation.vectors_mb"] = (
        plan.passing[transient] // 2
    )
    return [f"{name} saves up to {_size(size)}" for name, size in sorted(saved.items(), key=lambda item: -item[1])[:3]]
