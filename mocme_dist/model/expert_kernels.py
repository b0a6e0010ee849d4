"""All experts by the C++ kernels of experts.cpp: what `experts` computes in torch, hidden units never stored.

Backward makes them again from the inputs. Products multiply bfloat16, or its three products in place of float32's, by AMX
and add float32; products of float32 itself are as fast in torch, and no kernel is used.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocme_dist.model.native import call, library
from mocme_dist.model.precision import INSTRUCTIONS

_SOURCE = Path(__file__).with_name("experts.cpp")


@cache
def _kernels(precision: str) -> ctypes.CDLL | None:
    found = library(_SOURCE, INSTRUCTIONS[precision])
    if found is not None:
        found.mocme_experts_pad.restype = ctypes.c_int64
    return found


def _pad(precision: str) -> int:
    """Multiple that widths must be of; 0 where there are no kernels."""
    found = _kernels(precision)
    return 0 if found is None else int(found.mocme_experts_pad())


def has_kernels(x_MUD: Tensor, precision: str) -> bool:
    """Whether products of these inputs come from the kernels; never those of float32."""
    if precision == "float32" or x_MUD.device.type != "cpu" or x_MUD.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    pad = _pad(precision)
    return pad > 0 and x_MUD.shape[-1] % pad == 0


class _Views(torch.autograd.Function):
    """Views of inputs and parameters; keeps those alone."""

    @staticmethod
    def forward(ctx: Any, precision: str, residual: bool, x_MUD: Tensor, *parameters: Tensor) -> Tensor:
        """(M, K, U, D)."""
        (M, U, D), K = x_MUD.shape, parameters[0].shape[2] // x_MUD.shape[2]
        tensors = tuple(value.contiguous() for value in (x_MUD, *parameters))
        views = torch.empty(M, K, U, D)
        call(_kernels(precision), "mocme_experts_forward", (*tensors, views), (M, K, U, D, int(residual)))
        ctx.save_for_backward(*tensors)
        ctx.precision, ctx.residual = precision, residual
        return views

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Of the inputs and of the parameters."""
        tensors = ctx.saved_tensors
        grads = [torch.zeros_like(value) for value in tensors]
        sizes = (*slope.shape, int(ctx.residual))
        call(_kernels(ctx.precision), "mocme_experts_backward", (*tensors[:4], slope.contiguous(), *grads), sizes)
        return None, None, *grads


def views_by_kernels(x_MUD: Tensor, parameters: tuple[Tensor, ...], precision: str, residual: bool) -> Tensor:
    """Views (M, K, U, D) of inputs (M, U, D).

    Args:
        x_MUD: see `has_kernels`.
        parameters: first layers and biases, second layers and biases, as `Experts` holds them.
        precision: of the products. residual: add the inputs.
    """
    return _Views.apply(precision, residual, x_MUD, *parameters)  # type: ignore[no-any-return]
