"""The table's row updates by kernels, rows.cpp or rows_triton: what `parallel.optim` computes in torch, in one pass over the rows."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from mocme_dist.model.native import call, library
from mocme_dist.model.pool import has_kernels
from mocme_dist.parallel.optim import BETAS, EPSILON, RowUpdate

_SOURCE = Path(__file__).with_name("rows.cpp")


def row_update(device_type: str) -> RowUpdate | None:
    """The update of float32 rows on this kind of device; None where torch must do it."""
    if device_type == "cuda" and has_kernels("cuda"):
        from mocme_dist.training.rows_triton import move_rows  # there is no Triton beside torch's CPU build

        return move_rows
    return _update if device_type == "cpu" and library(_SOURCE) is not None else None


def _update(
    kind: str, rows_rD: Tensor, state: dict[str, Tensor], rows_V: Tensor, grad_VD: Tensor, rate: float, decay: float, step: int
) -> None:
    """See `RowUpdate`."""
    rows_V, grad_VD = rows_V.contiguous(), grad_VD.contiguous()
    names = ("first_moment", "second_moment") if kind == "adam" else ("square_sum",)
    numbers = [rate, decay]
    if kind == "adam":
        numbers += [1 - BETAS[0], 1 - BETAS[1], 1 - BETAS[0] ** step, math.sqrt(1 - BETAS[1] ** step)]
    arrays = (rows_rD, *(state[name] for name in names), rows_V, grad_VD)
    call(library(_SOURCE), f"mocme_rows_{kind}", arrays, tuple(grad_VD.shape), (*numbers, EPSILON[kind]))
