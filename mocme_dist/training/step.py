"""One training step: encode at the owner, exchange fused vectors, score, weigh; gradients back the same way.

The engine wraps `StepModule`, which has the dense parameters only. The rows enter as a leaf tensor, and the table
applies their gradient. A step may consist of micro-batches whose gradients are summed
(deepspeed.gradient_accumulation_steps).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.batching.batch import Batch
from mocme_dist.model.fusion import Fused
from mocme_dist.model.loss import LossSettings, LossStats, completion_loss
from mocme_dist.model.mine import Halves
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import Route, exchange
from mocme_dist.parallel.table import EntityTable, Merge, coalesce
from mocme_dist.training.engine import Engine, buffers_of
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.tally import STAT_NAMES, Tally
from mocme_dist.training.timer import PhaseTimer


class EntityInput(NamedTuple):
    """Inputs of the encoder for V entities of the owner: raw (V, F) by modality, present (M, V), and which of them
    train the statistics networks; None if nothing is estimated."""

    raw: dict[str, Tensor]
    present_MV: Tensor
    halves: Halves | None = None


def take(z_UD: Tensor, index: Tensor) -> Tensor:
    """Return rows at an index of any shape; on a CPU, four times as fast in backward as indexing by brackets."""
    return z_UD.index_select(0, index.flatten()).view(*index.shape, -1)


class StepModule(nn.Module):
    """Dense part of the model, and the whole forward pass of a rank."""

    def __init__(
        self, model: MoCME, loss: LossSettings, comm: Comm, timer: PhaseTimer, rows: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.model, self.loss, self.comm, self.timer = model, loss, comm, timer
        self.rows = rows  # the table, if the engine holds it: structure is then given as ids

    def forward(
        self, entities: EntityInput, route: Route, batch: Batch, estimate: bool
    ) -> tuple[Tensor, LossStats, Fused]:
        """Return the loss to differentiate on this rank, sums for the log, and the result of fusion.

        The engine averages gradients over ranks, so each rank's share is multiplied by the number of ranks: the
        average is then the gradient of the mean over the global batch. This holds for the networks' own loss, too.
        """
        raw = entities.raw
        with self.timer.phase("encode"):
            if self.rows is not None and "structure" in raw:
                raw = {**raw, "structure": self.rows(raw["structure"])}
            fused = self.model.encode(raw, entities.present_MV, entities.halves, self.comm.sum, estimate)
        with self.timer.phase("exchange"):
            z_UD = exchange(fused.z_VD, route)
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
    """Result of a step, on the device: sums over ranks in the order of STAT_NAMES, the result of fusion on this rank,
    whether the step was applied (bool), and the norm of the rows' gradient over all ranks."""

    sums: Tensor
    fused: Fused
    applied: Tensor
    row_gradient_norm: Tensor

    @property
    def skipped(self) -> bool:
        """Return whether the step moved nothing; the host waits for the device."""
        return not self.applied


def pack_stats(stats: LossStats, mine_loss: Tensor) -> Tensor:
    """Return the sums as one vector (see STAT_NAMES): one reduction serves the log and the finite check."""
    scalars = [
        stats.loss,
        stats.positive,
        stats.negative,
        stats.allowed,
        stats.positive_score,
        stats.queries,
        mine_loss.detach(),
    ]
    return torch.cat([torch.stack([value.double() for value in scalars]), stats.classes_3.double()])


class MicroBatch(NamedTuple):
    """Queries and entities that a rank handles at once; rows are a leaf, or ids if the engine holds the table."""

    rows_VD: Tensor
    entities: EntityInput
    route: Route
    batch: Batch
    last: bool


def _row_gradient(micro: MicroBatch, world_size: int) -> tuple[Tensor, Tensor]:
    """Return local rows and their gradient of the global mean loss; empty if the engine holds the table."""
    if not micro.rows_VD.requires_grad:
        return micro.route.rows_V[:0], torch.zeros(0, 1, device=micro.rows_VD.device)
    # This is the sum over ranks of gradients that were multiplied by the world size; see StepModule.
    grad_VD = micro.rows_VD.grad if micro.rows_VD.grad is not None else torch.zeros_like(micro.rows_VD)
    return micro.route.rows_V, grad_VD / world_size


def train_step(
    engine: Engine,
    table: EntityTable | EngineRows,
    micro_batches: Iterable[MicroBatch],
    comm: Comm,
    tally: Tally,
    *,
    estimate: bool,
    timer: PhaseTimer,
    merge: Merge | None = None,
) -> StepResult:
    """Forward, backward, agree that everything is finite, update. If a rank has a value that is not, no rank moves.

    The host does not wait for the device, except inside ZeRO's optimizers: whether the step is applied is a tensor, and
    updates are masked by it.

    Args:
        micro_batches: of the step, in order; taken one at a time, so that only one is in memory. Only the last one
            estimates mutual information, so all are fused with the same weights.
        tally: counts the step.
        estimate: whether this step estimates mutual information.
        merge: of the rows of several micro-batches; made from them if it is not given.
    """
    # The forward pass updates moving averages: the values of one bad step would remain in them.
    averages = [(value, value.clone()) for value in buffers_of(engine.module).values()]
    sums = torch.zeros(len(STAT_NAMES), dtype=torch.float64, device=comm.device)
    touched: list[tuple[Tensor, Tensor]] = []
    for micro in micro_batches:
        loss, stats, fused = engine(micro.entities, micro.route, micro.batch, estimate and micro.last)
        with timer.phase("agree"):
            sums += comm.sum(pack_stats(stats, fused.loss))
        with timer.phase("backward"):
            engine.backward(loss, micro.last)
        touched.append(_row_gradient(micro, comm.world_size))
    with timer.phase("update"):
        rows_V, grad_VD = coalesce(touched, merge)
        norm = comm.sum(torch.linalg.vector_norm(grad_VD, dtype=torch.float64).square()).sqrt()
        factor = engine.step(norm, torch.isfinite(sums).all())
        table.update(rows_V, grad_VD, factor)
        applied = factor > 0
        with torch.no_grad():
            for value, before in averages:
                value.copy_(torch.where(applied, value, before))
        tally.add(sums, applied)
    return StepResult(sums, fused, applied, norm)
