"""Distances of queries to a pool of candidates that they share; the (B, N, C) differences are never stored.

Forward reduces them on the fly, backward recomputes them. Four forms of one function, held to each other by
tests/model/test_pool.py and test_on_gpu.py: the plain one, the C++ kernels of pool.cpp (CPU), the Triton kernels of
pool_triton (CUDA), and what torch.compile makes of the same arithmetic (where neither can be built). As operators of
torch the kernels stand in a compiled graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mocme_dist.model.native import call, library
from mocme_dist.model.rotate import TINY, distance

_SOURCE = Path(__file__).with_name("pool.cpp")


@torch.library.custom_op("mocme_dist::pool_distance", mutates_args=(), device_types="cpu", schema="(Tensor query, Tensor pool) -> Tensor")
def _native_distance(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances by the C++ kernel; float32, contiguous."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    out_GbN = query_GbD.new_empty(G, b, N)
    call(library(_SOURCE), "mocme_pool_distance", (query_GbD, pool_GND, out_GbN), (G, b, N, D // 2))
    return out_GbN


@torch.library.custom_op(
    "mocme_dist::pool_pull", mutates_args=(), device_types="cpu", schema="(Tensor query, Tensor pool, Tensor slope) -> (Tensor, Tensor)"
)
def _native_pull(query_GbD: Tensor, pool_GND: Tensor, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (G, b, D) of the queries and (G, N, D) of the candidates from those of the distances."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    slope_GbN = slope_GbN.contiguous()
    grad_query_GbD, grad_pool_GND = torch.empty_like(query_GbD), torch.empty_like(pool_GND)
    tensors = (query_GbD, pool_GND, slope_GbN, grad_query_GbD, grad_pool_GND)
    call(library(_SOURCE), "mocme_pool_pull", tensors, (G, b, N, D // 2))
    return grad_query_GbD, grad_pool_GND


@_native_distance.register_fake
def _(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    return query_GbD.new_empty(query_GbD.shape[0], query_GbD.shape[1], pool_GND.shape[1])


@_native_pull.register_fake
def _(query_GbD: Tensor, pool_GND: Tensor, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_GbD), torch.empty_like(pool_GND)


def _save_inputs(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


_native_distance.register_autograd(lambda ctx, slope_GbN: _native_pull(*ctx.saved_tensors, slope_GbN), setup_context=_save_inputs)


def _distance_to_pool(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances of every query to every candidate of its chunk, for the compiler."""
    C = query_GbD.shape[-1] // 2
    difference_GbND = query_GbD[:, :, None] - pool_GND[:, None]
    square = difference_GbND[..., :C].square() + difference_GbND[..., C:].square()
    return square.sqrt().sum(-1)


def _pull(query_GDb: Tensor, pool_GDN: Tensor, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over n of slope * (q - t) / |q - t|, real and imaginary parts, each (G, C, b), for the compiler.

    Transposed inputs make N the contiguous axis: the reduction vectorises, which is 12 times faster on a CPU than
    summing over the middle axis of (b, N, C).
    """
    C = query_GDb.shape[1] // 2
    real = query_GDb[:, :C, :, None] - pool_GDN[:, :C, None]
    imaginary = query_GDb[:, C:, :, None] - pool_GDN[:, C:, None]
    scaled = slope_GbN[:, None] * (real.square() + imaginary.square()).clamp_min(TINY).rsqrt()
    return (scaled * real).sum(-1), (scaled * imaginary).sum(-1)


class _FusedDistance(torch.autograd.Function):
    """Distances whose backward recomputes the differences; saves the inputs only."""

    @staticmethod
    def forward(ctx, query_GbD: Tensor, pool_GND: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """(G, b, N) distances."""
        ctx.save_for_backward(query_GbD, pool_GND)
        return _distance_to_pool(query_GbD, pool_GND)

    @staticmethod
    def backward(ctx, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Gradients of queries and candidates."""
        query_GbD, pool_GND = ctx.saved_tensors
        query_GDb, pool_GDN = query_GbD.mT.contiguous(), pool_GND.mT.contiguous()
        grad_query = torch.cat(_pull(query_GDb, pool_GDN, slope_GbN.contiguous()), dim=1).mT
        grad_pool = torch.cat(_pull(pool_GDN, query_GDb, slope_GbN.mT.contiguous()), dim=1).mT
        return grad_query, grad_pool


@torch.compiler.assume_constant_result
def has_kernels(device_type: str) -> bool:
    """Whether distances on this kind of device come from kernels of our own."""
    if device_type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device_type == "cpu" and library(_SOURCE) is not None


def _kernels_of(device_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    if device_type == "cpu":
        return _native_distance
    from mocme_dist.model.pool_triton import distance_to_pools  # there is no Triton beside torch's CPU build

    return distance_to_pools


@cache
def _compiled_distance():  # type: ignore[no-untyped-def]
    return torch.compile(_FusedDistance.apply, dynamic=False, fullgraph=True)


def pool_distance(query_GbD: Tensor, pool_GND: Tensor, compiled: bool) -> Tensor:
    """(G, b, N) float32 distances of each query to the candidates its chunk shares.

    Args:
        query_GbD: (G, b, D) rotated sources.
        pool_GND: (G, N, D) candidates of each chunk.
        compiled: the fused kernels, or the plain form that stores (G, b, N, D).
    """
    if not compiled:
        return distance(query_GbD[:, :, None], pool_GND[:, None])
    query_GbD, pool_GND = query_GbD.float().contiguous(), pool_GND.float().contiguous()
    if has_kernels(query_GbD.device.type):
        return _kernels_of(query_GbD.device.type)(query_GbD, pool_GND)
    # Inside a graph that is being compiled, the graph's own compiler fuses it.
    return _FusedDistance.apply(query_GbD, pool_GND) if torch.compiler.is_compiling() else _compiled_distance()(query_GbD, pool_GND)
