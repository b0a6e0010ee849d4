"""Optimizers of table rows: they move the rows of a step, in place, and leave all others bit for bit.

"adam" keeps two moments of D numbers a row, "adagrad" one number a row. State takes memory page by page, as rows are
first touched. Rows may be bfloat16: arithmetic is float32 and the result is rounded up or down at random, so that updates
below half a digit are right on average; the random bits are a function of (seed, step, id, column) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# "auto" takes Adam up to here: its moments are twice the table, Adagrad's sums 1 / D of it.
ADAM_LIMIT = 1_000_000
BETAS = (0.9, 0.999)
EPSILON = {"adam": 1e-8, "adagrad": 1e-10}
# A fused form of `RowOptimizer.update` for float32 rows: kind, rows, state, local rows, gradient, rate, decay, step.
# This package builds no kernels; who does passes one in.
RowUpdate = Callable[[str, Tensor, dict[str, Tensor], Tensor, Tensor, float, float, int], None]
# Rows updated at a time: the temporaries of a step that touches all rows stay small beside the table.
_BLOCK = 16_384
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def choose_optimizer(choice: str, num_entities: int) -> str:
    """What "auto" stands for with so many entities; anything else stands for itself."""
    if choice != "auto":
        return choice
    return "adam" if num_entities <= ADAM_LIMIT else "adagrad"


def state_widths(optimizer: str, width: int) -> dict[str, int]:
    """Float32 numbers a row of each state tensor."""
    return {"adam": {"first_moment": width, "second_moment": width}, "adagrad": {"square_sum": 1}}[optimizer]


def lazy_zeros(num_rows: int, columns: int, device: torch.device | str) -> Tensor:
    """(num_rows, columns) float32 zeros; on the CPU they take memory as they are written to, which torch's do at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(num_rows, columns, device=device)
    return torch.from_numpy(np.zeros((num_rows, columns), dtype=np.float32))


class RowOptimizer:
    """One kind of update, its settings and its state.

    Args:
        kind: "adam" or "adagrad".
        num_rows, width: of the shard. device: where the state lives.
        learning_rate, weight_decay: of the rows; decay is an L2 term of touched rows.
        seed, first: of the rounding of bfloat16 rows, and the id of local row 0.
        fused: moves float32 rows in place of torch.
    """

    def __init__(
        self,
        kind: str,
        num_rows: int,
        width: int,
        *,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        first: int,
        device: torch.device | str,
        fused: RowUpdate | None = None,
    ) -> None:
        self.fused = fused
        self.kind, self.learning_rate, self.weight_decay, self.seed, self.first = kind, learning_rate, weight_decay, seed, first
        self.state = {name: lazy_zeros(num_rows, columns, device) for name, columns in state_widths(kind, width).items()}

    def update(self, rows_rD: Tensor, rows_V: Tensor, grad_VD: Tensor, step: int) -> None:
        """Move rows along their gradient, in place.

        Args:
            rows_rD: the shard, float32 or bfloat16.
            rows_V: (V,) unique local rows.
            grad_VD: (V, D) float32 gradient.
            step: number of this update, from 1.
        """
        if self.fused is not None and rows_rD.dtype == torch.float32:
            self.fused(self.kind, rows_rD, self.state, rows_V, grad_VD, self.learning_rate, self.weight_decay, step)
            return
        for begin in range(0, len(rows_V), _BLOCK):
            part_V, part_VD = rows_V[begin : begin + _BLOCK], grad_VD[begin : begin + _BLOCK]
            value_VD = rows_rD.index_select(0, part_V).float()
            if self.weight_decay:
                part_VD = part_VD + self.weight_decay * value_VD
            direction_VD = (self._adam if self.kind == "adam" else self._adagrad)(part_V, part_VD, step)
            value_VD = value_VD.sub_(direction_VD, alpha=self.learning_rate)
            if rows_rD.dtype == torch.bfloat16:
                rows_rD[part_V] = round_at_random(value_VD, part_V + self.first, self.seed, step)
            else:
                rows_rD[part_V] = value_VD

    def _adam(self, rows_V: Tensor, grad_VD: Tensor, step: int) -> Tensor:
        beta1, beta2 = BETAS
        first_VD = torch.lerp(self.state["first_moment"][rows_V], grad_VD, 1 - beta1)
        second_VD = torch.lerp(self.state["second_moment"][rows_V], grad_VD.square(), 1 - beta2)
        self.state["first_moment"][rows_V], self.state["second_moment"][rows_V] = first_VD, second_VD
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        return (first_VD / correction1) / (second_VD.sqrt() / math.sqrt(correction2) + EPSILON["adam"])

    def _adagrad(self, rows_V: Tensor, grad_VD: Tensor, _step: int) -> Tensor:
        square_V1 = self.state["square_sum"][rows_V] + grad_VD.square().mean(1, keepdim=True)
        self.state["square_sum"][rows_V] = square_V1
        return grad_VD / (square_V1.sqrt() + EPSILON["adagrad"])


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps: a bijection whose output bits depend on all input bits."""
    value = value + _GOLDEN
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MIX1
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MIX2
    return value ^ ((value >> 31) & (2**33 - 1))


def random_bits(ids_V: Tensor, width: int, seed: int, step: int) -> Tensor:
    """(V, width) int32 in [0, 65536): uniform, a function of (seed, step, id, column) alone."""
    key = _mix(_mix(torch.tensor([seed], device=ids_V.device)) ^ step)
    # One 64-bit number serves four columns.
    words = torch.arange(-(-width // 4), device=ids_V.device)
    bits_VW = _mix(_mix(ids_V ^ key)[:, None] ^ words)
    return bits_VW.view(torch.int16)[:, :width].int() & 0xFFFF


def round_at_random(value_VD: Tensor, ids_V: Tensor, seed: int, step: int) -> Tensor:
    """(V, D) bfloat16 neighbours of float32 values, the nearer one the likelier: the mean is the value.

    The 16 bits that bfloat16 drops are a fraction of its last digit; a uniform 16-bit number is added before they go.
    """
    bits_VD = value_VD.contiguous().view(torch.int32) + random_bits(ids_V, value_VD.shape[1], seed, step)
    return (bits_VD & -0x10000).view(torch.float32).bfloat16()
