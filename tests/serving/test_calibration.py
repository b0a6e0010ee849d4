"""Probabilities say what share is right: on questions drawn from a known law, and better than the raw score's sigmoid."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.serving import calibration
from mocme_dist.serving.calibration import calibrate, expected_error, features, fit, probability, sigmoid


def candidates(law: np.ndarray, questions: int, seed: int) -> tuple[np.ndarray, ...]:
    """Score, rank, direction, right, question of 20 candidates a question; right by the law, each by itself."""
    gen = np.random.default_rng(seed)
    score = np.sort(gen.normal(gen.normal(size=(questions, 1)) * 2, 1, size=(questions, 20)), axis=1)[:, ::-1]
    rank = np.broadcast_to(np.arange(1.0, 21), score.shape)
    direction = np.broadcast_to(gen.integers(2, size=(questions, 1)), score.shape)
    right = gen.random(score.shape) < sigmoid(features(score, rank, direction) @ law)
    question = np.broadcast_to(np.arange(questions)[:, None], score.shape)
    return tuple(np.asarray(column).ravel() for column in (score, rank, direction, right, question))


LAW = np.array([-0.5, 0.7, -1.2, -0.6])


def test_the_fit_finds_the_law_that_made_the_answers():
    score, rank, direction, right, _ = candidates(LAW, 8000, 0)
    found = fit(features(score, rank, direction), right)
    np.testing.assert_allclose(found, LAW, atol=0.08)
    # A maximum of the likelihood: gradient zero.
    x = features(score, rank, direction)
    gradient = x.T @ (sigmoid(x @ found) - right) / len(right)
    assert np.abs(gradient).max() < 1e-6


def test_probabilities_are_calibrated_on_questions_that_were_not_fitted():
    report = calibrate(*candidates(LAW, 3000, 1))
    assert report is not None and report["held_out_error"] < 0.01 and report["held_out_error_top_10"] < 0.02
    score, rank, direction, right, _ = candidates(LAW, 3000, 2)
    p = probability(report, score, rank, direction)
    assert expected_error(p, right) < 0.01 < expected_error(sigmoid(score), right)
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.0)):
        here = (p >= low) & (p < high)
        assert here.sum() > 200 and abs(p[here].mean() - right[here].mean()) < 0.04


def test_a_better_score_never_lowers_the_probability():
    score, rank, direction, right, _ = candidates(np.array([0.0, -0.5, -0.5, 0.0]), 500, 3)
    weights = fit(features(score, rank, direction), right)
    assert weights[1] >= 0 and weights[2] <= 0 and 0 in weights[1:3]


def test_without_right_answers_there_is_no_probability():
    score, rank, direction, right, question = candidates(LAW, 10, 4)
    assert calibrate(score, rank, direction, np.zeros_like(right), question) is None
    assert calibrate(score, rank, direction, np.ones_like(right), question) is None
    assert np.isnan(probability(None, score, rank, direction)).all()


def test_a_separable_toy_graph_gives_finite_weights():
    right = np.array([True, False] * 50)
    weights = fit(features(np.where(right, 5.0, -5.0), np.tile([1.0, 2.0], 50), np.zeros(100)), right)
    assert np.isfinite(weights).all() and np.abs(weights).max() < 100


def test_the_error_is_that_of_its_definition():
    p, right = np.repeat([0.2, 0.8], 50), np.repeat([False, True], 50)
    assert expected_error(p, right, bins=2) == pytest.approx(0.2)
    assert expected_error(np.zeros(0), np.zeros(0, bool)) == 0
    assert calibration.FEATURES[1] == "score"


def test_a_bundle_carries_the_calibration_of_its_own_valid_split(bundle):
    found = bundle.manifest["calibration"]
    assert len(found["weights"]) == 4 and found["right"] > 20 and found["weights"][1] >= 0
    # A tiny graph has few questions; the mean must fit all the same, and so must the shares of a half that was not fitted.
    assert found["held_out_mean"][0] == pytest.approx(found["held_out_mean"][1], abs=0.02)
    assert found["held_out_error"] < 0.05
