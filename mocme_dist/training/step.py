"""One training step: encode at the owner, exchange fused vectors, score, weigh; gradients back the same way.

The engine wraps `StepModule`, which holds the dense parameters only. The rows enter as a leaf tensor and leave with
a gradient; the table applies it. A step may come in parts, whose gradients add up (deepspeed.gradient_accumulation_steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.batching.batch import Batch
from mocme_dist.model.fusion import Fused
from mocme_dist.model.loss import LossSettings, LossStats, completion_loss
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import Route, exchange
from mocme_dist.parallel.table import EntityTable, coalesce
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.plain_engine import Engine, buffers_of
from mocme_dist.training.profiler import PhaseTimer


class EntityInput(NamedTuple):
    """What the owner needs to encode V of its entities: raw (V, F) by modality, present (M, V), held_out (V,)."""

    raw: dict[str, Tensor]
    present_MV: Tensor
    held_out_V: Tensor


def take(z_UD: Tensor, index: Tensor) -> Tensor:
    """Rows at an index of any shape. Indexing by brackets does the same; its backward is four times slower on a CPU."""
    return z_UD.index_select(0, index.flatten()).view(*index.shape, -1)


class StepModule(nn.Module):
    """The dense part of the model, and the whole forward pass of a rank."""

    def __init__(self, model: MoCME, loss: LossSettings, comm: Comm, timer: PhaseTimer, rows: nn.Embedding | None = None) -> None:
        super().__init__()
        self.model, self.loss, self.comm, self.timer = model, loss, comm, timer
        self.rows = rows  # the table, where the engine holds it: structure then comes as ids

    def forward(self, entities: EntityInput, route: Route, batch: Batch, estimate: bool) -> tuple[Tensor, LossStats, Fused]:
        """The loss to differentiate on this rank, sums for the log, and what fusion did.

        The engine averages gradients over ranks, so each rank's share is multiplied by the number of ranks: the
        average is then the gradient of the mean over the global batch. The networks' own loss is a share too.
        """
        raw = entities.raw
        with self.timer.phase("encode"):
            if self.rows is not None and "structure" in raw:
                raw = {**raw, "structure": self.rows(raw["structure"])}
            fused = self.model.encode(raw, entities.present_MV, entities.held_out_V, self.comm.sum, estimate)
        with self.timer.phase("exchange"):
            z_UD = exchange(fused.z_VD, route, self.comm.swap)
        with self.timer.phase("loss"):
            loss, stats = completion_loss(
                take(z_UD, batch.source_Gb),
                self.model.relations(batch.relation_Gb),
                batch.sign_Gb,
                take(z_UD, batch.target_Gb),
                take(z_UD, batch.pool_GN),
                batch.allowed_GbN,
                batch.weight_Gb,
                self.loss,
            )
        return (loss / batch.total + fused.loss) * self.comm.world_size, stats, fused


class StepResult(NamedTuple):
    """One step: sums over ranks as `pack_stats` lays them out, fusion's weights here, and what became of it."""

    sums: Tensor
    fused: Fused
    skipped: bool
    stop: bool
    row_gradient_norm: float


STAT_NAMES = ("loss", "positive", "negative", "allowed", "positive_score", "queries", "mine_loss", "stop", "easy", "ambiguous", "hard")


def pack_stats(stats: LossStats, mine_loss: Tensor, stop: bool) -> Tensor:
    """The step's sums as one vector (see STAT_NAMES): one small reduction serves the log, the finite check and the stop flag."""
    scalars = [stats.loss, stats.positive, stats.negative, stats.allowed, stats.positive_score, stats.queries, mine_loss.detach()]
    flag = torch.tensor(float(stop), device=stats.loss.device)
    return torch.cat([torch.stack([*(value.double() for value in scalars), flag.double()]), stats.classes_3.double()])


class Part(NamedTuple):
    """A share of a step that is encoded and scored at once; its rows are a leaf, or ids where the engine holds the table."""

    rows_VD: Tensor
    entities: EntityInput
    route: Route
    batch: Batch
    last: bool


def _row_gradient(part: Part, world_size: int) -> tuple[Tensor, Tensor]:
    """Local rows and their gradient of the global mean loss; none where the engine holds the table."""
    if not part.rows_VD.requires_grad:
        return part.route.rows_V[:0], torch.zeros(0, 1, device=part.rows_VD.device)
    # Rows got the sum over ranks of gradients that were multiplied by the world size; see StepModule.
    grad_VD = part.rows_VD.grad if part.rows_VD.grad is not None else torch.zeros_like(part.rows_VD)
    return part.route.rows_V, grad_VD / world_size


def train_step(
    engine: Engine, table: EntityTable | EngineRows, parts: Iterable[Part], comm: Comm, *, estimate: bool, stop: bool, timer: PhaseTimer
) -> StepResult:
    """Forward, agree that all is finite, backward, update. Nothing moves on any rank when anything is not finite.

    Args:
        parts: of the step, in order; taken one at a time, so that only one is in memory. The last one estimates
            mutual information, so that all parts are fused with the same weights.
        estimate: whether this step does.
        stop: whether this rank was asked to end the run.
    """
    # Moving averages follow the forward pass: one bad step would stay in them for ever.
    averages = {name: value.clone() for name, value in buffers_of(engine.module).items()}

    def skipped(norm: float) -> StepResult:
        with torch.no_grad():
            for name, value in buffers_of(engine.module).items():
                value.copy_(averages[name])
        return StepResult(sums, fused, True, stopping, norm)

    sums = torch.zeros(len(STAT_NAMES), dtype=torch.float64, device=comm.device)
    touched: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        loss, stats, fused = engine(part.entities, part.route, part.batch, estimate and part.last)
        with timer.phase("agree"):
            sums += comm.sum(pack_stats(stats, fused.loss, stop))
            finite = bool(torch.isfinite(sums).all())
            stopping = bool(sums[STAT_NAMES.index("stop")] > 0)
        if finite or touched:
            with timer.phase("backward"):
                engine.backward(loss, part.last or not finite)
        if not finite:
            if touched:
                engine.skip()
            return skipped(math.nan)
        touched.append(_row_gradient(part, comm.world_size))
    with timer.phase("update"):
        rows_V, grad_VD = coalesce(touched)
        norm = math.sqrt(float(comm.sum(torch.linalg.vector_norm(grad_VD, dtype=torch.float64).square())))
        factor = engine.step(norm)
        if not factor:
            return skipped(norm)
        table.update(rows_V, grad_VD if factor == 1 else grad_VD * factor)
    return StepResult(sums, fused, False, stopping, norm)
