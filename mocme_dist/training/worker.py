"""One rank's parts of a run, put together: data set, features, table, model, engine; and what is done with them.

Training and evaluation use the same worker, so that what is evaluated is what was trained.
"""

from __future__ import annotations

import importlib.util
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import QuerySampler, key64, mix64
from mocme_dist.cluster import return_pages
from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import ConfigError, DataError, DivergedError, MocmeError
from mocme_dist.evaluation.metrics import report
from mocme_dist.evaluation.protocol import split_queries
from mocme_dist.evaluation.ranking import RowShard, rank_queries
from mocme_dist.model import native
from mocme_dist.model.entropy import Weighting
from mocme_dist.model.fusion import FusionSettings
from mocme_dist.model.loss import LossSettings
from mocme_dist.model.mocme import MoCME, ModelSettings
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import plan_route
from mocme_dist.parallel.optim import choose_optimizer
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.training.ahead import Courier, Prepared
from mocme_dist.training.encode import EntityEncoder
from mocme_dist.training.engine import make_engine
from mocme_dist.training.engine_rows import EngineRows, row_parameter
from mocme_dist.training.identity import run_identity
from mocme_dist.training.log import Progress
from mocme_dist.training.profiler import PhaseTimer
from mocme_dist.training.row_update import row_update
from mocme_dist.training.step import EntityInput, Part, StepModule

log = logging.getLogger(__name__)


def resolve_modalities(config: Config, dataset: Dataset) -> tuple[str, ...]:
    """The modalities to fuse, structure first; "auto" takes all that the data set has.

    Raises:
        DataError: one is asked for that the data set does not have.
    """
    has = ("structure", *dataset.modalities)
    wanted = has if config.modalities == "auto" else config.modalities
    if missing := [name for name in wanted if name not in has]:
        raise DataError(
            f"{dataset.directory}: no {', '.join(missing)} in this data set; it has {', '.join(has)}; set `modalities` to those or auto"
        )
    return tuple(wanted)


def use_compiler(choice: str, device: torch.device) -> bool:
    """Whether to compile the hot path: auto where all that it takes is found.

    Raises:
        ConfigError: `on` where something is missing.
    """
    if choice == "off":
        return False
    lacks = compiler_lacks(device)
    if lacks and choice == "on":
        raise ConfigError(f"compile: on, but {lacks} found on this machine; install it or set compile=off")
    if lacks:
        log.warning("%s found: the loss runs in its plain form, some fifty times slower", lacks)
    return lacks is None


def compiler_lacks(device: torch.device) -> str | None:
    """What torch.compile would miss here, as the start of a sentence; it would fail at the first step."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no triton is"
    if native.compiler() is None:
        return "no C++ compiler is"
    # Debian and Ubuntu have them in a package of their own.
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "no Python.h (headers of Python; python3-dev) is"
    return None


class Worker:
    """One rank: its rows, features and engine, ready to step and to rank."""

    def __init__(self, config: Config, dataset: Dataset, comm: Comm) -> None:
        self.config, self.dataset, self.comm = config, dataset, comm
        self.timer = PhaseTimer()
        self.modalities = resolve_modalities(config, dataset)
        self.partition = RowPartition(dataset.num_entities, comm.world_size)
        self.first, self.last = self.partition.bounds(comm.rank)
        self.stores = self._open_stores()
        self.courier = Courier(comm.device)
        self.ahead = features_ahead(config, comm.device.type == "cuda")
        self.compiled = use_compiler(config.compile, comm.device)
        if config.train.cuda_graphs and not (self.compiled and comm.device.type == "cuda"):
            raise ConfigError(
                f"train.cuda_graphs: needs a GPU and compile=on; here are {comm.device.type} and compile={config.compile}; set it to false"
            )
        raw_widths = {name: config.experts.width if name == "structure" else self.stores[name].width for name in self.modalities}
        # ZeRO-3 fetches parameters in hooks of the modules, which a graph cannot hold. On a CPU, encoding is matrix
        # products and little else: the graph took as long as eager code and tens of seconds to compile (RESULTS.md).
        graph = self.compiled and config.deepspeed.stage < 3 and comm.device.type == "cuda"
        settings = model_settings(config)._replace(compiled=graph, kernels=self.compiled and config.deepspeed.stage < 3)
        self.model = MoCME(raw_widths, dataset.num_relations, settings, config.train.seed).to(comm.device)
        self._set_statistics()
        self.table = self._make_engine()
        sampler = QuerySampler(len(dataset.triples("train")), config.train.batch_size, config.train.seed)
        self.maker = BatchMaker(
            dataset.triples("train"),
            dataset.known("train"),
            dataset.num_entities,
            sampler,
            config.negatives.chunk_size,
            0 if config.train.loss == "one_vs_all" else config.negatives.count,
            comm.rank,
            comm.world_size,
            config.deepspeed.gradient_accumulation_steps,
        )

    def _make_engine(self) -> EntityTable | EngineRows:
        """The engine of the dense part; the table, beside it or inside it."""
        c, comm = self.config, self.comm
        start = (c.experts.width, c.entities.init_range, c.train.seed)
        in_engine = c.entities.sharding == "zero"
        rows = row_parameter(self.partition, *start, comm.device) if in_engine else None
        module = StepModule(self.model, _loss_settings(c, self.compiled), comm, self.timer, rows)
        self.engine = make_engine(
            module, _groups(c, module), c.train.gradient_clipping, c.deepspeed, comm, "rows.weight" if in_engine else None
        )
        if rows is not None:
            return EngineRows(self.engine, rows, self.partition, comm.rank)
        return EntityTable(
            self.partition,
            comm.rank,
            c.experts.width,
            optimizer=choose_optimizer(c.entities.optimizer, self.dataset.num_entities),
            learning_rate=c.entities.learning_rate or c.train.learning_rate,
            weight_decay=c.entities.row_weight_decay,
            init_range=c.entities.init_range,
            seed=c.train.seed,
            dtype=getattr(torch, c.entities.dtype),
            device=comm.device,
            fused=row_update(comm.device.type) if self.compiled else None,
        )

    def _open_stores(self) -> dict[str, FeatureStore]:
        """Feature stores of this rank's range; when one rank's part is bad, all ranks stop and say so."""
        stores, error = {}, None
        try:
            for name in self.modalities:
                if name != "structure":
                    self.dataset.bring_features(name, self.first, self.last)
                    where = (self.dataset.directory, name, self.first, self.last)
                    residency = self.config.features.residency
                    # From the host's memory it is the courier that takes them to a GPU.
                    device = str(self.comm.device) if residency == "device" else "cpu"
                    stores[name] = FeatureStore.open(*where, residency, device, self.config.features.on_bad)
        except MocmeError as cause:
            error = cause
        self.comm.raise_together(error)
        return stores

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run to be loaded into it."""
        return run_identity(self.config, self.dataset, self.modalities, self.table.optimizer)

    def _set_statistics(self) -> None:
        """Mean and deviation of the present raw features over all ranks, for the projections."""
        for name, store in self.stores.items():
            sums = torch.zeros(1 + 2 * store.width, dtype=torch.float64)
            for rows in torch.arange(store.num_rows).split(8192):
                values_UF, present_U = store.gather(rows)
                values_UF = values_UF[present_U].double().cpu()
                sums += torch.cat([torch.tensor([float(len(values_UF))]), values_UF.sum(0), values_UF.square().sum(0)])
            count, total_F, square_F = self.comm.sum(sums.to(self.comm.device)).cpu().split([1, store.width, store.width])
            mean_F = total_F / count.clamp_min(1)
            std_F = (square_F / count.clamp_min(1) - mean_F.square()).clamp_min(0).sqrt()
            self.model.projections.by_modality[name].set_statistics(mean_F.float(), std_F.float())  # type: ignore[operator]

    def prepare(self, step: int) -> list[Prepared]:
        """This rank's parts of `step`; collective, called by the background thread in order of steps."""
        prepared, send = [], self.courier.send
        with self.courier.beside():
            for part in range(self.maker.parts):
                batch = self.maker.make(step, part)
                route = plan_route(batch.ids_U, self.partition, self.comm)
                known = self.known_inputs(route.rows_V, step) if self.ahead else None
                prepared.append(Prepared(batch.moved(send), route.moved(send), known, self.courier.mark()))
        return prepared

    def parts(self, prepared: list[Prepared], step: int) -> Iterator[Part]:
        """What `train_step` takes, one by one: the table's rows as they are now, put to what is known; `step` as given to `prepare`."""
        for number, part in enumerate(prepared, 1):
            with self.timer.phase("lookup"):
                self.courier.receive(part.sent, part.tensors())
                known = self.known_inputs(part.route.rows_V, step) if part.known is None else part.known
                rows_VD = self.table.gather(part.route.rows_V)
                entities = self.with_rows(known, rows_VD)
            yield Part(rows_VD, entities, part.route, part.batch, number == len(prepared))

    def known_inputs(self, rows_V: Tensor, step: int) -> EntityInput:
        """What encoding local rows in a training step needs besides the table's rows: a function of `step` and ids."""
        return self.hide_structure(self.features(rows_V), rows_V, step)

    def features(self, rows_V: Tensor) -> EntityInput:
        """Stored features of local rows, who has what, and who is held out; the structure is still missing."""
        raw, present, send = {}, [], self.courier.send
        for name in self.modalities:
            if name == "structure":
                present_V = torch.ones(len(rows_V), dtype=torch.bool, device=self.courier.device)
            else:
                values_VF, present_V = self.stores[name].gather(rows_V)
                raw[name] = send(values_VF)
            present.append(send(present_V))
        # Ids are a random permutation, so odd ids are a random half of the entities, the same at every world size.
        held_out_V = (rows_V + self.first) % 2 == 1
        return EntityInput(raw, torch.stack(present), send(held_out_V))

    def with_rows(self, entities: EntityInput, rows_VD: Tensor) -> EntityInput:
        """The same entities with the table's rows as their structure, where the model takes it."""
        return entities._replace(raw={name: rows_VD if name == "structure" else entities.raw[name] for name in self.modalities})

    def hide_structure(self, entities: EntityInput, rows_V: Tensor, step: int) -> EntityInput:
        """Take the structure from a share of the entities of a training step; from none that would have nothing left.

        A function of seed, step and id, so that every world size hides the same ones.
        """
        share = self.config.train.structure_dropout
        if not share or "structure" not in self.modalities:
            return entities
        at = self.modalities.index("structure")
        ids_V = (rows_V + self.first).cpu().numpy().astype(np.uint64)
        drawn_V = self.courier.send(torch.from_numpy(mix64(ids_V ^ key64(self.config.train.seed, 4, step)) < np.uint64(share * 2**64)))
        present_MV = entities.present_MV.clone()
        others_V = torch.cat([present_MV[:at], present_MV[at + 1 :]]).any(0)
        present_MV[at] &= ~(drawn_V & others_V)
        return entities._replace(present_MV=present_MV)

    def _encoder(self) -> EntityEncoder:
        size = block_rows(self.config, self.dataset.num_entities)
        piece_rows = self.config.evaluation.vectors_mb * 2**20 // (4 * self.config.experts.width)
        inputs = lambda rows: self.with_rows(self.features(rows), self.table.look_up(rows))  # noqa: E731
        return EntityEncoder(self.model, inputs, self.partition, self.comm.rank, size, piece_rows, self.comm.device)

    def encode_rows(self) -> RowShard:
        """Fused vectors of this rank's entities, all in memory; not collective but under ZeRO-3, where every rank must call it."""
        self.model.eval()
        encoder = self._encoder()
        shard = encoder.whole()
        self.model.train()
        self.modality_weights = encoder.weights_rM
        return shard

    def vectors_of(self, ids_Q: np.ndarray) -> Tensor:
        """(Q, D) fused vectors of this rank's entities among `ids_Q`, zeros for others; under ZeRO-3 all ranks must call it."""
        self.model.eval()
        out_QD = self._encoder().pick(ids_Q)
        self.model.train()
        return out_QD

    def _check_finite(self, finite: bool) -> None:
        if self.comm.any(not finite):
            # Nothing is nearer than NaN: the ranks would say nothing.
            raise DivergedError("the entities' vectors are not finite; lower train.learning_rate or entities.learning_rate")

    def evaluate(self, split: str, limit: int = 0, show: bool = False) -> dict[str, Any]:
        """Exact filtered metrics of a split, the same on every rank; collective.

        Args:
            limit: evaluate a fixed sample of so many queries; 0 takes all.
            show: write progress lines.

        Raises:
            DivergedError: an entity's vector is not finite.
        """
        queries = split_queries(self.dataset.triples(split), limit)
        progress = Progress(f"evaluate {split}", len(queries.source), show and self.comm.rank == 0)
        return_pages()
        encoder = self._encoder()
        self.model.eval()
        shard: EntityEncoder | RowShard = encoder
        if encoder.num_pieces == 1:
            shard = encoder.whole()
            self._check_finite(encoder.finite)  # before the queries are ranked
        ranks = rank_queries(
            queries,
            self.model.relations,
            shard,
            self.dataset.known("all"),
            self.comm,
            query_block=self.config.evaluation.query_block,
            tile_rows=self.config.evaluation.tile_rows,
            compiled=self.compiled,
            progress=lambda done, _: progress(done),
        )
        self.model.train()
        self._check_finite(encoder.finite)
        self.modality_weights = encoder.weights_rM
        sampled = {"sampled_of": 2 * len(self.dataset.triples(split))} if len(queries.source) < 2 * len(self.dataset.triples(split)) else {}
        return report(split, np.asarray(ranks), queries.direction, **sampled)


def features_ahead(config: Config, on_gpu: bool) -> bool:
    """Whether features are looked up for coming steps in the background: where that waits for a disk or a GPU's bus.

    In memory beside a CPU there is nothing to hide: all cores have work, and they gather together what one of them would
    take from the step longer (tools/bench/RESULTS.md). A step comes in parts so that little is in memory at once: each
    waits for its turn.
    """
    waits = on_gpu or config.features.residency == "mmap"
    return waits and config.deepspeed.gradient_accumulation_steps == 1


def block_rows(config: Config, num_entities: int) -> int:
    """Entities that are encoded together: blocks lie at multiples of this, and are always encoded whole."""
    return min(config.evaluation.encode_rows, -(-num_entities // 64) * 64)


def model_settings(config: Config) -> ModelSettings:
    """The model's sizes and switches that a configuration asks for."""
    fusion, mine = config.fusion, config.mine
    return ModelSettings(
        width=config.experts.width,
        num_experts=config.experts.num_experts,
        experts=config.experts.kind,
        residual=config.experts.residual,
        recompute=config.experts.recompute,
        experts_dropout=config.experts.dropout,
        projection_hidden=config.projection.hidden,
        projection_dropout=config.projection.dropout,
        structure=config.projection.structure,
        gamma=config.rotate.gamma,
        precision=config.train.precision,
        fusion=FusionSettings(
            estimator=fusion.estimator,
            scope=fusion.scope,
            weight_gradient=fusion.weight_gradient,
            temperature=fusion.temperature,
            normalize=fusion.normalize,
            hidden=mine.hidden,
            ema=mine.ema,
            bounded=mine.bounded,
            clip=mine.clip,
            rows=mine.rows,
            precision=mine.precision,
        ),
    )


def _loss_settings(config: Config, compiled: bool) -> LossSettings:
    n = config.negatives
    weighting = Weighting(n.weighting, n.easy_below, n.hard_from, n.weight_easy, n.weight_ambiguous, n.weight_hard, n.temperature)
    return LossSettings(config.train.loss, config.rotate.gamma, weighting, compiled, config.train.cuda_graphs)


def _groups(config: Config, module: StepModule) -> list[dict[str, Any]]:
    """Adam's groups: the statistics networks ascend at their own rate, and so does a table that the engine holds."""
    train, entities = config.train, config.entities
    groups: dict[str, dict[str, Any]] = {
        "others": {"lr": train.learning_rate},
        "networks": {"lr": config.mine.learning_rate},
        "rows": {"lr": entities.learning_rate or train.learning_rate, "weight_decay": entities.row_weight_decay},
    }
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in groups}
    for name, p in module.named_parameters():
        members["rows" if name == "rows.weight" else "networks" if ".mine." in name else "others"].append(p)
    return [{"params": members[name], **settings} for name, settings in groups.items() if members[name]]


def open_dataset(config: Config) -> Dataset:
    """The packed data set of a run whose paths are resolved.

    Raises:
        ConfigError: neither data.dataset nor data.raw is set.
    """
    if config.data.dataset is None:
        raise ConfigError("data.dataset: not set; give a packed data set (data.dataset) or a raw folder (data.raw)")
    return Dataset.open(config.data.dataset)
