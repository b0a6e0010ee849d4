"""The entity table: one rank's contiguous range of structural rows, with their optimizer.

The table is not an nn.Module and lives outside the engine: DeepSpeed broadcasts, averages, casts or partitions every
parameter that a module registers, which would corrupt a row shard. The rows of a step are a leaf tensor; `update`
applies its gradient to those rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocme_dist.kernels.row_update import RowUpdate
from mocme_dist.parallel.optim import RowOptimizer
from mocme_dist.partition import RowPartition

_INIT_BLOCK = 4096


def _empty_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return uninitialised rows. On the CPU numpy allocates them, because it requests huge pages: fewer TLB misses."""
    if torch.device(device).type != "cpu":
        return torch.empty(num_rows, width, dtype=dtype, device=device)
    raw = np.empty((num_rows, width), dtype={torch.float32: np.float32, torch.bfloat16: np.int16}[dtype])
    return torch.from_numpy(raw).view(dtype)


def initial_rows(
    first: int,
    last: int,
    width: int,
    init_range: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return (last - first, D) rows uniform in [-init_range, init_range], a function of (seed, id) alone.

    They are drawn in blocks of fixed id ranges, each with its own counter-based stream, so every world size starts with
    the same rows, and written into the final tensor, so there is no second copy.
    """
    out = _empty_rows(last - first, width, dtype, device)
    for block in range(first // _INIT_BLOCK, -(-last // _INIT_BLOCK) if last > first else 0):
        start = block * _INIT_BLOCK
        values = np.random.Generator(np.random.Philox(key=[seed, block])).random((_INIT_BLOCK, width), dtype=np.float32)
        begin, end = max(first, start), min(last, start + _INIT_BLOCK)
        out[begin - first : end - first] = torch.from_numpy(
            (values[begin - start : end - start] * 2 - 1) * np.float32(init_range)
        )
    return out


@dataclass
class RowPart:
    """Rows [first, last) with their optimizer state and number of updates, which a checkpoint fills in place."""

    first: int
    last: int
    rows_rD: Tensor
    state: dict[str, Tensor]
    num_updates: int


class EntityTable:
    """Rows [first, last) of E and their optimizer state.

    Args:
        partition: rows over ranks. rank: the owner of these rows.
        width: D. init_range, seed: see `initial_rows`; seed also rounds bfloat16 rows.
        optimizer: "adam" (two moments of D numbers per row) or "adagrad" (one number per row).
        learning_rate, weight_decay: of the rows.
        dtype: of the rows, float32 or bfloat16; gradients and state are float32.
        device: where rows and state live.
        fused: see `RowOptimizer`.

    Attributes:
        updates: number of applied updates, float64 scalar on the device.
    """

    def __init__(
        self,
        partition: RowPartition,
        rank: int,
        width: int,
        *,
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        init_range: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fused: RowUpdate | None = None,
    ) -> None:
        self.partition, self.rank, self.width, self.optimizer = partition, rank, width, optimizer
        self.first, self.last = partition.bounds(rank)
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        self.rows_rD = initial_rows(self.first, self.last, width, init_range, seed, dtype, device)
        self._optimizer = RowOptimizer(
            optimizer,
            self.last - self.first,
            width,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            first=self.first,
            device=device,
            fused=fused,
        )
        self.state = self._optimizer.state

    @property
    def base_rate(self) -> float:
        """Learning rate of the rows before the schedule."""
        return self._optimizer.learning_rate

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel updates the rows, as `apply` needs."""
        return self._optimizer.fused is not None and self.rows_rD.dtype == torch.float32

    @property
    def num_updates(self) -> int:
        """Number of updates that were applied; the host waits for the device."""
        return int(self.updates)

    def look_up(self, rows_V: Tensor) -> Tensor:
        """Return (V, D) float32 copies of local rows."""
        return self.rows_rD.index_select(0, rows_V).float()

    def gather(self, rows_V: Tensor) -> Tensor:
        """Return (V, D) float32 copies of local rows as a leaf that collects their gradient."""
        return self.look_up(rows_V).requires_grad_()

    def scale_rates(self, factor: float) -> None:
        """Multiply the learning rate of the next updates by `factor`."""
        self._optimizer.factor = factor

    def update(self, rows_V: Tensor, grad_VD: Tensor, factor: Tensor | None = None) -> None:
        """Move the rows along their gradient; all other rows stay as they are, bit for bit.

        Args:
            rows_V: (V,) unique local rows, as given to `gather`.
            grad_VD: (V, D) gradient of the global mean loss.
            factor: float64 scalar on the device that multiplies the gradient; 0 leaves rows and state as they are, and
                is not counted. None is 1.
        """
        factor = torch.ones_like(self.updates) if factor is None else factor
        self.updates += factor > 0
        self._optimizer.update(self.rows_rD, rows_V, grad_VD, self.updates, factor)

    def apply(self, rows_V: Tensor, grad_VD: Tensor, control: Tensor) -> None:
        """Move rows by the kernel, in one launch; the caller counts in `updates` and makes `control` of it.

        Args:
            rows_V: (V,) unique local rows; negative ones are padding.
            grad_VD: (V, D) gradient of the global mean loss.
            control: see `kernels.row_update.make_control`.
        """
        optimizer = self._optimizer
        assert optimizer.fused is not None
        optimizer.fused(optimizer.kind, self.rows_rD, self.state, rows_V, grad_VD, control, optimizer.weight_decay)

    @contextmanager
    def filling(self) -> Iterator[RowPart]:
        """Yield this rank's rows and state, to be overwritten."""
        part = RowPart(self.first, self.last, self.rows_rD, self.state, self.num_updates)
        yield part
        self.updates.fill_(part.num_updates)


class Merge(NamedTuple):
    """How the rows of several micro-batches are put together: (V,) ascending unique rows, and for each row of each
    micro-batch its place among them."""

    rows_V: Tensor
    place_A: Tensor

    def moved(self, send: Callable[[Tensor], Tensor]) -> Merge:
        """Return the same with its tensors moved by `send`."""
        return Merge(send(self.rows_V), send(self.place_A))


def merge_rows(rows: list[Tensor]) -> Merge:
    """Return how unique rows of several micro-batches are put together; on a GPU this waits for the device."""
    return Merge(*torch.unique(torch.cat(rows), sorted=True, return_inverse=True))


def coalesce(touched: list[tuple[Tensor, Tensor]], merge: Merge | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows that several micro-batches touched, once each, with their gradients added.

    Args:
        touched: pairs of (V,) unique rows and their (V, D) gradients, at least one.
        merge: of these rows, if it was made ahead.

    Returns:
        (V,) ascending unique rows and (V, D) sums.
    """
    if len(touched) == 1:
        return touched[0]
    rows_V, place_A = merge or merge_rows([rows for rows, _ in touched])
    grad_AD = torch.cat([grad for _, grad in touched])
    return rows_V, grad_AD.new_zeros(len(rows_V), grad_AD.shape[1]).index_add(0, place_A, grad_AD)
