"""The completion loss of a batch of queries: one pure function, an eager reference and a compiled path.

The compiled path is the same function as one graph without a break. Distances to the pool are one node of it (see
`mocme_dist.kernels.distance`), so nothing of size (G, b, N, D) is stored, forward or backward. tests/model/test_loss.py
compares the two, values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mocme_dist.kernels.distance import distance, pool_distance
from mocme_dist.model.blocks import split_blocks, split_phases
from mocme_dist.model.compile import one_graph
from mocme_dist.model.entropy import Weighting, negative_weights
from mocme_dist.model.rotate import rotate


class LossSettings(NamedTuple):
    """Settings of the loss.

    Attributes:
        kind: contrastive | one_vs_all.
        gamma: the margin.
        weighting: of the negatives.
        compiled: use the fused path.
        cuda_graphs: with `compiled`, launch its kernels together on CUDA; one forward pass at a time may use it.
        blocks: number of blocks of a vector, each with a loss of its own.
    """

    kind: str
    gamma: float
    weighting: Weighting
    compiled: bool = False
    cuda_graphs: bool = False
    blocks: int = 1


class LossStats(NamedTuple):
    """Detached sums over this rank's queries; the caller adds those of all ranks and divides by `queries`."""

    loss: Tensor
    positive: Tensor
    negative: Tensor
    classes_3: Tensor
    allowed: Tensor
    positive_score: Tensor
    queries: Tensor


def _contrastive(
    positive_Gb: Tensor,
    negative_GbN: Tensor,
    allowed_GbN: Tensor,
    weight_Gb: Tensor,
    gamma: float,
    weighting: Weighting,
) -> tuple[Tensor, ...]:
    """Return sums over queries of the loss and of its parts, from distances; see `completion_loss`."""
    score_GbN = gamma - negative_GbN
    share_GbN, class_GbN = negative_weights(score_GbN, allowed_GbN, weighting)
    positive = (weight_Gb * functional.softplus(positive_Gb - gamma)).sum()
    negative = (weight_Gb * (share_GbN * functional.softplus(score_GbN)).sum(-1)).sum()
    counted_GbN = allowed_GbN * weight_Gb[..., None]
    classes_3 = torch.stack([((class_GbN == c) * counted_GbN).sum() for c in range(3)])
    return (positive + negative) / 2, positive.detach(), negative.detach(), classes_3, counted_GbN.sum()


def _one_vs_all(
    positive_Gb: Tensor,
    negative_GbN: Tensor,
    allowed_GbN: Tensor,
    weight_Gb: Tensor,
    gamma: float,
    weighting: Weighting,
) -> tuple[Tensor, ...]:
    """Return the softmax cross-entropy of the target against every entity but other known answers."""
    score_GbN = (gamma - negative_GbN).masked_fill(~allowed_GbN, -torch.inf)
    target_Gb = gamma - positive_Gb
    everyone_Gb = torch.logaddexp(torch.logsumexp(score_GbN, dim=-1), target_Gb)
    loss = (weight_Gb * (everyone_Gb - target_Gb)).sum()
    counted = (allowed_GbN * weight_Gb[..., None]).sum()
    return loss, loss.detach(), torch.zeros_like(loss), torch.zeros(3, device=loss.device), counted


_REDUCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"contrastive": _contrastive, "one_vs_all": _one_vs_all}


def _forward(
    source_GbD: Tensor,
    phase_GbC: Tensor,
    sign_Gb: Tensor,
    target_GbD: Tensor,
    pool_GND: Tensor,
    allowed_GbN: Tensor,
    weight_Gb: Tensor,
    *,
    settings: LossSettings,
) -> tuple[Tensor, ...]:
    """Return the loss and LossStats' fields after the first, see `completion_loss`; pure, one graph when compiled."""
    count = settings.blocks
    if count > 1:  # blocks are scored as further chunks of queries with narrower vectors
        source_GbD, target_GbD, pool_GND = (
            split_blocks(value, count).flatten(0, 1) for value in (source_GbD, target_GbD, pool_GND)
        )
        phase_GbC = split_phases(phase_GbC, count).flatten(0, 1)
        sign_Gb, allowed_GbN = sign_Gb.repeat(count, 1), allowed_GbN.repeat(count, 1, 1)
        weight_Gb = weight_Gb.repeat(count, 1) / count
    query_GbD = rotate(source_GbD, phase_GbC, sign_Gb)
    positive_Gb = distance(query_GbD, target_GbD)
    negative_GbN = pool_distance(query_GbD, pool_GND, settings.compiled)
    reduce = _REDUCTIONS[settings.kind]
    loss, positive, negative, classes_3, allowed = reduce(
        positive_Gb, negative_GbN, allowed_GbN, weight_Gb, settings.gamma, settings.weighting
    )
    positive_score = (weight_Gb * (settings.gamma - positive_Gb)).sum().detach()
    return loss, positive, negative, classes_3.float(), allowed.float(), positive_score, weight_Gb.sum()


@cache
def _compiled(settings: LossSettings) -> Callable[..., tuple[Tensor, ...]]:
    """Return one graph for these settings. Batches have fixed shapes, so nothing is compiled after the first step."""
    return one_graph(_forward, settings.cuda_graphs, settings=settings)


def completion_loss(
    source_GbD: Tensor,
    phase_GbC: Tensor,
    sign_Gb: Tensor,
    target_GbD: Tensor,
    pool_GND: Tensor,
    allowed_GbN: Tensor,
    weight_Gb: Tensor,
    settings: LossSettings,
) -> tuple[Tensor, LossStats]:
    """Return the sum over queries of (-log s(p) - sum_i w_i log s(-n_i)) / 2.

    Here s is the sigmoid, and p and n_i are the scores gamma - distance of the target and the negatives.

    With several blocks it is the mean of the losses of the blocks, each with its own scores and weights of negatives.

    Args:
        source_GbD: (G, b, D) source entities of each chunk's queries.
        phase_GbC: (G, b, C) phases of their relations.
        sign_Gb: (G, b) +1 tail query, -1 head query.
        target_GbD: (G, b, D) true answers.
        pool_GND: (G, N, D) shared candidates of each chunk.
        allowed_GbN: (G, b, N) bool, False where a candidate is a known answer of the query.
        weight_Gb: (G, b) 1 for a query, 0 for padding.
        settings: see `LossSettings`.

    Returns:
        The summed loss (a scalar with a gradient; divide by the number of queries) and detached sums for the log.
    """
    tensors = (source_GbD, phase_GbC, sign_Gb, target_GbD, pool_GND, allowed_GbN, weight_Gb)
    if not settings.compiled or torch.compiler.is_compiling():
        loss, *sums = _forward(*tensors, settings=settings)
    elif not settings.cuda_graphs:
        loss, *sums = _compiled(settings)(*tensors)
    else:  # the backward pass of the last call has run; copies, because the replay overwrites values for the log
        torch.compiler.cudagraph_mark_step_begin()
        loss, *sums = (value.clone() for value in _compiled(settings)(*tensors))
    return loss, LossStats(loss.detach(), *sums)
