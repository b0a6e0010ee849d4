"""The entity table: one rank's contiguous range of structural rows, with the optimizer that moves them.

It is no nn.Module and lives outside the engine: DeepSpeed broadcasts, averages, casts or partitions whatever a module
registers, and a row shard must see none of that. Rows of a step are a leaf tensor; `update` applies its gradient to
those rows only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mocme_dist.parallel.optim import RowOptimizer, RowUpdate
from mocme_dist.partition import RowPartition

_INIT_BLOCK = 4096


def _empty_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Rows to be filled. On the CPU by numpy, which asks the system for huge pages: random rows of gigabytes in small ones miss the TLB."""
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
    """(last - first, D) rows uniform in [-init_range, init_range], a function of (seed, id) alone.

    Made in blocks of fixed id ranges, each with its own counter-based stream, so every world size starts alike, and
    straight into the tensor that stays, so there is never a second one.
    """
    out = _empty_rows(last - first, width, dtype, device)
    for block in range(first // _INIT_BLOCK, -(-last // _INIT_BLOCK) if last > first else 0):
        start = block * _INIT_BLOCK
        values = np.random.Generator(np.random.Philox(key=[seed, block])).random((_INIT_BLOCK, width), dtype=np.float32)
        begin, end = max(first, start), min(last, start + _INIT_BLOCK)
        out[begin - first : end - first] = torch.from_numpy((values[begin - start : end - start] * 2 - 1) * np.float32(init_range))
    return out


@dataclass
class RowPart:
    """Rows [first, last) with their optimizer state and its count of updates, as a checkpoint fills them in place."""

    first: int
    last: int
    rows_rD: Tensor
    state: dict[str, Tensor]
    num_updates: int


class EntityTable:
    """Rows [first, last) of E and their optimizer state.

    Args:
        partition: rows over ranks. rank: whose rows.
        width: D. init_range, seed: see `initial_rows`; seed also rounds bfloat16 rows.
        optimizer: "adam" (two moments a row, D numbers each) or "adagrad" (one number a row).
        learning_rate, weight_decay: of the rows.
        dtype: of the rows, float32 or bfloat16; gradients and state are float32.
        device: where rows and state live.
        fused: see `RowOptimizer`.
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
        self.num_updates = 0
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

    def look_up(self, rows_V: Tensor) -> Tensor:
        """(V, D) float32 copies of local rows."""
        return self.rows_rD.index_select(0, rows_V).float()

    def gather(self, rows_V: Tensor) -> Tensor:
        """(V, D) float32 copies of local rows, a leaf that collects their gradient."""
        return self.look_up(rows_V).requires_grad_()

    def update(self, rows_V: Tensor, grad_VD: Tensor) -> None:
        """Move the rows along their gradient; rows that nobody asked for stay, bit for bit.

        Args:
            rows_V: (V,) unique local rows, as given to `gather`.
            grad_VD: (V, D) gradient of the global mean loss.
        """
        self.num_updates += 1
        self._optimizer.update(self.rows_rD, rows_V, grad_VD, self.num_updates)

    @contextmanager
    def filling(self) -> Iterator[RowPart]:
        """This rank's rows and state, to be overwritten."""
        part = RowPart(self.first, self.last, self.rows_rD, self.state, self.num_updates)
        yield part
        self.num_updates = part.num_updates


def coalesce(touched: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows that several parts of a step touched, once each, with their gradients added.

    Args:
        touched: pairs of (V,) unique rows and their (V, D) gradients, at least one.

    Returns:
        (V,) ascending unique rows and (V, D) sums.
    """
    if len(touched) == 1:
        return touched[0]
    rows_V, place_A = torch.unique(torch.cat([rows for rows, _ in touched]), sorted=True, return_inverse=True)
    grad_AD = torch.cat([grad for _, grad in touched])
    return rows_V, grad_AD.new_zeros(len(rows_V), grad_AD.shape[1]).index_add(0, place_A, grad_AD)
