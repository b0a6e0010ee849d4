"""How much a negative teaches: the binary entropy of its score, its class, and its weight in the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EASY, AMBIGUOUS, HARD = 0, 1, 2


class Weighting(NamedTuple):
    """Settings of the weights; fields as in the negatives section of the configuration."""

    kind: str = "entropy"
    easy_below: float = 0.2
    hard_from: float = 0.8
    weight_easy: float = 0.5
    weight_ambiguous: float = 1.0
    weight_hard: float = 2.0
    temperature: float = 1.0


def entropy_bits(score: Tensor) -> Tensor:
    """Binary entropy of sigmoid(score), elementwise, in bits: 1 at score 0, towards 0 at both ends.

    In bits because the thresholds run to 0.8 and natural logarithms never pass 0.693. With p = sigmoid(s) it is
    (softplus(s) - s p) / ln 2, which does not lose digits for large |s|.
    """
    magnitude = score.abs()
    return (functional.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)) / math.log(2)


def entropy_class(entropy: Tensor, weighting: Weighting) -> Tensor:
    """EASY below the first threshold, HARD from the second on, AMBIGUOUS between; int64."""
    return (entropy >= weighting.easy_below).long() + (entropy >= weighting.hard_from).long()


def negative_weights(score_GbN: Tensor, allowed_GbN: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Weights of negatives, detached, summing to 1 for each query (0 where none is allowed), and their classes.

    Args:
        score_GbN: (G, b, N) scores of the negatives.
        allowed_GbN: False where the entry is a known answer; its weight is 0.
        weighting: what to weigh by.

    Returns:
        weights (G, b, N) float32 and classes (G, b, N) int64.

    Source: entropy classes as published for MoCME; self-adversarial weights of RotatE, section 3.
    """
    score_GbN = score_GbN.detach()
    class_GbN = entropy_class(entropy_bits(score_GbN), weighting)
    weight_GbN = allowed_GbN.to(score_GbN.dtype)
    if weighting.kind in ("entropy", "entropy_adversarial"):
        easy, ambiguous, hard = weighting.weight_easy, weighting.weight_ambiguous, weighting.weight_hard
        factor = torch.where(class_GbN == EASY, easy, torch.where(class_GbN == HARD, hard, ambiguous))
        weight_GbN = weight_GbN * factor
    if weighting.kind in ("self_adversarial", "entropy_adversarial"):
        scaled = (score_GbN * weighting.temperature).masked_fill(~allowed_GbN, -torch.inf)
        peak = scaled.amax(-1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).min)
        weight_GbN = weight_GbN * torch.exp(scaled - peak)
    return weight_GbN / weight_GbN.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_GbN.dtype).tiny), class_GbN
