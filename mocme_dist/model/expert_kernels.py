"""All experts by the C++ kernels of experts.cpp: what `experts` computes in torch, hidden units never stored.

Backward makes them again from the inputs. Products multiply bfloat16 by AMX and add float32; in float32, torch's products
are as fast and no kernel is used.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocme_dist.model.native import call, library

_SOURCE = Path(__file__).with_name("experts.cpp")


@cache
def _kernels() -> ctypes.CDLL | None:
    found = library(_SOURCE, "AMX")
    if found is not None:
        found.mocme_experts_pad.restype = ctypes.c_int64
    return found


def _pad() -> int:
    """Multiple that widths must be of; 0 where there are no kernels."""
    found = _kernels()
    return 0 if found is None else int(found.mocme_experts_pad())


def has_kernels(x_MUD: Tensor) -> bool:
    """Whether bfloat16 products of these inputs come from the kernels."""
    if x_MUD.device.type != "cpu" or x_MUD.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    pad = _pad()
    return pad > 0 and x_MUD.shape[-1] % pad == 0


class _Views(torch.autograd.Function):
    """Views of inputs and parameters; keeps those alone."""

    @staticmethod
    def forward(ctx: Any, residual: bool, x_MUD: Tensor, *parameters: Tensor) -> Tensor:
        """(M, K, U, D)."""
        (M, U, D), K = x_MUD.shape, parameters[0].shape[2] // x_MUD.shape[2]
        tensors = tuple(value.contiguous() for value in (x_MUD, *parameters))
        views = torch.empty(M, K, U, D)
        call(_kernels(), "mocme_experts_forward", (*tensors, views), (M, K, U, D, int(residual)))
        ctx.save_for_backward(*tensors)
        ctx.residual = residual
        return views

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Of the inputs and of the parameters."""
        tensors = ctx.saved_tensors
        grads = [torch.zeros_like(value) for value in tensors]
        call(_kernels(), "mocme_experts_backward", (*tensors[:4], slope.contiguous(), *grads), (*slope.shape, int(ctx.residual)))
        return None, *grads


def views_by_kernels(x_MUD: Tensor, parameters: tuple[Tensor, ...], residual: bool) -> Tensor:
    """Views (M, K, U, D) of inputs (M, U, D).

    Args:
        x_MUD: see `has_kernels`.
        parameters: first layers and biases, second layers and biases, as `Experts` holds them.
        residual: add the inputs.
    """
    return _Views.apply(residual, x_MUD, *parameters)  # type: ignore[no-any-return]
