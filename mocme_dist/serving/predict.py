"""Answers questions in words: ids, labels, scores, ranks, probabilities, and the split in which an answer is known.

Answers are columns, not objects: a file of a hundred thousand questions is answered block by block into arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.calibration import Standing, gap_to, probability
from mocme_dist.serving.names import Names
from mocme_dist.serving.scorer import (
    FILTERS,
    SPLITS,
    Asked,
    Best,
    best_answers,
    better_counts,
    not_competing,
    place,
    splits_of,
)

if TYPE_CHECKING:
    import pandas

Integers = NDArray[np.int64]
SIDES = ("tail", "head")


class UnseenEntity(NamedTuple):
    """An entity that is not in the bundle.

    Attributes:
        name: what to call it in answers.
        vector_D: its fused vector.
        units: its unit vectors in the spaces of evidence, by space; see `evidence.units`.
    """

    name: str
    vector_D: NDArray[np.float32]
    units: Mapping[str, NDArray[np.float32]] = {}


class Question(NamedTuple):
    """(head, relation, None), (None, relation, tail), or a whole fact to be ranked.

    An unseen entity may be one side.
    """

    head: str | UnseenEntity | None
    relation: str
    tail: str | UnseenEntity | None


class Answers(NamedTuple):
    """Answers of all questions, one after another, best first; columns of equal length.

    Attributes:
        question: number of the question.
        direction: 0 answers with tails, 1 with heads.
        rank: 1 is best; of a given fact 1 + better + equal / 2. Only answers that compete are counted.
        answer: row of the answering entity.
        score, probability: of the fact that the answer makes.
        split: where that fact is known from, a position in SPLITS; -1 if it is not known.
        source, relation: rows; source is -1 for an unseen entity.
        unseen: name of the unseen entity of each question that has one.
        bundle: gives names to the rows.
    """

    question: Integers
    direction: Integers
    rank: NDArray[np.float64]
    answer: Integers
    score: NDArray[np.float64]
    probability: NDArray[np.float64]
    split: NDArray[np.int8]
    source: Integers
    relation: Integers
    unseen: dict[int, str]
    bundle: Bundle

    def columns(self) -> dict[str, Any]:
        """Return the columns that users see, by name.

        They are question, head, head_label, relation, relation_label, tail, tail_label, direction, rank, id, label,
        score, probability and known. `id` and `label` are those of the answer; `known` is train, valid, test, other or
        None.
        """
        source, source_label = self._sources()
        answer, label = (take(self.answer) for take in (self.bundle.entities.take, self.bundle.entities.take_labels))
        tails = self.direction == 0
        return {
            "question": self.question,
            "head": _either(tails, source, answer),
            "head_label": _either(tails, source_label, label),
            "relation": self.bundle.relations.take(self.relation),
            "relation_label": self.bundle.relations.take_labels(self.relation),
            "tail": _either(tails, answer, source),
            "tail_label": _either(tails, label, source_label),
            "direction": [SIDES[direction] for direction in self.direction],
            "rank": self.rank,
            "id": answer,
            "label": label,
            "score": self.score,
            "probability": self.probability,
            "known": [SPLITS[code] if code >= 0 else None for code in self.split],
        }

    def _sources(self) -> tuple[list[str], list[str]]:
        rows = np.maximum(self.source, 0)
        ids, labels = self.bundle.entities.take(rows), self.bundle.entities.take_labels(rows)
        for at in np.flatnonzero(self.source < 0):
            ids[at] = labels[at] = self.unseen[int(self.question[at])]
        return ids, labels

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per answer, with plain values; a probability that is not known is None."""
        columns = {
            name: column if isinstance(column, list) else column.tolist() for name, column in self.columns().items()
        }
        columns["probability"] = [None if value != value else value for value in columns["probability"]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def frame(self) -> pandas.DataFrame:
        """Return the answers as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.columns())


def _either(first: NDArray[np.bool_], a: list[str], b: list[str]) -> list[str]:
    """Return a's value where `first` is true, else b's."""
    return [x if use_a else y for use_a, x, y in zip(first, a, b, strict=True)]


class _Sides(NamedTuple):
    """Questions split into one-sided ones.

    Attributes:
        question: number of the question.
        source, relation: as they were given.
        direction: 0 asks for tails, 1 for heads.
        target: the given answer that is ranked; None asks for answers.
    """

    question: list[int]
    source: list[str | UnseenEntity]
    relation: list[str]
    direction: list[int]
    target: list[str | None]


def predict(
    bundle: Bundle,
    questions: Sequence[Question],
    k: int = 10,
    filter: str = "known",
    candidates: Sequence[str] | None = None,
    range: bool = False,
) -> Answers:
    """Answer questions; a fact with both sides given is ranked among all tails and among all heads.

    Args:
        k: number of answers to each question.
        filter: "known" leaves out the answers that any split has, "train" those of train, "none" leaves out nothing.
        candidates: entities that may be answers; None allows all.
        range: only entities that train has on this side of the relation may be answers.

    Raises:
        ConfigError: a name is unknown or ambiguous, a question has no side, or an argument is out of range.
    """
    if filter not in FILTERS:
        raise ConfigError(f"filter {filter!r}: expected {', '.join(FILTERS)}")
    if k < 1:
        raise ConfigError(f"k {k}: expected 1 or more")
    sides = _split(questions)
    texts = [text for text in (*sides.source, *sides.target, *(candidates or ())) if isinstance(text, str)]
    entity = rows_of(bundle.entities, texts)
    relation = rows_of(bundle.relations, sides.relation)
    asked = _asked(bundle, sides, entity, relation)
    wanted = None if candidates is None else np.unique(np.array([entity[text] for text in candidates], np.int64))
    open_ones = np.array([at for at, target in enumerate(sides.target) if target is None], np.int64)
    columns = []
    if len(open_ones):
        some = asked.take(open_ones)
        columns.append(_answer(bundle, some, open_ones, k, filter, _allowed(bundle, some, wanted, range)))
    for at, target in enumerate(sides.target):
        if target is not None:
            columns.append(_place(bundle, asked.take(np.array([at])), at, entity[target], filter))
    side, rank, answer, score, chance, split = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.lexsort((rank, side))
    side = side[order]
    number = np.asarray(sides.question, np.int64)
    unseen = {
        question: source.name
        for question, source in zip(sides.question, sides.source, strict=True)
        if isinstance(source, UnseenEntity)
    }
    return Answers(
        question=number[side],
        direction=asked.direction[side],
        rank=rank[order],
        answer=answer[order],
        score=score[order],
        probability=chance[order],
        split=split[order],
        source=asked.source[side],
        relation=asked.relation[side],
        unseen=unseen,
        bundle=bundle,
    )


def _split(questions: Sequence[Question]) -> _Sides:
    sides = _Sides([], [], [], [], [])

    def add(number: int, source: str | UnseenEntity, relation: str, direction: int, target: str | None) -> None:
        for column, value in zip(sides, (number, source, relation, direction, target), strict=True):
            column.append(value)  # type: ignore[attr-defined]

    for number, (head, relation, tail) in enumerate(questions):
        if not relation:
            raise ConfigError("no relation is given; a question is a relation with a head or a tail")
        if head is None and tail is None:
            raise ConfigError(f"relation {relation!r}: neither head nor tail is given; a question needs one of them")
        if isinstance(head, UnseenEntity) and isinstance(tail, UnseenEntity):
            raise ConfigError("head and tail are both new entities; one of them must be in the bundle")
        if head is not None and not isinstance(tail, UnseenEntity):
            add(number, head, relation, 0, tail)
        if tail is not None and not isinstance(head, UnseenEntity):
            add(number, tail, relation, 1, head)
    return sides


def rows_of(names: Names, texts: Sequence[str]) -> dict[str, int]:
    """Return the row of each text.

    Raises:
        ConfigError: one is unknown or ambiguous.
    """
    found = names.lookup(texts) if texts else {}
    for text in dict.fromkeys(texts):
        if len(found.get(text, ())) != 1:
            raise ConfigError(names.problem(text, found.get(text, ())))
    return {text: rows[0] for text, rows in found.items()}


def _asked(bundle: Bundle, sides: _Sides, entity: dict[str, int], relation: dict[str, int]) -> Asked:
    source = np.array([entity[text] if isinstance(text, str) else -1 for text in sides.source], np.int64)
    vector_QD = bundle.rows(bundle.vector_parts, np.maximum(source, 0))
    units: dict[str, NDArray[np.float32]] = {}
    for at, unseen in enumerate(sides.source):
        if isinstance(unseen, UnseenEntity):
            vector_QD[at] = unseen.vector_D
            for name, unit_F in unseen.units.items():
                units.setdefault(name, np.zeros((len(source), len(unit_F)), np.float32))[at] = unit_F
    relations = np.array([relation[text] for text in sides.relation], np.int64)
    return Asked(source, relations, np.array(sides.direction, np.int64), vector_QD, units)


class _Allowed(NamedTuple):
    """Which entities may answer each question, ascending; `chosen` says whether the user listed them."""

    candidates: list[Integers] | None
    chosen: bool


def _allowed(bundle: Bundle, asked: Asked, wanted: Integers | None, range: bool) -> _Allowed:
    if not range:
        return _Allowed(None if wanted is None else [wanted] * len(asked.source), wanted is not None)
    place_Q = 2 * asked.relation + asked.direction
    seen = {int(place): bundle.facts_of_train.answers(int(place))[0] for place in np.unique(place_Q)}
    if wanted is not None:
        seen = {place: np.intersect1d(ids, wanted) for place, ids in seen.items()}
    return _Allowed([seen[int(place)] for place in place_Q], wanted is not None)


def _answer(
    bundle: Bundle, asked: Asked, number: Integers, k: int, filter: str, allowed: _Allowed
) -> tuple[NDArray[Any], ...]:
    """Return columns of open questions: side, rank, answer, score, probability, split."""
    left_out = not_competing(bundle, asked, filter)
    best = best_answers(bundle, asked, left_out, max(k, 2), allowed.candidates)  # two, for the gap
    split_Qk = splits_of(bundle, asked, best.id_Qk)
    there = best.id_Qk >= 0
    there[:, k:] = False
    rank_Qk = np.broadcast_to(np.arange(1.0, best.id_Qk.shape[1] + 1), best.id_Qk.shape)
    side_Qk, relation_Qk, direction_Qk = (
        np.broadcast_to(column[:, None], best.id_Qk.shape)[there]
        for column in (number, asked.relation, asked.direction)
    )
    score = best.score_Qk[there].astype(np.float64)
    free_rank, gap = (column[there] for column in _standing(bundle, asked, best, split_Qk, allowed))
    chance = probability(bundle.manifest["calibration"], Standing(score, free_rank, gap), relation_Qk, direction_Qk)
    return side_Qk, rank_Qk[there], best.id_Qk[there], score, chance, split_Qk[there]


def _standing(
    bundle: Bundle, asked: Asked, best: Best, split_Qk: NDArray[np.int8], allowed: _Allowed
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (Q, k) ranks and gaps among the answers that compete by default, which the calibration was fitted with.

    Candidates that the user listed say nothing about how many others score higher, so those are counted.
    """
    Q = len(best.id_Qk)
    irreflexive_Q = ~np.isin(asked.relation, bundle.manifest["reflexive"])
    out_Qk = (split_Qk >= 0) | ((best.id_Qk == asked.source[:, None]) & irreflexive_Q[:, None]) | (best.id_Qk < 0)
    rivals = Best(np.full((Q, 2), -np.inf, np.float32), np.full((Q, 2), -1, np.int64))  # the two best that compete
    if allowed.chosen:
        rank_Qk = 1.0 + better_counts(bundle, asked, not_competing(bundle, asked), best).astype(np.float64)
        lacking = np.arange(Q)
    else:
        rank_Qk = np.asarray(1.0 + np.cumsum(~out_Qk, axis=1) - ~out_Qk, np.float64)
        first_Q2 = np.argsort(out_Qk, axis=1, kind="stable")[:, :2]
        there_Q2 = ~np.take_along_axis(out_Qk, first_Q2, 1)
        width = first_Q2.shape[1]
        rivals.score_Qk[:, :width][there_Q2] = np.take_along_axis(best.score_Qk, first_Q2, 1)[there_Q2]
        rivals.id_Qk[:, :width][there_Q2] = np.take_along_axis(best.id_Qk, first_Q2, 1)[there_Q2]
        # Where known answers fill the list, the best that compete are behind it.
        lacking = np.flatnonzero((rivals.id_Qk[:, 1] < 0) & (best.id_Qk[:, -1] >= 0))
    if len(lacking):
        some = asked.take(lacking)
        chosen = None if allowed.candidates is None or allowed.chosen else [allowed.candidates[q] for q in lacking]
        found = best_answers(bundle, some, not_competing(bundle, some), 2, chosen)
        width = found.id_Qk.shape[1]
        rivals.score_Qk[lacking, :width] = found.score_Qk
        rivals.id_Qk[lacking, :width] = found.id_Qk
    second_Qk = best.id_Qk == rivals.id_Qk[:, :1]
    other_Qk = np.where(second_Qk, rivals.score_Qk[:, 1:], rivals.score_Qk[:, :1])
    return rank_Qk, gap_to(best.score_Qk, other_Qk)


def _place(bundle: Bundle, asked: Asked, number: int, target: int, filter: str) -> tuple[NDArray[Any], ...]:
    """Return columns of one given fact, asked from one side."""
    score, rank, other = place(bundle, asked, target, not_competing(bundle, asked, filter)[0])
    free = rank
    if filter != "known":
        _, free, other = place(bundle, asked, target, not_competing(bundle, asked)[0])
    standing = Standing(*(np.array([value]) for value in (score, free, gap_to(np.array(score), np.array(other)))))
    chance = float(probability(bundle.manifest["calibration"], standing, asked.relation, asked.direction)[0])
    split = splits_of(bundle, asked, np.array([[target]]))[0, 0]
    return tuple(np.array([value]) for value in (number, rank, target, score, chance, split))


def facts(bundle: Bundle, entity: int) -> list[dict[str, Any]]:
    """Return the known facts of an entity, by relation; see `Bundle.facts`."""
    places, others = _facts_of(bundle, entity)
    asked = Asked.of(bundle, np.full(len(places), entity), places // 2, places % 2)
    split = splits_of(bundle, asked, others[:, None])[:, 0]
    columns = {
        "direction": [SIDES[place % 2] for place in places],
        "relation": bundle.relations.take(places // 2),
        "relation_label": bundle.relations.take_labels(places // 2),
        "row": others.tolist(),
        "id": bundle.entities.take(others),
        "label": bundle.entities.take_labels(others),
        "known": [SPLITS[code] for code in split],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _facts_of(bundle: Bundle, entity: int) -> tuple[Integers, Integers]:
    """Return the place of each fact of an entity (2 * relation + direction) and the other entity."""
    per_entity = 2 * bundle.num_relations
    low, high = np.searchsorted(bundle.known.keys, [entity * per_entity, (entity + 1) * per_entity])
    offsets = np.asarray(bundle.known.offsets[low : high + 1])
    places = np.repeat(np.asarray(bundle.known.keys[low:high]) % per_entity, np.diff(offsets))
    return places, np.asarray(bundle.known.targets[offsets[0] : offsets[-1]])
