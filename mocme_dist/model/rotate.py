"""RotatE: rotation of a source by a relation's phases, and the distance to candidates.

A vector of D real numbers holds C = D / 2 complex ones: the first C columns are real parts, the last C imaginary.
A head query is a tail query with the phase negated, because |h e^(i theta) - t| = |h - t e^(-i theta)|, so there is
one form of query. The distance to shared candidates never stores the (B, N, C) differences: forward reduces them on
the fly, and backward recomputes them in a layout whose inner axis is the one that is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError

# Squared moduli below this have no direction: their gradient is 0 instead of infinite.
_TINY = 1e-24


class Relations(nn.Module):
    """Phases (R, C) of the relations in radians, uniform in [-pi, pi] at the start."""

    def __init__(self, num_relations: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.phase_RC = nn.Parameter((torch.rand(num_relations, width // 2, generator=generator) * 2 - 1) * math.pi)

    def forward(self, relation: Tensor) -> Tensor:
        """Phases of relation ids of any shape: (..., C)."""
        return self.phase_RC[relation]


def rotate(source_BD: Tensor, phase_BC: Tensor, sign_B: Tensor) -> Tensor:
    """Rotate each source by its relation: by the phase for tail queries, against it for head queries.

    Args:
        source_BD: (..., D) sources.
        phase_BC: (..., C) phases in radians, any real value.
        sign_B: (...) +1 for tail queries, -1 for head queries.

    Returns:
        (..., D) float32 whatever the inputs' type.

    Raises:
        ShapeError: D is not 2 * C.
    """
    C = phase_BC.shape[-1]
    if source_BD.shape[-1] != 2 * C:
        raise ShapeError(f"rotate: source_BD has width {source_BD.shape[-1]}, expected 2 * C = {2 * C}")
    real, imaginary = source_BD.float().split(C, dim=-1)
    angle = phase_BC.float() * sign_B[..., None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def distance(query_BD: Tensor, candidate_BD: Tensor) -> Tensor:
    """(...) sum over C of complex moduli between vectors of broadcastable shapes (..., D); the plain form.

    Source: RotatE, Sun et al. 2019, section 3; checked against complex arithmetic in tests/model/test_rotate.py.
    """
    C = query_BD.shape[-1] // 2
    difference = query_BD.float() - candidate_BD.float()
    square = difference[..., :C].square() + difference[..., C:].square()
    return square.clamp_min(_TINY).sqrt().sum(-1)


def _distance_to_pool(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances of every query to every candidate of its chunk."""
    C = query_GbD.shape[-1] // 2
    difference_GbND = query_GbD[:, :, None] - pool_GND[:, None]
    square = difference_GbND[..., :C].square() + difference_GbND[..., C:].square()
    return square.sqrt().sum(-1)


def _pull(query_GDb: Tensor, pool_GDN: Tensor, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over n of slope * (q - t) / |q - t|, real and imaginary parts, each (G, C, b).

    Transposed inputs make N the contiguous axis: the reduction vectorises, which is 12 times faster here than
    summing over the middle axis of (b, N, C).
    """
    C = query_GDb.shape[1] // 2
    real = query_GDb[:, :C, :, None] - pool_GDN[:, :C, None]
    imaginary = query_GDb[:, C:, :, None] - pool_GDN[:, C:, None]
    scaled = slope_GbN[:, None] * (real.square() + imaginary.square()).clamp_min(_TINY).rsqrt()
    return (scaled * real).sum(-1), (scaled * imaginary).sum(-1)


@cache
def _kernel(name: str, compiled: bool) -> Callable:
    function: Callable = _distance_to_pool if name == "distance" else _pull
    # Batches have fixed shapes; evaluation adds a handful more. Dynamic shapes would cost speed at every step.
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


class _PoolDistance(torch.autograd.Function):
    """Distances to shared candidates; saves the inputs only, memory O(B N + (B + N) D)."""

    @staticmethod
    def forward(ctx, query_GbD: Tensor, pool_GND: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """(G, b, N) distances."""
        ctx.save_for_backward(query_GbD, pool_GND)
        return _kernel("distance", True)(query_GbD, pool_GND)

    @staticmethod
    def backward(ctx, slope_GbN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients of queries and candidates, where they are needed."""
        query_GbD, pool_GND = ctx.saved_tensors
        query_GDb, pool_GDN = query_GbD.mT.contiguous(), pool_GND.mT.contiguous()
        pull = _kernel("pull", True)
        grad_query = grad_pool = None
        if ctx.needs_input_grad[0]:
            grad_query = torch.cat(pull(query_GDb, pool_GDN, slope_GbN.contiguous()), dim=1).mT
        if ctx.needs_input_grad[1]:
            grad_pool = torch.cat(pull(pool_GDN, query_GDb, slope_GbN.mT.contiguous()), dim=1).mT
        return grad_query, grad_pool


def pool_distance(query_GbD: Tensor, pool_GND: Tensor, compiled: bool) -> Tensor:
    """(G, b, N) float32 distances of each query to the candidates its chunk shares.

    Args:
        query_GbD: (G, b, D) rotated sources.
        pool_GND: (G, N, D) candidates of each chunk.
        compiled: the fused kernels, or the plain form that stores (G, b, N, D).
    """
    if compiled:
        return _PoolDistance.apply(query_GbD.float().contiguous(), pool_GND.float().contiguous())
    return distance(query_GbD[:, :, None], pool_GND[:, None])
