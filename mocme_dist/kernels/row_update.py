"""Kernels for the table's row updates, rows.cpp and rows_triton: one pass over rows, state and gradient.

`mocme_dist.parallel.optim` has the same arithmetic in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mocme_dist.kernels.builder import FOLDER, call, library
from mocme_dist.kernels.distance import has_kernels

BETAS = (0.9, 0.999)
EPSILON = {"adam": 1e-8, "adagrad": 1e-10}
# Updates float32 rows in place, as `RowOptimizer.update` does: kind, rows, state, unique local rows (negative ones are
# padding and are left out), gradient, control (see `make_control`), decay.
RowUpdate = Callable[[str, Tensor, dict[str, Tensor], Tensor, Tensor, Tensor, float], None]

_SOURCE = FOLDER / "rows.cpp"


def row_update(device_type: str) -> RowUpdate | None:
    """Return the kernel for float32 rows on this kind of device, or None if torch must update them."""
    if device_type == "cuda" and has_kernels("cuda"):
        from mocme_dist.kernels.rows_triton import update_rows  # torch's CPU build comes without Triton

        return update_rows
    return _update_rows if device_type == "cpu" and library(_SOURCE) is not None else None


def make_control(factor: Tensor, step: Tensor, rate: Tensor) -> Tensor:
    """Return what changes from step to step, for the kernels: (4,) float32 on the device, so that no host knows it.

    Args:
        factor: float64 scalar that multiplies the gradient; 0 makes the kernels change nothing.
        step: float64 scalar, number of this update, from 1.
        rate: float64 scalar, the learning rate.
    """
    beta1, beta2 = BETAS
    return torch.stack([factor, rate, 1 - beta1**step, (1 - beta2**step).sqrt()]).float()


def _update_rows(
    kind: str, rows_rD: Tensor, state: dict[str, Tensor], rows_V: Tensor, grad_VD: Tensor, control: Tensor, decay: float
) -> None:
    """See `RowUpdate`."""
    names = ("first_moment", "second_moment") if kind == "adam" else ("square_sum",)
    numbers = [decay, 1 - BETAS[0], 1 - BETAS[1]] if kind == "adam" else [decay]
    numbers.append(EPSILON[kind])
    arrays = (rows_rD, *(state[name] for name in names), rows_V.contiguous(), grad_VD.contiguous(), control)
    call(library(_SOURCE), f"mocme_rows_{kind}", arrays, grad_VD.shape, numbers, torch.get_num_threads())
