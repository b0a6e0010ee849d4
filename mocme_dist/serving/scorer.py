"""Ranks answers by row: rotate the source, score the candidates, leave out those that do not compete.

A question asks for the tail (direction 0) or the head (direction 1) of a source and a relation. Known answers do not
compete, nor does the source itself, unless the relation joins some entity to itself in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evidence.votes import LAST
from mocme_dist.kernels.scan import distances, nearest
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.evidence import ServedEvidence, keep_only, leave_out, top_scores

Integers = NDArray[np.int64]
FILTERS = ("known", "train", "none")
SPLITS = ("train", "valid", "test", "other")
_BLOCK = 64  # questions that pass over the rows together
_CHUNK_ROWS = 1 << 16


class Asked(NamedTuple):
    """Q questions by row.

    Attributes:
        source: entity, or -1 for an unseen one.
        relation, direction: relation, and 0 for tails or 1 for heads.
        vector_QD: (Q, D) vectors of the sources.
        units: by space of evidence, (Q, F) units of unseen sources; zeros where the source has none.
    """

    source: Integers
    relation: Integers
    direction: Integers
    vector_QD: NDArray[np.float32]
    units: Mapping[str, NDArray[np.float32]] = MappingProxyType({})

    @classmethod
    def of(cls, bundle: Bundle, source: Integers, relation: Integers, direction: Integers) -> Asked:
        """Return questions about entities of the bundle."""
        source, relation, direction = (np.asarray(column, np.int64) for column in (source, relation, direction))
        return cls(source, relation, direction, bundle.rows(bundle.vector_parts, source))

    def take(self, index: Integers) -> Asked:
        """Return some of the questions."""
        units = {name: unit_QF[index] for name, unit_QF in self.units.items()}
        return Asked(self.source[index], self.relation[index], self.direction[index], self.vector_QD[index], units)


class Best(NamedTuple):
    """Answers of Q questions, best first: score (Q, k) float32, id (Q, k), -1 where there are no more."""

    score_Qk: NDArray[np.float32]
    id_Qk: Integers


def rotated(bundle: Bundle, asked: Asked) -> NDArray[np.float32]:
    """Return (Q, D) sources rotated by their relations, against the phase for heads; `model.rotate` in numpy."""
    phase_QC = bundle.phase_RC[asked.relation] * (1 - 2 * asked.direction[:, None]).astype(np.float32)
    real, imaginary = np.split(np.asarray(asked.vector_QD, np.float32), 2, axis=1)
    cos, sin = np.cos(phase_QC), np.sin(phase_QC)
    return np.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=1).astype(np.float32)


def answers_in(known: KnownAnswers, asked: Asked) -> list[Integers]:
    """Return the answers that a table has for each question, ascending; none for unseen sources."""
    in_graph = asked.source >= 0
    offsets, targets = known.lookup(np.maximum(asked.source, 0), asked.relation, asked.direction)
    parts = np.split(targets, offsets[1:-1])
    return [part if there else part[:0] for part, there in zip(parts, in_graph, strict=True)]


def splits_of(bundle: Bundle, asked: Asked, id_Qk: Integers) -> NDArray[np.int8]:
    """Return (Q, k) where each answer is known from: a position in SPLITS, or -1 if it is not known."""
    out = np.full(id_Qk.shape, -1, np.int8)
    tables = [bundle.known, *(bundle.known_in[split] for split in ("test", "valid", "train"))]
    for code, known in zip((3, 2, 1, 0), tables, strict=True):
        for row, ids, answers in zip(out, id_Qk, answers_in(known, asked), strict=True):
            row[np.isin(ids, answers)] = code
    return out


def not_competing(bundle: Bundle, asked: Asked, filter: str = "known") -> list[Integers]:
    """Return the ids that do not compete: known answers, and the source of a relation that is never reflexive.

    Args:
        filter: "known" leaves out the answers of all files, "train" those of train, "none" nothing at all.
    """
    if filter == "none":
        return [np.zeros(0, np.int64)] * len(asked.source)
    reflexive = np.isin(asked.relation, bundle.manifest["reflexive"])
    known = answers_in(bundle.known if filter == "known" else bundle.known_in["train"], asked)
    return [
        part if itself or at < 0 else np.union1d(part, at)
        for part, itself, at in zip(known, reflexive, asked.source, strict=True)
    ]


def best_answers(
    bundle: Bundle,
    asked: Asked,
    left_out: Sequence[Integers],
    top: int,
    candidates: Sequence[Integers] | None = None,
) -> Best:
    """Return the `top` best answers of each question.

    Args:
        left_out: ids of each question that do not compete, ascending.
        top: k; fewer columns where the bundle has fewer entities.
        candidates: ids of each question that may be answers, ascending; None allows all.
    """
    Q, k = len(asked.source), min(top, bundle.num_entities)
    found = Best(np.full((Q, k), -np.inf, np.float32), np.full((Q, k), -1, np.int64))
    query_QD = rotated(bundle, asked)
    for start in range(0, Q, _BLOCK):
        block = slice(start, start + _BLOCK)
        some = asked.take(np.arange(Q)[block])
        if bundle.evidence is not None:
            for first, score_Qn in _blended(bundle, bundle.evidence, some, query_QD[block]):
                if candidates is not None:
                    keep_only(score_Qn, candidates[block], first)
                leave_out(score_Qn, left_out[block], first)
                top_scores(score_Qn, first, found.score_Qk[block], found.id_Qk[block])
            continue
        if candidates is not None:
            for q in range(start, min(start + _BLOCK, Q)):
                _nearest_of(bundle, query_QD[q : q + 1], np.setdiff1d(candidates[q], left_out[q]), found, q)
            continue
        # Left out in the scan itself: a list long enough to leave them out afterwards would be as long as a hub has
        # answers.
        some_out = (
            [np.union1d(ids, bundle.unknown) for ids in left_out[block]] if len(bundle.unknown) else left_out[block]
        )
        near = nearest(bundle.vector_parts, query_QD[block], k, left_out=some_out)
        found.id_Qk[block] = near.id_Qk
        found.score_Qk[block] = bundle.gamma - near.distance_Qk
        if len(bundle.unknown):
            _append_unknown(bundle, found, left_out, range(start, min(start + _BLOCK, Q)))
    return found


def _append_unknown(bundle: Bundle, found: Best, left_out: Sequence[Integers], questions: Iterable[int]) -> None:
    """Fill places that are free with the entities that rank last."""
    for q in questions:
        free = np.flatnonzero(found.id_Qk[q] < 0)
        more = np.setdiff1d(bundle.unknown, left_out[q])[: len(free)]
        found.id_Qk[q, free[: len(more)]] = more
        found.score_Qk[q, free[: len(more)]] = LAST


def _nearest_of(bundle: Bundle, query_1D: NDArray[np.float32], ids: Integers, found: Best, q: int) -> None:
    """Fill the answers of question q with the nearest of a few candidates."""
    rows = bundle.rows(bundle.vector_parts, ids).astype(bundle.vector_parts[0].dtype)
    score_1n = bundle.gamma - distances(rows, query_1D)
    score_1n[0, np.isin(ids, bundle.unknown)] = LAST
    order = np.lexsort((ids, -score_1n[0]))[: found.id_Qk.shape[1]]
    order = order[~np.isnan(score_1n[0, order])]
    found.id_Qk[q, : len(order)] = ids[order]
    found.score_Qk[q, : len(order)] = score_1n[0, order]


def better_counts(bundle: Bundle, asked: Asked, left_out: Sequence[Integers], best: Best) -> Integers:
    """Return (Q, k) numbers of competing entities that score higher than each answer, whatever its candidates were."""
    count_Qk = np.zeros(best.id_Qk.shape, np.int64)
    query_QD = rotated(bundle, asked)
    for start in range(0, len(count_Qk), _BLOCK):
        block = slice(start, start + _BLOCK)
        for first, score_Qn in all_scores(bundle, asked.take(np.arange(len(count_Qk))[block]), query_QD[block]):
            leave_out(score_Qn, left_out[block], first)
            for count_k, score_k, score_n in zip(count_Qk[block], best.score_Qk[block], score_Qn, strict=True):
                count_k += len(score_n) - np.searchsorted(np.sort(score_n), score_k, side="right")
    return count_Qk


def all_scores(
    bundle: Bundle, asked: Asked, query_QD: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the scores of all entities, as (row of the first, scores (Q, n)), in order."""
    if bundle.evidence is not None:
        yield from _blended(bundle, bundle.evidence, asked, query_QD)
        return
    first = 0
    for part in bundle.vector_parts:
        for start in range(0, len(part), _CHUNK_ROWS):
            score_Qn = np.asarray(bundle.gamma - distances(part[start : start + _CHUNK_ROWS], query_QD))
            low, high = np.searchsorted(bundle.unknown, [first + start, first + start + score_Qn.shape[1]])
            score_Qn[:, bundle.unknown[low:high] - first - start] = LAST
            yield first + start, score_Qn
        first += len(part)


def _blended(
    bundle: Bundle, evidence: ServedEvidence, asked: Asked, query_QD: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield blended scores of all entities, as (row of the first, scores (Q, n)), in order."""
    prepared = evidence.prepare(asked)
    for part, rows in enumerate(bundle.vector_parts):
        for start in range(0, len(rows), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(rows))
            first = bundle.partition.bounds(part)[0] + start
            yield first, evidence.scores(prepared, query_QD, part, start, stop)


def place(bundle: Bundle, asked: Asked, target: int, left_out: Integers) -> tuple[float, float, float]:
    """Return score and rank of one answer to the one question in `asked`, and the best score of the others.

    The rank is 1 + better + equal / 2, as evaluation ranks.

    Args:
        left_out: ids that do not compete with the target; the target may be among them.
    """
    scores = all_scores(bundle, asked, rotated(bundle, asked))
    score_E = np.concatenate([score_Qn[0] for _, score_Qn in scores])
    others_E = np.delete(score_E, np.union1d(left_out, target))
    above, equal = (others_E > score_E[target]).sum(), (others_E == score_E[target]).sum()
    return float(score_E[target]), 1 + int(above) + int(equal) / 2, float(others_E.max(initial=-np.inf))
