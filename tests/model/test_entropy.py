"""Entropy in bits, its classes, and the weights of negatives."""

from __future__ import annotations

import math

import pytest
import torch
from plain_settings import WEIGHTING

from mocme_dist.model.entropy import AMBIGUOUS, EASY, HARD, Weighting, entropy_bits, entropy_class, negative_weights

KINDS = ("entropy", "self_adversarial", "uniform", "entropy_adversarial")


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_entropy_is_in_bits_and_symmetric():
    for p in (0.5, 0.25, 0.1, 0.9, 0.001):
        expected = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
        assert entropy_bits(torch.tensor(logit(p), dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)
    assert entropy_bits(torch.tensor(0.0)).item() == 1.0


def test_entropy_keeps_its_digits_at_the_ends():
    score = torch.tensor([-80.0, -30.0, 30.0, 80.0])
    expected = [(1 + abs(s)) * math.exp(-abs(s)) / math.log(2) for s in score.tolist()]
    torch.testing.assert_close(entropy_bits(score), torch.tensor(expected), rtol=1e-4, atol=0)
    assert torch.equal(entropy_bits(torch.tensor([1e4, -1e4])), torch.zeros(2))


def test_classes_change_at_their_thresholds():
    weighting = WEIGHTING._replace(easy_below=0.2, hard_from=0.8)
    step = 1e-7
    entropy = torch.tensor([0.0, 0.2 - step, 0.2 + step, 0.5, 0.8 - step, 0.8 + step, 1.0])
    assert entropy_class(entropy, weighting).tolist() == [EASY, EASY, AMBIGUOUS, AMBIGUOUS, AMBIGUOUS, HARD, HARD]
    exact = torch.tensor([0.25, 0.75])  # representable: a value at the threshold belongs to the class above it
    assert entropy_class(exact, WEIGHTING._replace(easy_below=0.25, hard_from=0.75)).tolist() == [AMBIGUOUS, HARD]
    assert entropy_class(torch.tensor([0.5]), WEIGHTING._replace(easy_below=0.5, hard_from=0.5)).tolist() == [HARD]


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    score = torch.randn(3, 4, 12, generator=gen) * 4
    allowed = torch.rand(3, 4, 12, generator=gen) < 0.7
    allowed[1, 2] = False
    return score, allowed


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one_over_what_is_allowed(kind):
    score, allowed = scores()
    weight, classes = negative_weights(score.requires_grad_(), allowed, WEIGHTING._replace(kind=kind))
    expected = torch.ones(3, 4)
    expected[1, 2] = 0
    torch.testing.assert_close(weight.sum(-1), expected)
    assert (weight[~allowed] == 0).all()
    assert (weight[allowed] > 0).all()
    assert not weight.requires_grad
    assert torch.equal(classes, entropy_class(entropy_bits(score), WEIGHTING))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_a_plain_loop(kind):
    score, allowed = scores()
    weighting = Weighting(kind, 0.3, 0.7, 0.25, 1.5, 4.0, temperature=0.5)
    weight, _ = negative_weights(score, allowed, weighting)
    for g in range(3):
        for b in range(4):
            raw = []
            for n in range(12):
                s = score[g, b, n].item()
                p = 1 / (1 + math.exp(-s))
                entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
                factor = 0.25 if entropy < 0.3 else 1.5 if entropy < 0.7 else 4.0
                value = factor if kind.startswith("entropy") else 1.0
                value *= math.exp(0.5 * s) if kind.endswith("adversarial") else 1.0
                raw.append(value if allowed[g, b, n] else 0.0)
            total = sum(raw)
            expected = torch.tensor([value / total if total else 0.0 for value in raw])
            torch.testing.assert_close(weight[g, b], expected, rtol=1e-4, atol=1e-7)


def test_self_adversarial_weights_are_a_softmax():
    score, allowed = scores()
    weight, _ = negative_weights(
        score, torch.ones_like(allowed), WEIGHTING._replace(kind="self_adversarial", temperature=2.0)
    )
    torch.testing.assert_close(weight, torch.softmax(score * 2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_away_give_finite_weights(kind):
    score = torch.tensor([[[1e30, -1e30, 5e3, -5e3, 0.0]]])
    for allowed in (torch.ones(1, 1, 5, dtype=torch.bool), torch.zeros(1, 1, 5, dtype=torch.bool)):
        weight, _ = negative_weights(score, allowed, WEIGHTING._replace(kind=kind))
        assert torch.isfinite(weight).all()
        assert weight.sum().item() == pytest.approx(float(allowed.any()))


def test_a_class_of_weight_zero_is_left_out():
    score = torch.tensor([[[0.0, 20.0, 30.0]]])
    weight, _ = negative_weights(
        score, torch.ones(1, 1, 3, dtype=torch.bool), WEIGHTING._replace(kind="entropy", weight_easy=0.0)
    )
    assert weight.tolist() == [[[1.0, 0.0, 0.0]]]
    weight, _ = negative_weights(
        score[..., 1:], torch.ones(1, 1, 2, dtype=torch.bool), WEIGHTING._replace(kind="entropy", weight_easy=0.0)
    )
    assert weight.tolist() == [[[0.0, 0.0]]]
