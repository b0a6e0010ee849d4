"""The row-wise optimizers of parallel/optim.py on CUDA, in Triton; one row per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mocme_dist.kernels.row_update import BETAS, EPSILON


@triton.jit
def _adam_kernel(  # type: ignore[no-untyped-def]
    rows,
    first,
    second,
    index,
    grad,
    control,
    D,
    DECAY: tl.constexpr,
    MOVE1: tl.constexpr,
    MOVE2: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.arange(0, COLUMNS)
    number, factor = tl.load(index + tl.program_id(0)), tl.load(control)
    # A skipped step and padding change nothing: all loads and stores are masked.
    inside = (at < D) & (number >= 0) & (factor != 0)
    place = number * D + at
    row = tl.load(rows + place, inside, 0.0)
    gradient = tl.load(grad + tl.program_id(0).to(tl.int64) * D + at, inside, 0.0) * factor + DECAY * row
    mean, square = tl.load(first + place, inside, 0.0), tl.load(second + place, inside, 0.0)
    mean += MOVE1 * (gradient - mean)
    square += MOVE2 * (gradient * gradient - square)
    rate, correction1, root2 = tl.load(control + 1), tl.load(control + 2), tl.load(control + 3)
    tl.store(first + place, mean, inside)
    tl.store(second + place, square, inside)
    tl.store(rows + place, row - rate * ((mean / correction1) / (tl.sqrt_rn(square) / root2 + EPS)), inside)


@triton.jit
def _adagrad_kernel(  # type: ignore[no-untyped-def]
    rows, square_sum, index, grad, control, D, DECAY: tl.constexpr, EPS: tl.constexpr, COLUMNS: tl.constexpr
):
    at = tl.arange(0, COLUMNS)
    number, factor = tl.load(index + tl.program_id(0)), tl.load(control)
    moves = (number >= 0) & (factor != 0)
    inside = (at < D) & moves
    place = number * D + at
    row = tl.load(rows + place, inside, 0.0)
    gradient = tl.load(grad + tl.program_id(0).to(tl.int64) * D + at, inside, 0.0) * factor + DECAY * row
    total = tl.load(square_sum + number, moves, 0.0) + tl.sum(gradient * gradient, 0) / D
    tl.store(square_sum + number, total, moves)
    tl.store(rows + place, row - tl.load(control + 1) * gradient / (tl.sqrt_rn(total) + EPS), inside)


def update_rows(
    kind: str, rows_rD: Tensor, state: dict[str, Tensor], rows_V: Tensor, grad_VD: Tensor, control: Tensor, decay: float
) -> None:
    """See `RowUpdate`."""
    if not len(rows_V):
        return
    D, grid = grad_VD.shape[1], (len(rows_V),)
    rows_V, grad_VD = rows_V.contiguous(), grad_VD.contiguous()
    fixed = {"DECAY": decay, "EPS": EPSILON[kind], "COLUMNS": triton.next_power_of_2(D), "num_warps": 4}
    if kind == "adagrad":
        _adagrad_kernel[grid](rows_rD, state["square_sum"], rows_V, grad_VD, control, D, **fixed)
        return
    beta1, beta2 = BETAS
    moments = (state["first_moment"], state["second_moment"])
    _adam_kernel[grid](rows_rD, *moments, rows_V, grad_VD, control, D, MOVE1=1 - beta1, MOVE2=1 - beta2, **fixed)
