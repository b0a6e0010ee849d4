"""A run's blend: its evidence, weights fitted on valid after training, and metrics of the blend beside the model's.

Valid may have chosen the checkpoint as well; the report says so. Its figure on valid is cross-fitted over two halves,
and where the blend does not beat the model there, the model stays alone.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocme_dist.data.progress import Progress
from mocme_dist.errors import CheckpointError, ConfigError
from mocme_dist.evaluation.blended import BlendInputs, rank_blended
from mocme_dist.evaluation.metrics import breakdown, counted_metrics, direction_metrics, report
from mocme_dist.evaluation.ranking import Queries, Ranks, RowShard, Sizes, split_queries
from mocme_dist.evidence.blend import Blend, load_blend
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.fit import FitSettings, Wanted, collect, fit_weights, model_alone
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.spaces import Space, sources_of, vector_space
from mocme_dist.evidence.terms import FACTS, MODEL, Evidence
from mocme_dist.evidence.votes import Asked
from mocme_dist.kernels.counting import tiles
from mocme_dist.kernels.evidence import evidence_kernels
from mocme_dist.model.blocks import block_distances
from mocme_dist.model.rotate import rotate
from mocme_dist.training.evidence_plan import EvidencePlan, numeric_statistics
from mocme_dist.training.worker import Worker

log = logging.getLogger(__name__)

# Held-out queries of a relation and direction from which it has a check of its own.
ENOUGH = 30
HOW = (
    "Weights are fitted on all queries. The MRR is cross-fitted: each half of the triples is ranked with weights fitted"
    " on the other half. A direction, or a relation and direction with 30 queries or more, that these ranks do not"
    " improve keeps the model alone; this choice sees the same ranks."
)


def model_terms(modalities: tuple[str, ...], num_blocks: int) -> tuple[str, ...]:
    """Names of the model's terms: one of each block of its vectors."""
    return tuple(f"{MODEL}:{name}" for name in (*modalities, "fused")) if num_blocks > 1 else (MODEL,)


def _halves(count: int, seed: int) -> np.ndarray:
    """(count,) 0 or 1 at random; both queries of a triple are in one half."""
    return np.repeat(np.random.default_rng(seed).permutation((count + 1) // 2) % 2, 2)[:count]


def places_made_worse(
    model_Q: np.ndarray, rank_Q: np.ndarray, place_Q: np.ndarray, num_places: int, enough: int = ENOUGH
) -> np.ndarray:
    """(places,) where ranks of the blend have a lower MRR than those of the model, by direction and by place.

    Args:
        model_Q, rank_Q: ranks of the same queries by the model and by the blend.
        place_Q: 2 * relation + direction.
        enough: places with fewer queries follow their direction.
    """
    gain_P = np.bincount(place_Q, 1 / rank_Q - 1 / model_Q, num_places)
    worse_P = (gain_P < 0) & (np.bincount(place_Q, minlength=num_places) >= enough)
    for direction in (0, 1):
        if np.where(worse_P, 0, gain_P)[direction::2].sum() <= 0:
            worse_P[direction::2] = True
    return worse_P


class Blender:
    """A worker's vectors and evidence as its model is now; making one is collective.

    Raises:
        ConfigError: a space is asked for that is not there, or the vectors do not fit.
        DivergedError: a vector is not finite.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker, self.config, self.comm = worker, worker.config, worker.comm
        spaces = EvidencePlan(worker.config, worker.dataset, worker.comm.world_size).spaces
        if 4 * (worker.last - worker.first) * worker.model.blocks.total > worker.config.evaluation.vectors_mb << 20:
            raise ConfigError(
                "evidence.spaces: evidence needs all vectors of a rank in memory, which are more than"
                " evaluation.vectors_mb; raise it, use more workers, or set evidence.spaces=[]"
            )
        self.shard = worker.encode_rows()
        worker.check_finite(bool(torch.isfinite(self.shard.z_rD).all()))
        self.evidence = self._make_evidence(spaces)
        self.num_blocks = worker.model.blocks.num
        self.terms = (*model_terms(worker.modalities, self.num_blocks), *self.evidence.terms)
        self.places = 2 * worker.dataset.num_relations
        sections = (self.config.evidence, self.config.blend)
        self.settings = {key: value for section in sections for key, value in section.model_dump(mode="json").items()}
        self.settings["seed"] = self.config.train.seed

    def _make_evidence(self, names: tuple[str, ...]) -> Evidence:
        worker, settings, rows = self.worker, self.config.evidence, self.worker.last - self.worker.first
        betas, spaces = (settings.beta_coordinates, settings.beta), list[Space]()
        for name in worker.stores:
            found = sources_of(
                name, partial(worker.gather, name), rows, numeric_statistics(worker.dataset, name), self.comm, betas
            )
            spaces += [source.fill(0, rows, self.comm.device) for source in found if source.name in names]
        if MODEL in names:
            spaces.append(vector_space(MODEL, self.shard.z_rD, settings.beta))
        facts = Facts(worker.dataset.known("train"), worker.dataset.num_entities)
        on_cpu = worker.compiled and self.comm.device.type == "cpu"
        kernels = evidence_kernels(torch.get_num_threads()) if on_cpu else None
        limits = (settings.max_holders, settings.max_answers, kernels)
        shared = SharedFacts(facts, worker.first, worker.last, *limits) if FACTS in names else None
        sizes = (worker.first, rows, settings.neighbours, settings.beta)
        return Evidence(facts, spaces, shared, *sizes, self.comm, kernels)

    def blend(self, path: Path, step: int) -> Blend:
        """The blend in the file where it is of this checkpoint, else one fitted now; collective."""
        found: Blend | None = None
        if self.comm.rank == 0 and path.is_file():
            try:
                found = load_blend(path)
            except CheckpointError as error:
                log.warning("%s", error)
        found = self.comm.broadcast(found)
        if found is not None and found.fits(self.terms, self.places, step, self.settings):
            return found
        with Progress("fitting the blend", active=self.comm.rank == 0):
            return self.fit(step)

    def fit(self, step: int) -> Blend:
        """Fit both tables on valid and check them against the model there; collective, the same on every rank."""
        settings, dataset = self.config.blend, self.worker.dataset
        queries = split_queries(dataset.triples("valid"), settings.queries)
        asked, index_Q = Asked.distinct(queries.source, queries.relation, queries.direction)
        offsets, known = dataset.known("all").lookup(queries.source, queries.relation, queries.direction)
        with torch.no_grad():
            sample = collect(
                self.evidence,
                self.evidence.prepare(asked),
                Wanted(index_Q, queries.target, offsets, known),
                lambda at: self._model_values(queries, at),
                dataset.num_entities,
                self.config.train.seed,
            )
        half_Q = _halves(len(queries.source), self.config.train.seed)
        fitted: list[list[Tensor]] | None = None
        if self.comm.rank == 0:
            allowed_F = torch.tensor([name != "frequency" for name in self.terms])
            fit = FitSettings(**settings.model_dump(exclude={"frequency", "queries"}), seed=self.config.train.seed)
            both = [torch.ones_like(allowed_F), allowed_F] if settings.frequency else [allowed_F]
            samples = [sample, *(sample.take(torch.from_numpy(half_Q != half)) for half in (0, 1))]
            fitted = [[fit_weights(one, self.places, self.num_blocks, some, fit) for some in both] for one in samples]
        tables, *crossed = [[table.clone() for table in tables] for tables in self.comm.broadcast(fitted) or []]
        return self._checked(queries, half_Q, tables, crossed, step)

    def _checked(
        self, queries: Queries, half_Q: np.ndarray, tables: list[Tensor], crossed: list[list[Tensor]], step: int
    ) -> Blend:
        """The tables, with the model alone wherever weights of the other half do not beat it; collective.

        Args:
            queries: held out, each in one of two halves.
            tables: weights fitted on all queries, with and without frequency.
            crossed: for each half, weights fitted on the other half.
        """
        alone = model_alone(self.places, len(self.terms), self.num_blocks)
        rank_TQ = np.zeros((1 + len(tables), len(half_Q)))
        for half, weights in enumerate(crossed):
            at = np.flatnonzero(half_Q == half)
            if len(at) == 0:
                continue
            rank_TQ[:, at] = [found.filtered for found in self._rank(queries.take(at), [alone, *weights])]
        kept = list[int]()
        for table, rank_Q in zip(tables, rank_TQ[1:], strict=True):
            worse_P = places_made_worse(rank_TQ[0], rank_Q, 2 * queries.relation + queries.direction, self.places)
            table[torch.from_numpy(worse_P)] = alone[torch.from_numpy(worse_P)]
            at = worse_P[2 * queries.relation + queries.direction]
            rank_Q[at] = rank_TQ[0, at]
            kept.append(int(worse_P.sum()))
        mrr = [float((1 / rank_Q).mean()) for rank_Q in (rank_TQ[0], rank_TQ[1], rank_TQ[-1])]
        fitted = {
            "split": "valid",
            "queries": len(half_Q),
            "selected_checkpoint": True,
            "how": HOW,
            "model_alone_places": kept[0],
            **dict(zip(("model_mrr", "mrr", "without_frequency_mrr"), mrr, strict=True)),
        }
        return Blend(self.terms, tables[0].numpy(), tables[-1].numpy(), step, self.settings, fitted)

    def _model_values(self, queries: Queries, at_q: np.ndarray) -> Tensor:
        """(blocks, q, r) minus the distances, by block, of some queries to this rank's entities; collective."""
        source_qD = self.comm.sum(self.shard.pick(queries.source[at_q]))
        sign_q = torch.from_numpy(1.0 - 2.0 * queries.direction[at_q]).to(source_qD.device, torch.float32)
        relation = torch.from_numpy(queries.relation[at_q]).to(source_qD.device)
        query_qD = rotate(source_qD, self.worker.model.relations(relation), sign_q)
        known_q1 = source_qD.any(1)[:, None]  # the model says nothing of a source without a vector
        found = [torch.zeros(self.num_blocks, len(at_q), 0, device=source_qD.device)]
        for _, count, tile_TD in tiles(self.shard.z_rD, self.config.evaluation.tile_rows):
            distance_Pqt = block_distances(query_qD, tile_TD, self.num_blocks, self.worker.compiled)[:, :, :count]
            found.append(torch.where(known_q1, -distance_Pqt, 0.0))
        return torch.cat(found, 2)

    def _rank(self, queries: Queries, tables: list[Tensor], progress: Progress | None = None) -> list[Ranks]:
        """Ranks under each table of weights; collective."""
        settings = self.config.evaluation
        inputs = BlendInputs(
            self.worker.model.relations,
            RowShard(self.shard.z_rD, self.shard.first),
            self.worker.dataset.known("all"),
            self.evidence,
            tables,
            Sizes(settings.query_block, settings.tile_rows, self.worker.compiled),
        )
        self.worker.model.eval()
        ranks = rank_blended(
            queries, inputs, self.comm, None if progress is None else lambda done, _: progress.raise_to(done)
        )
        self.worker.model.train()
        return ranks

    def rank(self, split: str, blend: Blend) -> tuple[Queries, list[Ranks]]:
        """Queries of a split, and their ranks by the model, by the blend, and by the blend without frequency.

        Collective.
        """
        queries = split_queries(self.worker.dataset.triples(split))
        alone = model_alone(self.places, len(self.terms), self.num_blocks)
        tables = [torch.from_numpy(table) for table in (blend.weight_PF, blend.without_frequency_PF)]
        tables = [alone, *tables[: 2 if self.config.blend.frequency else 1]]
        with Progress(f"evaluate {split}", len(queries.source), "queries", active=self.comm.rank == 0) as progress:
            return queries, self._rank(queries, tables, progress)


def evaluate(
    worker: Worker, blend_file: Path, split: str, step: int, drop: dict[str, float] | None = None
) -> tuple[dict[str, Any], Blend | None]:
    """Metrics of a split by the run's blend if it has evidence, else by the model, and that blend; collective.

    Train is ranked by the model alone, because evidence is made of its facts.

    Args:
        blend_file: of the run; it need not exist.
        drop: modalities to hide, each with a share of the entities. The blend keeps the weights fitted without it.

    Raises:
        ConfigError: the run does not have a modality that is to be hidden.
    """
    blender, blend = None, None
    if split != "train" and EvidencePlan(worker.config, worker.dataset, worker.comm.world_size).spaces:
        blender = Blender(worker)
        blend = blender.blend(blend_file, step)
    if drop:
        worker.hide(drop)
        blender = None if blender is None else Blender(worker)
    extra: dict[str, Any] = {}
    if blender is None or blend is None:
        queries, ranks = worker.rank(split)
    else:
        queries, (model, ranks, *without) = blender.rank(split, blend)
        extra = {"model": direction_metrics(model.filtered, queries.direction)}
        if without:
            extra["without_frequency"] = direction_metrics(without[0].filtered, queries.direction)
        extra["blend"] = {"terms": list(blend.terms), **blend.fitted}
    if drop:
        extra["drop"] = _drop_report(worker, queries, ranks, drop)
    extra = {**_breakdown(worker, queries, ranks), **extra}
    return report(split, ranks.filtered, queries.direction, worker.seen(queries), **extra), blend


def _breakdown(worker: Worker, queries: Queries, ranks: Ranks) -> dict[str, Any]:
    """`metrics.breakdown`, computed by rank 0 for all; collective."""
    found: dict[str, Any] = {}
    if worker.comm.rank == 0:
        facts = Facts(worker.dataset.known("train"), worker.dataset.num_entities)
        names, labels = worker.dataset.relation_names(), worker.dataset.relation_labels()
        found = breakdown(queries, ranks, facts, worker.dataset.known("all"), names)
        for name, label in zip(names, labels, strict=True):
            if label != name and name in found["by_relation"]:
                found["by_relation"][name]["label"] = label
    return worker.comm.broadcast(found)


def _drop_report(worker: Worker, queries: Queries, ranks: Ranks, drop: dict[str, float]) -> dict[str, Any]:
    """Return the shares that were hidden, and figures of queries whose source or target lost a modality; collective."""
    source_Q, target_Q = worker.lost(np.concatenate([queries.source, queries.target])).reshape(2, -1)
    everyone = np.arange(worker.dataset.num_entities)
    groups = {"source": source_Q, "target": target_Q}
    return {
        "shares": drop,
        "seed": worker.config.train.seed,
        "entities": int(worker.lost(everyone).sum()),
        "affected": {name: counted_metrics(ranks.filtered[at]) for name, at in groups.items()},
        "unaffected": counted_metrics(ranks.filtered[~(source_Q | target_Q)]),
    }
