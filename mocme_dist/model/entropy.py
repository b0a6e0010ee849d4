"""Weights of negatives in the loss, by the binary entropy of their scores and its class."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EASY, AMBIGUOUS, HARD = 0, 1, 2


class Weighting(NamedTuple):
    """Settings of the weights; the fields are those of the negatives section of the configuration."""

    kind: str
    easy_below: float
    hard_from: float
    weight_easy: float
    weight_ambiguous: float
    weight_hard: float
    temperature: float


def entropy_bits(score: Tensor) -> Tensor:
    """Return the binary entropy of sigmoid(score), elementwise, in bits: 1 at score 0, towards 0 at both ends.

    It is in bits because thresholds reach 0.8 and the entropy in nats is at most 0.693. With p = sigmoid(s) it is
    (softplus(s) - s p) / ln 2, which does not lose digits for large |s|.
    """
    magnitude = score.abs()
    return (functional.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)) / math.log(2)


def entropy_class(entropy: Tensor, weighting: Weighting) -> Tensor:
    """Return int64 classes: EASY below the first threshold, HARD from the second on, AMBIGUOUS between."""
    return (entropy >= weighting.easy_below).long() + (entropy >= weighting.hard_from).long()


def negative_weights(score_GbN: Tensor, allowed_GbN: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Return detached weights of negatives, which sum to 1 per query (0 if none is allowed), and their classes.

    Args:
        score_GbN: (G, b, N) scores of the negatives.
        allowed_GbN: False where the entry is a known answer; its weight is 0.
        weighting: see `Weighting`.

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
