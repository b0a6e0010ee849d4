"""The entity table: one rank's contiguous range of structural rows, with the optimizer that moves them.

It is no nn.Module and lives outside the engine: DeepSpeed broadcasts, averages, casts or partitions whatever a module
registers, and a row shard must see none of that. Rows of a step are a leaf tensor; `update` applies its gradient to
those rows only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mocme_dist.partition import RowPartition

_INIT_BLOCK = 4096


def initial_rows(first: int, last: int, width: int, init_range: float, seed: int) -> Tensor:
    """(last - first, D) float32 rows uniform in [-init_range, init_range], a function of (seed, id) alone.

    Made in blocks of fixed id ranges, each with its own counter-based stream, so every world size starts alike.
    """
    out = np.empty((last - first, width), dtype=np.float32)
    for block in range(first // _INIT_BLOCK, -(-last // _INIT_BLOCK) if last > first else 0):
        start = block * _INIT_BLOCK
        values = np.random.Generator(np.random.Philox(key=[seed, block])).random((_INIT_BLOCK, width), dtype=np.float32)
        begin, end = max(first, start), min(last, start + _INIT_BLOCK)
        out[begin - first : end - first] = (values[begin - start : end - start] * 2 - 1) * init_range
    return torch.from_numpy(out)


class EntityTable:
    """Rows [first, last) of E and their optimizer state.

    Args:
        partition: rows over ranks. rank: whose rows.
        width: D. init_range, seed: see `initial_rows`.
        optimizer: "adam" (two moments a row, D numbers each) or "adagrad" (one number a row).
        learning_rate, weight_decay: of the rows.
        device: where rows and state live.
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.partition, self.rank, self.width = partition, rank, width
        self.first, self.last = partition.bounds(rank)
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.num_updates = 0
        self.rows_rD = initial_rows(self.first, self.last, width, init_range, seed).to(device)
        shapes = {"adam": {"first_moment": width, "second_moment": width}, "adagrad": {"square_sum": 1}}[optimizer]
        self.state = {name: torch.zeros(self.last - self.first, columns, device=device) for name, columns in shapes.items()}

    def gather(self, rows_V: Tensor) -> Tensor:
        """(V, D) copies of local rows, a leaf that collects their gradient."""
        return self.rows_rD[rows_V].requires_grad_()

    def update(self, rows_V: Tensor, grad_VD: Tensor) -> None:
        """Move the rows along their gradient; rows that nobody asked for stay, bit for bit.

        Args:
            rows_V: (V,) unique local rows, as given to `gather`.
            grad_VD: (V, D) gradient of the global mean loss.
        """
        self.num_updates += 1
        if not len(rows_V):
            return
        value_VD = self.rows_rD[rows_V]
        if self.weight_decay:
            grad_VD = grad_VD + self.weight_decay * value_VD
        step = self._adam_step if self.optimizer == "adam" else self._adagrad_step
        self.rows_rD[rows_V] = value_VD - self.learning_rate * step(rows_V, grad_VD)

    def _adam_step(self, rows_V: Tensor, grad_VD: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Tensor:
        first_VD = torch.lerp(self.state["first_moment"][rows_V], grad_VD, 1 - beta1)
        second_VD = torch.lerp(self.state["second_moment"][rows_V], grad_VD.square(), 1 - beta2)
        self.state["first_moment"][rows_V], self.state["second_moment"][rows_V] = first_VD, second_VD
        correction1, correction2 = 1 - beta1**self.num_updates, 1 - beta2**self.num_updates
        return (first_VD / correction1) / (second_VD.sqrt() / math.sqrt(correction2) + eps)

    def _adagrad_step(self, rows_V: Tensor, grad_VD: Tensor, eps: float = 1e-10) -> Tensor:
        square_V1 = self.state["square_sum"][rows_V] + grad_VD.square().mean(1, keepdim=True)
        self.state["square_sum"][rows_V] = square_V1
        return grad_VD / (square_V1.sqrt() + eps)


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
