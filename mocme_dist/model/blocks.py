"""Blocks of a vector (late fusion): where each modality's block and the fused one lie, and how they are filled.

A vector of D real numbers holds C = D / 2 complex ones: first all real parts, then all imaginary parts. Blocks cut
the C complex columns into equal ranges, one per modality in their order and the last one for the fused ("mean")
vector. So the RotatE distance of whole vectors is the sum of the distances of their blocks, and code that needs only
the sum need not know about blocks. Only this module knows where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError
from mocme_dist.kernels.distance import pool_distance


class Blocks(NamedTuple):
    """`num` blocks of `width` real numbers each; a vector of one block is the fused vector alone."""

    num: int
    width: int

    @property
    def total(self) -> int:
        """D, the width of a vector."""
        return self.num * self.width


def make_blocks(form: str, num_modalities: int, width: int) -> Blocks:
    """Return the blocks of vectors of at most `width` numbers.

    Args:
        form: "sum", the fused vector alone, or "blocks". A model of one modality has one block in either form.
        num_modalities: M.
        width: D as configured; every block gets the same even number of columns.

    Raises:
        ShapeError: the width is too small for the blocks.
    """
    count = num_modalities + 1 if form == "blocks" and num_modalities > 1 else 1
    if width < 2 * count:
        raise ShapeError(
            f"blocks: a width of {width} holds no {count} blocks; set experts.width to {2 * count} or more"
        )
    return Blocks(count, width // (2 * count) * 2)


def split_blocks(vector_D: Tensor, count: int) -> Tensor:
    """Return vectors (..., D) as their blocks (count, ..., D / count), each with its real parts first."""
    return vector_D.unflatten(-1, (2, count, -1)).movedim(-2, 0).flatten(-2)


def split_phases(phase_C: Tensor, count: int) -> Tensor:
    """Return phases (..., C) as those of the blocks (count, ..., C / count)."""
    return phase_C.unflatten(-1, (count, -1)).movedim(-2, 0)


def join_blocks(block_SVd: Tensor) -> Tensor:
    """Return vectors (V, S d) of blocks (S, V, d); the inverse of `split_blocks`."""
    return block_SVd.unflatten(-1, (2, -1)).permute(1, 2, 0, 3).flatten(1)


def block_distances(query_QD: Tensor, candidate_ND: Tensor, count: int, compiled: bool = True) -> Tensor:
    """Return RotatE distances by block, (count, Q, N) float32; they sum to the distances of the whole vectors.

    Args:
        query_QD: (Q, D) rotated sources.
        candidate_ND: (N, D) candidates.
        count: number of blocks.
        compiled: use the fused kernels, or the plain form that stores (count, Q, N, D / count).
    """
    return pool_distance(split_blocks(query_QD, count), split_blocks(candidate_ND, count), compiled)


class LateFusion(nn.Module):
    """Joins each modality's vector, or a learned one where an entity lacks the modality, and the fused vector."""

    def __init__(self, num_modalities: int, width: int) -> None:
        super().__init__()
        self.absent_MD = nn.Parameter(torch.zeros(num_modalities, width))

    def forward(self, z_MVD: Tensor, present_MV: Tensor, z_VD: Tensor) -> Tensor:
        """Return (V, (M + 1) d) from vectors of modalities (M, V, d), presence (M, V) and fused vectors (V, d)."""
        own_MVD = torch.where(present_MV[..., None], z_MVD, self.absent_MD[:, None])
        return join_blocks(torch.cat([own_MVD, z_VD[None]]))
