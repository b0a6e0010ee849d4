"""Probabilities of answers from their score and rank, fitted on the development set.

Among the answers that are given probability p, a share p is right: new facts that were left out of training. The
candidates are what a user would be shown: for each question of valid, the `CANDIDATES` best answers without the known
ones. Answers of valid count as right and all others as wrong; some of the latter are true but not recorded, so
probabilities are rather too low than too high.

The form is a logistic regression on the score, the logarithm of the rank and the gap to the best other answer, for each
relation and direction that has `ENOUGH` right answers, else for the direction. The fits are nested: one for all
candidates, one per direction that is drawn towards it, and one per relation that is drawn towards its direction's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.evidence.votes import LAST

CANDIDATES = 64
ENOUGH = 10  # right answers, of as many questions
FEATURES = ("constant", "score", "log rank", "gap")
_SIGNS = (0, 1, -1, 1)  # of the weights
BINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_FOLDS = 5
_RIDGE = 1e-3  # of the first fit: a separable toy graph would send the weights to infinity
_WIDEST = 100.0  # gap
_PRIOR = 1.0  # precision of a weight around the outer fit's, with features of unit variance
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Candidates(NamedTuple):
    """Answers that were put forward: columns of equal length.

    Attributes:
        score, rank, gap: of the answer; ranks count from 1, and `gap_to` gives the gap.
        relation, direction: of the question; direction is 0 for tails and 1 for heads.
        right: whether the answer is one of the development set.
        question: number of the question.
    """

    score: Floats
    rank: Floats
    gap: Floats
    relation: Integers
    direction: Integers
    right: NDArray[np.bool_]
    question: Integers

    def take(self, index: NDArray[Any]) -> Candidates:
        """Return some of them."""
        return Candidates(*(column[index] for column in self))

    @property
    def standing(self) -> Standing:
        """Score, rank and gap."""
        return Standing(self.score, self.rank, self.gap)

    @property
    def place(self) -> Integers:
        """2 * relation + direction."""
        return 2 * self.relation + self.direction


class Standing(NamedTuple):
    """Score, rank and gap to the best other answer among those that compete; arrays of any equal shapes."""

    score: NDArray[Any]
    rank: NDArray[Any]
    gap: NDArray[Any]


def gap_to(score: NDArray[Any], other: NDArray[Any]) -> Floats:
    """Return how far scores are above those of the best other answers; 0 where there is none, at most 100."""
    score, other = np.asarray(score, np.float64), np.asarray(other, np.float64)
    there = (other > LAST / 2) & np.isfinite(score)
    return np.clip(np.where(there, score - np.where(there, other, 0.0), 0.0), -_WIDEST, _WIDEST)


class Fit(NamedTuple):
    """Weights (4,) for each direction, and for the places that have enough right answers."""

    directions: list[Floats]
    places: dict[int, Floats]

    def table(self, place_n: Integers) -> Floats:
        """Return (..., 4) the weights that hold at each place."""
        places, which = np.unique(place_n, return_inverse=True)
        rows = [self.places.get(int(place), self.directions[int(place) % 2]) for place in places]
        table = np.stack(rows) if rows else np.zeros((0, len(FEATURES)))
        return table[which.reshape(np.shape(place_n))]

    def probability(self, standing: Standing, place_n: Integers) -> Floats:
        """Return the probability of each answer."""
        return sigmoid((features(*standing) * self.table(place_n)).sum(-1))


def features(score: NDArray[Any], rank: NDArray[Any], gap: NDArray[Any]) -> Floats:
    """Return (n, 4) inputs of the regression."""
    score, rank, gap = (np.asarray(column, np.float64) for column in (score, rank, gap))
    return np.stack([np.ones_like(score), score, np.log(rank), gap], axis=-1)


def fit_all(found: Candidates) -> Fit:
    """Fit all candidates, then each direction around that, then each place with enough right answers around its own."""
    x = features(found.score, found.rank, found.gap)
    scale = np.maximum(x.std(axis=0), 1e-6)
    scale[0] = 1.0
    everything = fit(x, found.right)
    directions = [
        fit(x[here], found.right[here], everything, scale) if here.any() else everything
        for here in (found.direction == direction for direction in (0, 1))
    ]
    places = {}
    for place in np.unique(found.place[found.right]).tolist():
        here = found.place == place
        right = found.right[here]
        if right.sum() >= ENOUGH and len(np.unique(found.question[here][right])) >= ENOUGH and not right.all():
            places[place] = fit(x[here], right, directions[place % 2], scale)
    return Fit(directions, places)


def fit(x: Floats, right_n: NDArray[np.bool_], centre: Floats | None = None, scale: Floats | None = None) -> Floats:
    """Return the (4,) weights of a logistic regression, by Newton's method.

    A better score, rank or gap never lowers the probability: a feature whose weight has the wrong sign is left out.

    Args:
        centre: weights that these are drawn towards; None draws them weakly towards 0.
        scale: (4,) standard deviations of the features.
    """
    kept, right = list(range(len(FEATURES))), right_n.astype(np.float64)
    while True:
        weights = np.zeros(len(FEATURES))
        precision = np.array([0.0, _RIDGE, _RIDGE, _RIDGE]) if scale is None else _PRIOR * scale**2
        prior = np.zeros(len(FEATURES)) if centre is None else centre
        weights[kept] = _newton(x[:, kept], right, prior[kept], precision[kept])
        turned = [column for column in kept if weights[column] * _SIGNS[column] < 0]
        if not turned:
            return weights
        kept.remove(turned[0])


def _newton(x: Floats, y: Floats, prior: Floats, precision: Floats) -> Floats:
    w = prior.copy()

    def objective(w: Floats) -> float:
        return float(np.logaddexp(0, x @ w).sum() - y @ (x @ w) + 0.5 * precision @ (w - prior) ** 2)

    for _ in range(100):
        step, size, before = _newton_step(x, y, w, prior, precision + 1e-9, precision), 1.0, objective(w)
        while size > 1e-6 and objective(w - size * step) > before:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    return w


def _newton_step(x: Floats, y: Floats, w: Floats, prior: Floats, curvature: Floats, precision: Floats) -> Floats:
    """Return the step to subtract from the weights; `curvature` is what the prior adds to the Hessian's diagonal."""
    p = sigmoid(x @ w)
    gradient = x.T @ (p - y) + precision * (w - prior)
    hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(curvature)
    return np.asarray(np.linalg.solve(hessian, gradient))


def fit_near(x: Floats, y: Floats, prior: Floats, precision: float) -> Floats:
    """Return weights of a logistic regression drawn towards `prior`, by Newton's method; slopes stay above 0."""
    w = prior.copy()
    precisions = np.full(len(w), precision)
    for _ in range(50):
        step = _newton_step(x, y, w, prior, precisions, precisions)
        w = w - step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        w[1:] = np.maximum(w[1:], 0.0)
        if np.abs(step).max() < 1e-6:
            break
    return w


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def probability(
    calibration: dict[str, Any] | None, standing: Standing, relation: NDArray[Any], direction: NDArray[Any]
) -> Floats:
    """Return calibrated probabilities; NaN if the bundle has no calibration."""
    if calibration is None:
        return np.full(np.shape(standing.score), np.nan)
    directions = [_weights(weights) for weights in calibration["directions"]]
    places = {
        2 * entry["relation"] + entry["direction"]: _weights(entry["weights"]) for entry in calibration["relations"]
    }
    return Fit(directions, places).probability(standing, np.asarray(2 * relation + direction, np.int64))


def _weights(stored: Sequence[float]) -> Floats:
    """Return (4,) weights; bundles of older versions have none for the gap."""
    return np.pad(np.asarray(stored, np.float64), (0, len(FEATURES) - len(stored)))


def expected_error(p_n: Floats, right_n: NDArray[np.bool_], bins: int = 10) -> float:
    """Return the expected calibration error: mean distance of stated from true shares, over bins of equal counts."""
    if not len(p_n):
        return 0.0
    order = np.argsort(p_n, kind="stable")
    cells: Sequence[Integers] = np.array_split(order, bins)
    return float(
        sum(abs(p_n[cell].mean() - right_n[cell].mean()) * len(cell) for cell in cells if len(cell)) / len(p_n)
    )


def reliability(p_n: Floats, right_n: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Return for each bin of `BINS` that is not empty.

    From, to, the mean probability said, the share true, the count.
    """
    bins = []
    which = np.clip(np.searchsorted(BINS, p_n, side="right") - 1, 0, len(BINS) - 2)
    for number in np.unique(which).tolist():
        here = which == number
        said, true = float(p_n[here].mean()), float(right_n[here].mean())
        edges = {"from": BINS[number], "to": BINS[number + 1]}
        bins.append({**edges, "said": said, "true": true, "count": int(here.sum())})
    return bins


def calibrate(found: Candidates) -> dict[str, Any] | None:
    """Return the calibration as the manifest stores it, or None if no candidate is right, or none is wrong.

    The reliability comes from questions that were not fitted: each fifth of them is judged by a fit of the other four.
    """
    if not found.right.any() or found.right.all():
        return None
    fitted = fit_all(found)
    report: dict[str, Any] = {
        "features": list(FEATURES),
        "directions": [weights.tolist() for weights in fitted.directions],
        "relations": [
            {"relation": place // 2, "direction": place % 2, "weights": weights.tolist()}
            for place, weights in fitted.places.items()
        ],
        "candidates": CANDIDATES,
        "questions": len(np.unique(found.question)),
        "right": int(found.right.sum()),
    }
    p, judged = np.zeros(len(found.right)), np.zeros(len(found.right), bool)
    for fold in range(_FOLDS):
        held_out = found.question % _FOLDS == fold
        rest = found.take(~held_out)
        if held_out.any() and rest.right.any() and not rest.right.all():
            here = found.take(held_out)
            p[held_out] = fit_all(rest).probability(here.standing, here.place)
            judged |= held_out
    if judged.any():
        report["reliability"] = _judge(p[judged], found.take(judged))
    return report


def _judge(p: Floats, found: Candidates) -> dict[str, Any]:
    """Return what is said and what is true: overall, for the ten best answers, and by relation and direction."""
    shown = found.rank <= 10
    relations = []
    for place in np.unique(found.place).tolist():
        here = (found.place == place) & shown
        if found.right[here].any():
            said, true = float(p[here].sum()), int(found.right[here].sum())
            error = expected_error(p[here], found.right[here])
            relation, direction = divmod(place, 2)
            relations.append(
                {"relation": relation, "direction": direction, "said": said, "true": true, "ece_top_10": error}
            )
    return {
        "split": "valid",
        "protocol": f"{_FOLDS} folds of questions, each judged by a fit of the others",
        "ece": expected_error(p, found.right),
        "ece_top_10": expected_error(p[shown], found.right[shown]),
        "mean_said": float(p.mean()),
        "mean_true": float(found.right.mean()),
        "bins": reliability(p, found.right),
        "relations": relations,
    }
