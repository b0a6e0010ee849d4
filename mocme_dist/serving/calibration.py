"""From score and place to a probability, fitted on the development set.

What it means: of the answers that the model puts forward with probability p, new facts left out of training are a
share p. The candidates are those a user would be shown: for each question of valid, the `CANDIDATES` best answers
with known ones left out; the true one of the split counts as right, every other as wrong. (Some of the others are
true and merely not recorded, so the probability is rather too low than too high.) The form is a logistic regression
on the score, the logarithm of the place, and the direction; scores alone say little, because their level differs
from question to question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CANDIDATES = 64
FEATURES = ("constant", "score", "log rank", "direction")
_RIDGE = 1e-3  # per candidate set: a separable toy graph would send the weights to infinity
Floats = NDArray[np.float64]


def features(score: NDArray[Any], rank: NDArray[Any], direction: NDArray[Any]) -> Floats:
    """(n, 4) inputs; rank counts from 1, direction is 0 for tails and 1 for heads."""
    score, rank = np.asarray(score, np.float64), np.asarray(rank, np.float64)
    return np.stack([np.ones_like(score), score, np.log(rank), np.broadcast_to(np.asarray(direction, np.float64), score.shape)], axis=-1)


def fit(x_n4: Floats, right_n: NDArray[np.bool_]) -> Floats:
    """(4,) weights of the logistic regression, by Newton's method.

    A better score or place never lowers the probability: what the fit would turn round is left out.
    """
    kept, right = [0, 1, 2, 3], right_n.astype(np.float64)
    while True:
        weights = np.zeros(4)
        weights[kept] = _newton(x_n4[:, kept], right)
        turned = [column for column, sign in ((1, 1), (2, -1)) if weights[column] * sign < 0]
        if not turned:
            return weights
        kept.remove(turned[0])


def _newton(x: Floats, y: Floats) -> Floats:
    w = np.zeros(x.shape[1])
    ridge = np.full(x.shape[1], _RIDGE)
    ridge[0] = 0
    objective = lambda w: float(np.logaddexp(0, x @ w).sum() - y @ (x @ w) + 0.5 * ridge @ w**2)  # noqa: E731
    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge + 1e-9)
        step, size, before = np.linalg.solve(hessian, gradient), 1.0, objective(w)
        while size > 1e-6 and objective(w - size * step) > before:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    return w


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def probability(calibration: dict[str, Any] | None, score: NDArray[Any], rank: NDArray[Any], direction: NDArray[Any]) -> Floats:
    """Calibrated probabilities; NaN where the bundle has no calibration."""
    if calibration is None:
        return np.full(np.shape(score), np.nan)
    return sigmoid(features(score, rank, direction) @ np.asarray(calibration["weights"], np.float64))


def expected_error(p_n: Floats, right_n: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error: the mean distance of stated from found shares, over bins of equal size."""
    if not len(p_n):
        return 0.0
    order = np.argsort(p_n, kind="stable")
    cells: Sequence[NDArray[np.int64]] = np.array_split(order, bins)
    return float(sum(abs(p_n[cell].mean() - right_n[cell].mean()) * len(cell) for cell in cells if len(cell)) / len(p_n))


def calibrate(
    score_n: Floats, rank_n: Floats, direction_n: Floats, right_n: NDArray[np.bool_], question_n: NDArray[np.int64]
) -> dict[str, Any] | None:
    """The calibration as the manifest keeps it; None where no candidate was right, or none wrong.

    The error that is reported comes from questions that were not fitted on: fitted on the even ones, told of the odd.
    """
    if not right_n.any() or right_n.all():
        return None
    x, even = features(score_n, rank_n, direction_n), question_n % 2 == 0
    report: dict[str, Any] = {"features": list(FEATURES), "weights": [float(w) for w in fit(x, right_n)], "candidates": CANDIDATES}
    report |= {"questions": int(question_n.max()) + 1, "right": int(right_n.sum())}
    if right_n[even].any() and not right_n[even].all() and (~even).any():
        p = sigmoid(x[~even] @ fit(x[even], right_n[even]))
        shown = rank_n[~even] <= 10
        report |= {
            "held_out_error": expected_error(p, right_n[~even]),
            "held_out_error_top_10": expected_error(p[shown], right_n[~even][shown]),
            "held_out_mean": [float(p.mean()), float(right_n[~even].mean())],
        }
    return report
