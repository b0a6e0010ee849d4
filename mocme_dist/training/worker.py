"""One rank of a run: makes the inputs of each step, encodes entities, and ranks queries. Constructed by `build`.

Training and evaluation use the same worker, so what is evaluated is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import key64, mix64
from mocme_dist.config import Config
from mocme_dist.config.schema import MODALITIES
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError, DivergedError
from mocme_dist.evaluation.metrics import report
from mocme_dist.evaluation.ranking import Queries, Ranks, RowShard, Sizes, rank_queries, split_queries
from mocme_dist.memory import return_pages
from mocme_dist.model.mine import find_halves
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import plan_route
from mocme_dist.parallel.table import EntityTable, merge_rows
from mocme_dist.partition import RowPartition
from mocme_dist.training.encode import EntityEncoder
from mocme_dist.training.engine import Engine
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.graph_step import GraphStep
from mocme_dist.training.prefetch import DevicePrefetcher, Prepared
from mocme_dist.training.step import EntityInput, MicroBatch, StepResult
from mocme_dist.training.tally import Tally
from mocme_dist.training.timer import PhaseTimer


@dataclass(eq=False)
class Worker:
    """Parts of one rank.

    Attributes:
        modalities: those that the model fuses, structure first.
        stores: features of this rank's rows, by modality.
        seen_r: (rows,) whether a training fact mentions the entity, on the device of the steps.
        looks_up_ahead: whether the background thread looks up features, see `build.looks_up_ahead`.
        block_rows: number of entities that are encoded together.
        compiled: whether the hot path is compiled.
        table: entity rows, beside the engine or inside it.
        identity: compatibility fields that a checkpoint must share with this run to be loaded.
        tally: sums of the current log interval and counts of skipped steps.
        hidden: (rows,) flags by modality that `hide` set.
        graph: takes steps as graphs, if that holds here (`build.choose_graph`).
        stop_asked: whether this rank was asked to end the run; `prepare` tells the other ranks.
        modality_weights: (rows, M) weights of the last ranking or encoding of all entities.
    """

    config: Config
    dataset: Dataset
    comm: Comm
    timer: PhaseTimer
    modalities: tuple[str, ...]
    partition: RowPartition
    stores: dict[str, FeatureStore]
    prefetcher: DevicePrefetcher
    seen_r: Tensor
    looks_up_ahead: bool
    block_rows: int
    maker: BatchMaker
    model: MoCME
    compiled: bool
    engine: Engine
    table: EntityTable | EngineRows
    identity: dict[str, Any]
    tally: Tally
    graph: GraphStep | None = None
    stop_asked: bool = False
    hidden: dict[str, Tensor] = field(default_factory=dict)
    modality_weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.first, self.last = self.partition.bounds(self.comm.rank)

    def scale_rates(self, factor: float) -> None:
        """Make the next steps use `factor` times the learning rates of dense parameters and rows."""
        self.engine.scale_rates(factor)
        self.table.scale_rates(factor)

    def prepare(self, step: int) -> list[Prepared]:
        """Return this rank's micro-batches of a step; collective, called by the background thread in step order."""
        prepared: list[Prepared] = []
        rows: list[Tensor] = []
        send = self.prefetcher.send
        estimates = self.config.fusion.estimator in ("mine", "cosine") and step % self.config.mine.every == 0
        with self.prefetcher.in_background():
            for number in range(self.maker.num_micro_batches):
                batch = self.maker.make(step, number)
                route = plan_route(batch.ids_U, self.partition, self.comm, self.stop_asked)
                # Ids are a random permutation, so odd ids are a random half of the entities, the same at every world
                # size.
                held_out_V = (route.rows_V + self.first) % 2 == 1
                if self.graph is not None:
                    drawn_V = self._draw(route.rows_V, step)
                    given = self.graph.make_input(batch, route.rows_V, held_out_V, drawn_V, send)
                    mark = self.prefetcher.mark()
                    return [Prepared(batch, route, route.rows_V, None, None, None, given, mark)]
                rows.append(route.rows_V)
                halves = find_halves(held_out_V, self.config.mine.rows).moved(send) if estimates else None
                entities = self.step_features(route.rows_V, step) if self.looks_up_ahead else None
                last = number + 1 == self.maker.num_micro_batches
                merge = (
                    merge_rows(rows).moved(send) if last and number and isinstance(self.table, EntityTable) else None
                )
                sent = batch.moved(send), route.moved(send), route.rows_V, halves, entities, merge
                prepared.append(Prepared(*sent, None, self.prefetcher.mark()))
        return prepared

    def graph_step(self, prepared: list[Prepared], estimate: bool, factor: float) -> StepResult:
        """Take a step as a graph.

        Args:
            prepared: as `prepare` returned it.
            estimate: whether this step estimates mutual information.
            factor: of the scheduled learning rates.
        """
        (only,) = prepared
        assert self.graph is not None and only.graph is not None
        self.prefetcher.receive(only.mark, only.tensors())
        with self.timer.phase("graph"):
            return self.graph.step(only.graph, estimate, factor)

    def micro_batches(self, prepared: list[Prepared], step: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step one by one, with the current rows of the table.

        Args:
            prepared: as `prepare` returned it for the same step.
        """
        for number, ready in enumerate(prepared, 1):
            with self.timer.phase("lookup"):
                self.prefetcher.receive(ready.mark, ready.tensors())
                features = ready.entities
                if features is None:
                    features = self.step_features(ready.rows_V, step)
                rows_VD = self.table.gather(ready.route.rows_V)
                entities = self.with_rows(features, rows_VD)._replace(halves=ready.halves)
            yield MicroBatch(rows_VD, entities, ready.route, ready.batch, number == len(prepared))

    def step_features(self, rows_V: Tensor, step: int) -> EntityInput:
        """Return inputs of the encoder for local rows in a training step, without structure: a function of step and
        ids."""
        return self.hide_structure(self.features(rows_V), rows_V, step)

    def features(self, rows_V: Tensor) -> EntityInput:
        """Return stored features and presence of local rows; structure values are added later.

        An entity without a training fact has no structure: nothing has moved its row, which is noise.
        """
        raw, present, send = {}, [], self.prefetcher.send
        for name in self.modalities:
            if name == "structure":
                present_V = self.seen_r.index_select(0, rows_V.to(self.seen_r.device)) & ~self._is_hidden(name, rows_V)
            else:
                values_VF, present_V = self.gather(name, rows_V)
                raw[name] = send(values_VF)
            present.append(send(present_V))
        return EntityInput(raw, torch.stack(present))

    def gather(self, name: str, rows_V: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of local rows in one modality and which rows have them; hidden ones count as absent."""
        values_VF, present_V = self.stores[name].gather(rows_V)
        if name in self.hidden:
            present_V = present_V & ~self._is_hidden(name, rows_V).to(present_V.device)
            values_VF = values_VF * present_V[:, None].to(values_VF.device)
        return values_VF, present_V

    def _is_hidden(self, name: str, rows_V: Tensor) -> Tensor:
        """Return (V,) whether a modality of local rows is hidden, on the device of the structure flags."""
        rows_V = rows_V.to(self.seen_r.device)
        return self.hidden[name][rows_V] if name in self.hidden else torch.zeros_like(rows_V, dtype=torch.bool)

    def hide(self, shares: dict[str, float]) -> None:
        """Hide modalities of shares of the entities from now on, a function of seed and id, equal at every world size.

        Raises:
            ConfigError: the run has no such modality.
        """
        has = tuple(dict.fromkeys((*self.modalities, *self.stores)))
        if missing := [name for name in shares if name not in has]:
            raise ConfigError(f"--drop {missing[0]}: this run has no such modality; it has {', '.join(has)}")
        ids_r = np.arange(self.first, self.last).astype(np.uint64)
        for name, share in shares.items():
            drawn_r = mix64(ids_r ^ key64(self.config.train.seed, 5, MODALITIES.index(name))) >> np.uint64(11)
            self.hidden[name] = torch.from_numpy(drawn_r * 2.0**-53 < share).to(self.seen_r.device)

    def lost(self, ids_Q: np.ndarray) -> np.ndarray:
        """Return (Q,) whether entities have lost a modality that they had; collective."""
        lost_Q = torch.zeros(len(ids_Q), dtype=torch.int64, device=self.comm.device)
        local_Q = torch.from_numpy(ids_Q) - self.first
        at = torch.nonzero((local_Q >= 0) & (local_Q < self.last - self.first))[:, 0]
        for name in self.hidden:
            rows = local_Q[at]
            had = self.seen_r[rows.to(self.seen_r.device)] if name == "structure" else self.stores[name].gather(rows)[1]
            lost_Q[at.to(lost_Q.device)] |= (
                (had.to(self.seen_r.device) & self._is_hidden(name, rows)).long().to(lost_Q.device)
            )
        return self.comm.sum(lost_Q).cpu().numpy() > 0

    def with_rows(self, entities: EntityInput, rows_VD: Tensor) -> EntityInput:
        """Return the entities with rows of the table as their structure, if the model has this modality."""
        return entities._replace(
            raw={name: rows_VD if name == "structure" else entities.raw[name] for name in self.modalities}
        )

    def _draw(self, rows_V: Tensor, step: int) -> Tensor | None:
        """Return (V,) which local rows are drawn to hide their structure in a training step; None if none ever is."""
        share = self.config.train.structure_dropout
        if not share or "structure" not in self.modalities:
            return None
        ids_V = (rows_V + self.first).cpu().numpy().astype(np.uint64)
        return torch.from_numpy(mix64(ids_V ^ key64(self.config.train.seed, 4, step)) < np.uint64(share * 2**64))

    def hide_structure(self, entities: EntityInput, rows_V: Tensor, step: int) -> EntityInput:
        """Mark the structure of a share of the entities absent in a training step, except where nothing else is
        present.

        The choice is a function of seed, step and id, so it is the same at every world size.
        """
        drawn_V = self._draw(rows_V, step)
        if drawn_V is None:
            return entities
        at = self.modalities.index("structure")
        drawn_V = self.prefetcher.send(drawn_V)
        present_MV = entities.present_MV.clone()
        others_V = torch.cat([present_MV[:at], present_MV[at + 1 :]]).any(0)
        present_MV[at] &= ~(drawn_V & others_V)
        return entities._replace(present_MV=present_MV)

    def _encoder(self) -> EntityEncoder:
        piece_rows = self.config.evaluation.vectors_mb * 2**20 // (4 * self.model.blocks.total)

        def inputs(rows: Tensor) -> EntityInput:
            return self.with_rows(self.features(rows), self.table.look_up(rows))

        comm = self.comm
        return EntityEncoder(self.model, inputs, self.partition, comm.rank, self.block_rows, piece_rows, comm.device)

    def encode_rows(self) -> RowShard:
        """Return fused vectors of this rank's entities, all in memory. Under ZeRO-3 every rank must call it."""
        self.model.eval()
        encoder = self._encoder()
        shard = encoder.whole()
        self.model.train()
        self.modality_weights = encoder.weights_rM
        return shard

    def vectors_of(self, ids_Q: np.ndarray) -> Tensor:
        """Return (Q, D) fused vectors of this rank's entities among `ids_Q`, zeros for others. Under ZeRO-3 all ranks
        call it."""
        self.model.eval()
        out_QD = self._encoder().pick(ids_Q)
        self.model.train()
        return out_QD

    def check_finite(self, finite: bool) -> None:
        """Raise DivergedError on all ranks if a rank's vectors are not finite; collective."""
        if self.comm.any(not finite):
            # No distance is smaller than NaN: the ranks would be meaningless.
            raise DivergedError(
                "the entities' vectors are not finite; lower train.learning_rate or entities.learning_rate"
            )

    def evaluate(self, split: str, limit: int = 0) -> dict[str, Any]:
        """Return exact filtered metrics of a split, the same on every rank; collective.

        Args:
            limit: number of queries in a fixed sample to evaluate; 0 takes all.

        Raises:
            DivergedError: an entity's vector is not finite.
        """
        queries, ranks = self.rank(split, limit)
        total = 2 * len(self.dataset.triples(split))
        sampled = {"sampled_of": total} if len(queries.source) < total else {}
        return report(split, ranks.filtered, queries.direction, self.seen(queries), **sampled)

    def seen(self, queries: Queries) -> np.ndarray:
        """Return (2, Q) whether train shows the source and the target of each query."""
        return self.dataset.seen(np.concatenate([queries.source, queries.target])).reshape(2, -1)

    def rank(self, split: str, limit: int = 0) -> tuple[Queries, Ranks]:
        """Return queries of a split, or a sample of them, and their exact filtered ranks; collective. See
        `evaluate`."""
        queries = split_queries(self.dataset.triples(split), limit)
        return_pages()
        encoder = self._encoder()
        self.model.eval()
        shard: EntityEncoder | RowShard = encoder
        with Progress(f"evaluate {split}", len(queries.source), "queries", active=self.comm.rank == 0) as progress:
            if encoder.num_pieces == 1:
                shard = encoder.whole()
                self.check_finite(encoder.finite)  # before the queries are ranked
            ranks = rank_queries(
                queries,
                self.model.relations,
                shard,
                self.dataset.known("all"),
                self.comm,
                Sizes(self.config.evaluation.query_block, self.config.evaluation.tile_rows, self.compiled),
                lambda done, _: progress.raise_to(done),
            )
        self.model.train()
        self.check_finite(encoder.finite)
        self.modality_weights = encoder.weights_rM
        return queries, ranks
