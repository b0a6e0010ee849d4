"""Probabilities are the shares of right answers: on questions drawn from a known law, by relation and direction."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.serving.calibration import (
    ENOUGH,
    Candidates,
    calibrate,
    expected_error,
    features,
    fit,
    fit_all,
    gap_to,
    probability,
    reliability,
    sigmoid,
)

LAW = np.array([-0.5, 0.7, -1.2, 0.4])
SHIFT = np.array([0.0, -1.5, 1.0])  # of the constant, by relation


def candidates(questions: int, seed: int, law: np.ndarray = LAW, shift: np.ndarray = SHIFT) -> Candidates:
    """20 candidates per question, each right by the law with the shift of its relation."""
    gen = np.random.default_rng(seed)
    score = np.sort(gen.normal(gen.normal(size=(questions, 1)) * 2, 1, size=(questions, 20)), axis=1)[:, ::-1]
    rank = np.broadcast_to(np.arange(1.0, 21), score.shape)
    gap = gap_to(score, np.concatenate([score[:, 1:2], np.repeat(score[:, :1], 19, axis=1)], axis=1))
    relation, direction = (np.broadcast_to(gen.integers(n, size=(questions, 1)), score.shape) for n in (len(shift), 2))
    right = gen.random(score.shape) < sigmoid(features(score, rank, gap) @ law + shift[relation])
    question = np.broadcast_to(np.arange(questions)[:, None], score.shape)
    columns = (score, rank, gap, relation, direction, right, question)
    return Candidates(*(np.asarray(column).ravel() for column in columns))


def test_the_fit_finds_the_law_that_made_the_answers():
    found = candidates(8000, 0, shift=np.zeros(1))
    x = features(*found.standing)
    weights = fit(x, found.right)
    np.testing.assert_allclose(weights, LAW, atol=0.08)
    # A maximum of the likelihood: gradient zero.
    gradient = x.T @ (sigmoid(x @ weights) - found.right) / len(found.right)
    assert np.abs(gradient).max() < 1e-6


def test_probabilities_are_calibrated_for_each_relation_on_questions_that_were_not_fitted():
    report = calibrate(candidates(3000, 1))
    assert report is not None and len(report["relations"]) == 6
    assert report["reliability"]["ece"] < 0.01 and report["reliability"]["ece_top_10"] < 0.02
    new = candidates(3000, 2)
    p = probability(report, new.standing, new.relation, new.direction)
    for relation in range(3):
        here = new.relation == relation
        assert expected_error(p[here], new.right[here]) < 0.015
    by_direction = {**report, "relations": []}  # without the relations' own fits the shifts average out
    coarse = probability(by_direction, new.standing, new.relation, new.direction)
    assert min(expected_error(coarse[new.relation == r], new.right[new.relation == r]) for r in (1, 2)) > 0.03


def test_a_relation_with_few_right_answers_takes_the_fit_of_its_direction():
    found = candidates(2000, 3)
    rare = np.flatnonzero((found.relation == 1) & (found.direction == 0) & found.right)[ENOUGH - 1 :]
    kept = np.setdiff1d(np.arange(len(found.right)), rare)
    fitted = fit_all(found.take(kept))
    assert 2 not in fitted.places and 3 in fitted.places
    assert np.array_equal(fitted.table(np.array([2]))[0], fitted.directions[0])
    assert fitted.table(np.array([[2, 3], [0, 1]])).shape == (2, 2, 4)


def test_a_better_score_never_lowers_the_probability():
    found = candidates(500, 3, law=np.array([0.0, -0.5, -0.5, -0.5]))
    for weights in (fit(features(*found.standing), found.right), *fit_all(found).places.values()):
        assert weights[1] >= 0 and weights[2] <= 0 and weights[3] >= 0 and 0 in weights[1:]


def test_without_right_answers_there_is_no_probability():
    found = candidates(10, 4)
    assert calibrate(found._replace(right=np.zeros_like(found.right))) is None
    assert calibrate(found._replace(right=np.ones_like(found.right))) is None
    assert np.isnan(probability(None, found.standing, found.relation, found.direction)).all()


def test_a_separable_toy_graph_gives_finite_weights():
    right = np.array([True, False] * 50)
    weights = fit(features(np.where(right, 5.0, -5.0), np.tile([1.0, 2.0], 50), np.where(right, 10.0, -10.0)), right)
    assert np.isfinite(weights).all() and np.abs(weights).max() < 100


def test_the_errors_are_those_of_their_definition():
    p, right = np.repeat([0.2, 0.8], 50), np.repeat([False, True], 50)
    assert expected_error(p, right, bins=2) == pytest.approx(0.2)
    assert expected_error(np.zeros(0), np.zeros(0, bool)) == 0
    low, high = reliability(np.array([0.21, 0.25, 1.0]), np.array([True, False, True]))
    assert low == {"from": 0.2, "to": 0.3, "said": pytest.approx(0.23), "true": 0.5, "count": 2}
    assert high == {"from": 0.9, "to": 1.0, "said": 1.0, "true": 1.0, "count": 1}


def test_a_bundle_carries_the_calibration_of_its_own_valid_split(bundle):
    found = bundle.manifest["calibration"]
    assert [len(weights) for weights in found["directions"]] == [4, 4] and found["right"] > 20
    # A tiny graph has few questions; the means must agree nevertheless, for questions that were not fitted.
    judged = found["reliability"]
    assert judged["mean_said"] == pytest.approx(judged["mean_true"], abs=0.03) and judged["ece"] < 0.06
    assert sum(entry["count"] for entry in judged["bins"]) > 100


def test_the_gap_is_that_to_the_best_other_answer_whatever_is_shown(bundle):
    """Probabilities do not depend on how many answers are asked for, nor on whether known ones are among them."""
    shown = bundle.predict("item 05", "near", k=30)
    chance = dict(zip(shown["id"], shown["probability"], strict=True))
    for k, known in ((1, "known"), (2, "known"), (1, "none"), (30, "none"), (5, "train")):
        some = bundle.predict("item 05", "near", k=k, filter=known)
        for name, one in zip(some["id"], some["probability"], strict=True):
            assert name not in chance or one == pytest.approx(chance[name], rel=1e-5)
    listed = bundle.predict("item 05", "near", k=5, candidates=shown["id"].tolist()[3:6])
    for name, one in zip(listed["id"], listed["probability"], strict=True):
        assert one == pytest.approx(chance[name], rel=1e-5)
    [ranked, _] = bundle.rank("item 05", "near", shown["id"][0])["probability"]
    assert ranked == pytest.approx(chance[shown["id"][0]], rel=1e-5)
    assert gap_to(np.array([3.0, 3.0, 1.0]), np.array([1.0, -np.inf, 3.0])).tolist() == [2.0, 0.0, -2.0]
