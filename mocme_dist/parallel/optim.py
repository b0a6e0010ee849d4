"""Optimizers of table rows: they update the rows of a step in place and leave all others as they are, bit for bit.

"adam" keeps two moments of D numbers per row, "adagrad" one number per row. State takes memory page by page, as rows
are first touched. Rows may be bfloat16: arithmetic is float32 and the result is rounded stochastically, so that
updates smaller than half a digit are right on average; the random bits are a function of (seed, step, id, column)
alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mocme_dist.kernels.row_update import BETAS, EPSILON, RowUpdate, make_control

# Entities up to which "auto" means Adam: its moments are twice as large as the table, Adagrad's sums 1 / D of it.
ADAM_LIMIT = 1_000_000
# Rows updated at a time: the temporaries of a step that touches all rows stay small beside the table.
_BLOCK = 16_384
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def choose_optimizer(choice: str, num_entities: int) -> str:
    """Return the optimizer that "auto" stands for at this number of entities; other choices stand for themselves."""
    if choice != "auto":
        return choice
    return "adam" if num_entities <= ADAM_LIMIT else "adagrad"


def state_widths(optimizer: str, width: int) -> dict[str, int]:
    """Return the float32 numbers per row of each state tensor."""
    return {"adam": {"first_moment": width, "second_moment": width}, "adagrad": {"square_sum": 1}}[optimizer]


def lazy_zeros(num_rows: int, columns: int, device: torch.device | str) -> Tensor:
    """Return (num_rows, columns) float32 zeros; on the CPU they take memory as they are written, torch's at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(num_rows, columns, device=device)
    return torch.from_numpy(np.zeros((num_rows, columns), dtype=np.float32))


class RowOptimizer:
    """An optimizer of rows with its settings and state.

    Args:
        kind: "adam" or "adagrad".
        num_rows, width: of the shard. device: of the state.
        learning_rate, weight_decay: of the rows; decay is an L2 term on the rows of a step.
        seed: of the rounding of bfloat16 rows. first: id of local row 0.
        fused: kernel that updates float32 rows instead of torch.
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
        self.factor = 1.0  # multiplies the learning rate; set by the schedule
        self.kind, self.seed, self.first = kind, seed, first
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.state = {
            name: lazy_zeros(num_rows, columns, device) for name, columns in state_widths(kind, width).items()
        }

    def update(self, rows_rD: Tensor, rows_V: Tensor, grad_VD: Tensor, step: Tensor, factor: Tensor) -> None:
        """Move rows along their gradient, in place.

        Args:
            rows_rD: the shard, float32 or bfloat16.
            rows_V: (V,) unique local rows.
            grad_VD: (V, D) float32 gradient.
            step: float64 scalar on the device, number of this update, from 1.
            factor: float64 scalar on the device that multiplies the gradient; 0 changes nothing, whatever the gradient.
        """
        rate = self.learning_rate * self.factor
        if self.fused is not None and rows_rD.dtype == torch.float32:
            control = make_control(factor, step, torch.full_like(step, rate))
            self.fused(self.kind, rows_rD, self.state, rows_V, grad_VD, control, self.weight_decay)
            return
        moves = factor > 0
        for begin in range(0, len(rows_V), _BLOCK):
            part_V, part_VD = rows_V[begin : begin + _BLOCK], grad_VD[begin : begin + _BLOCK] * factor
            before_VD = rows_rD.index_select(0, part_V)
            value_VD = before_VD.float()
            if self.weight_decay:
                part_VD = part_VD + self.weight_decay * value_VD
            direction_VD = (self._adam if self.kind == "adam" else self._adagrad)(part_V, part_VD, step, moves)
            value_VD = value_VD.sub(direction_VD, alpha=rate)
            if rows_rD.dtype == torch.bfloat16:
                value_VD = round_at_random(value_VD, part_V + self.first, self.seed, step.long())
            rows_rD[part_V] = torch.where(moves, value_VD, before_VD)

    def _adam(self, rows_V: Tensor, grad_VD: Tensor, step: Tensor, moves: Tensor) -> Tensor:
        beta1, beta2 = BETAS
        before1_VD, before2_VD = self.state["first_moment"][rows_V], self.state["second_moment"][rows_V]
        first_VD = torch.lerp(before1_VD, grad_VD, 1 - beta1)
        second_VD = torch.lerp(before2_VD, grad_VD.square(), 1 - beta2)
        self.state["first_moment"][rows_V] = torch.where(moves, first_VD, before1_VD)
        self.state["second_moment"][rows_V] = torch.where(moves, second_VD, before2_VD)
        correction1, root2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        return (first_VD / correction1) / (second_VD.sqrt() / root2 + EPSILON["adam"])

    def _adagrad(self, rows_V: Tensor, grad_VD: Tensor, _step: Tensor, moves: Tensor) -> Tensor:
        before_V1 = self.state["square_sum"][rows_V]
        square_V1 = before_V1 + grad_VD.square().mean(1, keepdim=True)
        self.state["square_sum"][rows_V] = torch.where(moves, square_V1, before_V1)
        return grad_VD / (square_V1.sqrt() + EPSILON["adagrad"])


def _mix(value: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64, which wraps: a bijection whose output bits depend on all input bits."""
    value = value + _GOLDEN
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MIX1
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MIX2
    return value ^ ((value >> 31) & (2**33 - 1))


def random_bits(ids_V: Tensor, width: int, seed: int, step: int | Tensor) -> Tensor:
    """Return (V, width) int32 uniform in [0, 65536), a function of (seed, step, id, column) alone."""
    key = _mix(_mix(ids_V.new_full((1,), seed)) ^ step)
    # One 64-bit number serves four columns.
    words = torch.arange(-(-width // 4), device=ids_V.device)
    bits = _mix(_mix(ids_V ^ key)[:, None] ^ words)
    return bits.view(torch.int16)[:, :width].int() & 0xFFFF


def round_at_random(value_VD: Tensor, ids_V: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """Round float32 values stochastically to bfloat16 neighbours, so that the expected result is the value.

    The 16 bits that bfloat16 drops are a fraction of its last digit; a uniform 16-bit number is added before they are
    cut.
    """
    bits_VD = value_VD.contiguous().view(torch.int32) + random_bits(ids_V, value_VD.shape[1], seed, step)
    return (bits_VD & -0x10000).view(torch.float32).bfloat16()
