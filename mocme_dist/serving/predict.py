"""Questions in words to answers in words, with probabilities, and what is known already.

Columns, not objects: a file of a hundred thousand questions is answered block by block into arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.calibration import probability
from mocme_dist.serving.scorer import Asked, best_answers, known_answers, not_competing, place

if TYPE_CHECKING:
    import pandas

SIDES = ("tail", "head")


class Newcomer(NamedTuple):
    """An entity that is not in the bundle: what it is called here, and its fused vector (D,)."""

    name: str
    vector_D: NDArray[np.float32]


class Question(NamedTuple):
    """(head, relation, ?), (?, relation, tail), or with both given: how good is this fact. A new entity may stand on one side."""

    head: str | Newcomer | None
    relation: str
    tail: str | Newcomer | None


class Answers(NamedTuple):
    """Answers of all questions, one after another, best first; columns of equal length.

    Attributes:
        question: number of the question. direction: 0 answers with tails, 1 with heads.
        rank: 1 is best; of a given fact 1 + better + equal / 2.
        answer_id: entity of the bundle.
        score, probability, known: of the fact that the answer makes.
        source, relation, answer: names.
    """

    question: NDArray[np.int64]
    direction: NDArray[np.int64]
    rank: NDArray[np.float64]
    answer_id: NDArray[np.int64]
    score: NDArray[np.float64]
    probability: NDArray[np.float64]
    known: NDArray[np.bool_]
    source: list[str]
    relation: list[str]
    answer: list[str]


class _Sides(NamedTuple):
    """Questions split into one-sided ones: number of the question, source, relation, direction, target (-1 asks for it)."""

    question: list[int]
    source: list[str | Newcomer]
    relation: list[str]
    direction: list[int]
    target: list[str | None]


def predict(bundle: Bundle, questions: Sequence[Question], top: int = 10, filter: str = "known") -> Answers:
    """Answer questions; a fact with both sides given is placed among all tails and among all heads.

    Args:
        top: answers of each.
        filter: "known" leaves known answers out, "none" marks them.

    Raises:
        ConfigError: a name is unknown, a question has no side, or an argument is out of range.
    """
    if filter not in ("known", "none"):
        raise ConfigError(f"filter {filter!r}: expected known or none")
    if top < 1:
        raise ConfigError(f"top {top}: expected 1 or more")
    sides = _split(questions)
    entity = _ids(bundle.entities, [name for name in (*sides.source, *sides.target) if isinstance(name, str)])
    relation = _ids(bundle.relations, sides.relation)
    asked = _asked(bundle, sides, entity, relation)
    open_ones = np.array([at for at, target in enumerate(sides.target) if target is None], np.int64)
    columns = [_answer(bundle, asked.take(open_ones), open_ones, top, filter)] if len(open_ones) else []
    for at, target in enumerate(sides.target):
        if target is not None:
            columns.append(_place(bundle, asked.take(np.array([at])), at, entity[target]))
    side, rank, answer_id, score, chance, known = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.lexsort((rank, side))
    side, rank, answer_id, score, chance, known = (column[order] for column in (side, rank, answer_id, score, chance, known))
    return Answers(
        np.asarray(sides.question, np.int64)[side],
        asked.direction[side],
        rank,
        answer_id,
        score,
        chance,
        known,
        [name if isinstance(name, str) else name.name for name in (sides.source[at] for at in side)],
        bundle.relations.take(asked.relation[side]),
        bundle.entities.take(answer_id),
    )


def _split(questions: Sequence[Question]) -> _Sides:
    sides = _Sides([], [], [], [], [])

    def add(number: int, source: str | Newcomer, relation: str, direction: int, target: str | None) -> None:
        for column, value in zip(sides, (number, source, relation, direction, target), strict=True):
            column.append(value)  # type: ignore[attr-defined]

    for number, (head, relation, tail) in enumerate(questions):
        if not relation:
            raise ConfigError("no relation is given; a question is a relation with a head or a tail")
        if head is None and tail is None:
            raise ConfigError(f"relation {relation!r}: neither head nor tail is given; a question needs one of them")
        if head is not None and not isinstance(tail, Newcomer):
            add(number, head, relation, 0, tail)
        if tail is not None and not isinstance(head, Newcomer):
            add(number, tail, relation, 1, head)
        if isinstance(head, Newcomer) and isinstance(tail, Newcomer):
            raise ConfigError("head and tail are both new entities; one of them must be in the bundle")
    return sides


def _ids(names: Any, wanted: Sequence[str]) -> dict[str, int]:
    """Ids of all the names: one pass for those spelt right, then the others one by one for their message."""
    found: dict[str, int] = names.find(wanted) if wanted else {}
    return found | {name: names.id_of(name) for name in dict.fromkeys(wanted) if name not in found}


def _asked(bundle: Bundle, sides: _Sides, entity: dict[str, int], relation: dict[str, int]) -> Asked:
    source = np.array([entity[name] if isinstance(name, str) else -1 for name in sides.source], np.int64)
    vector_QD = bundle.rows(bundle.vectors, np.maximum(source, 0))
    for at, name in enumerate(sides.source):
        if isinstance(name, Newcomer):
            vector_QD[at] = name.vector_D
    return Asked(source, np.array([relation[name] for name in sides.relation], np.int64), np.array(sides.direction, np.int64), vector_QD)


def _answer(bundle: Bundle, asked: Asked, number: NDArray[np.int64], top: int, filter: str) -> tuple[NDArray[Any], ...]:
    """Columns of open questions: side, rank, answer, score, probability, known."""
    nothing = [np.zeros(0, np.int64)] * len(number)
    best = best_answers(bundle, asked, not_competing(bundle, asked) if filter == "known" else nothing, top)
    known_Qk = np.stack([np.isin(ids, known) for ids, known in zip(best.id_Qk, known_answers(bundle, asked), strict=True)])
    # The place among what is not known yet, which the probability was fitted with.
    free_rank_Qk = 1 + np.cumsum(~known_Qk, axis=1) - ~known_Qk
    there = best.id_Qk >= 0
    rank_Qk = np.broadcast_to(np.arange(1.0, best.id_Qk.shape[1] + 1), best.id_Qk.shape)
    side_Qk, direction_Qk = (np.broadcast_to(column[:, None], best.id_Qk.shape)[there] for column in (number, asked.direction))
    score = best.score_Qk[there].astype(np.float64)
    chance = probability(bundle.manifest["calibration"], score, free_rank_Qk[there], direction_Qk)
    return side_Qk, rank_Qk[there], best.id_Qk[there], score, chance, known_Qk[there]


def _place(bundle: Bundle, asked: Asked, number: int, target: int) -> tuple[NDArray[Any], ...]:
    """Columns of one given fact, asked from one side."""
    score, rank = place(bundle, asked, target, not_competing(bundle, asked)[0])
    chance = probability(bundle.manifest["calibration"], np.array([score]), np.array([rank]), asked.direction)
    known = bool(np.isin(target, known_answers(bundle, asked)[0]))
    return tuple(np.array([value]) for value in (number, rank, target, score, float(chance[0]), known))


def columns_of(answers: Answers) -> dict[str, Any]:
    """The columns that users see: question, rank, head, relation, tail, answer, score, probability, known."""
    tails = answers.direction == 0
    pairs = list(zip(tails, answers.source, answers.answer, strict=True))
    return {
        "question": answers.question,
        "rank": answers.rank,
        "head": [source if asks_tail else answer for asks_tail, source, answer in pairs],
        "relation": answers.relation,
        "tail": [answer if asks_tail else source for asks_tail, source, answer in pairs],
        "answer": answers.answer,
        "side": [SIDES[direction] for direction in answers.direction],
        "score": answers.score,
        "probability": answers.probability,
        "known": answers.known,
    }


def frame(answers: Answers) -> pandas.DataFrame:
    """The answers as a DataFrame."""
    import pandas

    return pandas.DataFrame(columns_of(answers)).drop(columns="question")
