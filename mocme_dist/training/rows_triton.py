"""The row-wise optimizers of parallel/optim.py on CUDA, in Triton: what rows.cpp does on a CPU. A program moves one row."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mocme_dist.parallel.optim import BETAS, EPSILON


@triton.jit
def _adam_kernel(  # type: ignore[no-untyped-def]
    rows,
    first,
    second,
    index,
    grad,
    rate,
    correction1,
    root2,
    D,
    DECAY: tl.constexpr,
    MOVE1: tl.constexpr,
    MOVE2: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.arange(0, COLUMNS)
    inside = at < D
    place = tl.load(index + tl.program_id(0)) * D + at
    row = tl.load(rows + place, inside, 0.0)
    slope = tl.load(grad + tl.program_id(0).to(tl.int64) * D + at, inside, 0.0) + DECAY * row
    mean, square = tl.load(first + place, inside, 0.0), tl.load(second + place, inside, 0.0)
    mean += MOVE1 * (slope - mean)
    square += MOVE2 * (slope * slope - square)
    tl.store(first + place, mean, inside)
    tl.store(second + place, square, inside)
    tl.store(rows + place, row - rate * ((mean / correction1) / (tl.sqrt_rn(square) / root2 + EPS)), inside)


@triton.jit
def _adagrad_kernel(rows, square_sum, index, grad, rate, D, DECAY: tl.constexpr, EPS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COLUMNS)
    inside = at < D
    number = tl.load(index + tl.program_id(0))
    place = number * D + at
    row = tl.load(rows + place, inside, 0.0)
    slope = tl.load(grad + tl.program_id(0).to(tl.int64) * D + at, inside, 0.0) + DECAY * row
    total = tl.load(square_sum + number) + tl.sum(slope * slope, 0) / D
    tl.store(square_sum + number, total)
    tl.store(rows + place, row - rate * slope / (tl.sqrt_rn(total) + EPS), inside)


def move_rows(
    kind: str, rows_rD: Tensor, state: dict[str, Tensor], rows_V: Tensor, grad_VD: Tensor, rate: float, decay: float, step: int
) -> None:
    """See `RowUpdate`."""
    if not len(rows_V):
        return
    rows_V, grad_VD, D = rows_V.contiguous(), grad_VD.contiguous(), grad_VD.shape[1]
    grid, fixed = (len(rows_V),), {"DECAY": decay, "EPS": EPSILON[kind], "COLUMNS": triton.next_power_of_2(D), "num_warps": 4}
    if kind == "adagrad":
        _adagrad_kernel[grid](rows_rD, state["square_sum"], rows_V, grad_VD, rate, D, **fixed)
        return
    beta1, beta2 = BETAS
    corrections = (1 - beta1**step, math.sqrt(1 - beta2**step))
    moments = (state["first_moment"], state["second_moment"])
    _adam_kernel[grid](rows_rD, *moments, rows_V, grad_VD, rate, *corrections, D, MOVE1=1 - beta1, MOVE2=1 - beta2, **fixed)
