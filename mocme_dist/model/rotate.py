"""RotatE: rotation of a source by a relation's phases.

A vector of D real numbers holds C = D / 2 complex ones: the first C columns are real parts, the last C imaginary.
A head query is a tail query with the phase negated, because |h e^(i theta) - t| = |h - t e^(-i theta)|, so there is
one form of query. Distances to candidates are in `mocme_dist.kernels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError


class Relations(nn.Module):
    """Phases (R, C) of the relations in radians, initially uniform in [-pi, pi]."""

    def __init__(self, num_relations: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.phase_RC = nn.Parameter((torch.rand(num_relations, width // 2, generator=generator) * 2 - 1) * math.pi)

    def forward(self, relation: Tensor) -> Tensor:
        """Return the phases (..., C) of relation ids of any shape."""
        return self.phase_RC[relation]


def rotate(source_BD: Tensor, phase_BC: Tensor, sign_B: Tensor) -> Tensor:
    """Rotate each source by its relation: by the phase for tail queries, by the negated phase for head queries.

    Args:
        source_BD: (..., D) sources.
        phase_BC: (..., C) phases in radians, any real value.
        sign_B: (...) +1 for tail queries, -1 for head queries.

    Returns:
        (..., D) float32 for every input type.

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
