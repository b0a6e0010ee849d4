"""The RotatE distance in torch, and distances to a shared pool of candidates by the fastest form there is.

`distance` and `distance_backward` are the definition in torch; distance.h is the one in C++, distance_triton.py the
one in Triton. Loss, ranking and queries use these three. Distances to a pool never store the (B, N, C) differences:
forward reduces them on the fly, backward recomputes them, by the kernels of distance.cpp (CPU), those of
distance_triton (CUDA), or torch.compile (where neither can be built). tests/kernels/test_distance.py and
tests/model/test_on_gpu.py hold all forms to `distance`. The kernels are operators of torch, so a compiled graph may
contain them.

A vector of D real numbers holds C = D / 2 complex ones: the first C columns are real parts, the last C imaginary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mocme_dist.kernels.builder import FOLDER, call, library

# Squared moduli below this have no direction: their gradient is 0 instead of infinite.
TINY = 1e-24
_SOURCE = FOLDER / "distance.cpp"


def distance(query_BD: Tensor, candidate_BD: Tensor) -> Tensor:
    """(...) sum over C of complex moduli between vectors of broadcastable shapes (..., D); the plain form.

    Source: RotatE, Sun et al. 2019, section 3; checked against complex arithmetic in tests/model/test_rotate.py.
    """
    C = query_BD.shape[-1] // 2
    difference = query_BD.float() - candidate_BD.float()
    square = difference[..., :C].square() + difference[..., C:].square()
    return square.clamp_min(TINY).sqrt().sum(-1)


def distance_backward(query_GDb: Tensor, pool_GDN: Tensor, grad_out_GbN: Tensor) -> Tensor:
    """(G, D, b) sum over n of grad_out * (q - t) / |q - t|, the gradient of the queries.

    The inputs are transposed to make N the contiguous axis: the reduction then vectorises, which is 12 times faster
    on a CPU than summing over the middle axis of (b, N, C).
    """
    C = query_GDb.shape[1] // 2
    real = query_GDb[:, :C, :, None] - pool_GDN[:, :C, None]
    imaginary = query_GDb[:, C:, :, None] - pool_GDN[:, C:, None]
    scaled = grad_out_GbN[:, None] * (real.square() + imaginary.square()).clamp_min(TINY).rsqrt()
    return torch.cat([(scaled * real).sum(-1), (scaled * imaginary).sum(-1)], dim=1)


def pool_distance(query_GbD: Tensor, pool_GND: Tensor, compiled: bool) -> Tensor:
    """(G, b, N) float32 distances of each query to the candidates its chunk shares.

    Args:
        query_GbD: (G, b, D) rotated sources.
        pool_GND: (G, N, D) candidates of each chunk.
        compiled: use the fused forms, or the plain form that stores (G, b, N, D).
    """
    if not compiled:
        return distance(query_GbD[:, :, None], pool_GND[:, None])
    query_GbD, pool_GND = query_GbD.float().contiguous(), pool_GND.float().contiguous()
    if has_kernels(query_GbD.device.type):
        return _kernels_of(query_GbD.device.type)(query_GbD, pool_GND)
    # Inside a graph that is being compiled, the graph's own compiler fuses it.
    fused = _RecomputedDistance.apply if torch.compiler.is_compiling() else _compiled_distance()
    return fused(query_GbD, pool_GND)


@torch.compiler.assume_constant_result
def has_kernels(device_type: str) -> bool:
    """Return whether this package has working kernels for this kind of device."""
    if device_type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device_type == "cpu" and library(_SOURCE) is not None


def _kernels_of(device_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    if device_type == "cpu":
        return _cpu_distance
    from mocme_dist.kernels.distance_triton import distance_to_pools  # torch's CPU build comes without Triton

    return distance_to_pools


# ---- the kernels of distance.cpp as operators of torch
#
# Rename both operators when one changes: torch's cache of compiled graphs is keyed by the forward operator's name
# alone.


@torch.library.custom_op(
    "mocme_dist::distance_to_pool", mutates_args=(), device_types="cpu", schema="(Tensor query, Tensor pool) -> Tensor"
)
def _cpu_distance(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances of float32, contiguous vectors."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    out_GbN = query_GbD.new_empty(G, b, N)
    arrays = (query_GbD, pool_GND, out_GbN)
    call(library(_SOURCE), "mocme_pool_distance", arrays, (G, b, N, D // 2), threads=torch.get_num_threads())
    return out_GbN


@torch.library.custom_op(
    "mocme_dist::distance_to_pool_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor pool, Tensor grad_out) -> (Tensor, Tensor)",
)
def _cpu_backward(query_GbD: Tensor, pool_GND: Tensor, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (G, b, D) of the queries and (G, N, D) of the candidates."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    grad_query_GbD, grad_pool_GND = torch.empty_like(query_GbD), torch.empty_like(pool_GND)
    arrays = (query_GbD, pool_GND, grad_out_GbN.contiguous(), grad_query_GbD, grad_pool_GND)
    call(library(_SOURCE), "mocme_pool_distance_backward", arrays, (G, b, N, D // 2), threads=torch.get_num_threads())
    return grad_query_GbD, grad_pool_GND


@_cpu_distance.register_fake
def _(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    return query_GbD.new_empty(query_GbD.shape[0], query_GbD.shape[1], pool_GND.shape[1])


@_cpu_backward.register_fake
def _(query_GbD: Tensor, pool_GND: Tensor, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_GbD), torch.empty_like(pool_GND)


def save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Keep queries and candidates for the backward pass."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
    return _cpu_backward(*ctx.saved_tensors, grad_out_GbN)


_cpu_distance.register_autograd(_backward, setup_context=save_inputs)


# ---- where no kernel can be built


class _RecomputedDistance(torch.autograd.Function):
    """Distances whose backward pass recomputes the differences; it saves only the inputs. Made to be compiled."""

    @staticmethod
    def forward(ctx: Any, query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
        """(G, b, N) distances."""
        ctx.save_for_backward(query_GbD, pool_GND)
        return distance(query_GbD[:, :, None], pool_GND[:, None])

    @staticmethod
    def backward(ctx: Any, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of queries and candidates."""
        query_GbD, pool_GND = ctx.saved_tensors
        query_GDb, pool_GDN = query_GbD.mT.contiguous(), pool_GND.mT.contiguous()
        grad_query = distance_backward(query_GDb, pool_GDN, grad_out_GbN.contiguous())
        grad_pool = distance_backward(pool_GDN, query_GDb, grad_out_GbN.mT.contiguous())
        return grad_query.mT, grad_pool.mT


@cache
def _compiled_distance() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_RecomputedDistance.apply, dynamic=False, fullgraph=True)
