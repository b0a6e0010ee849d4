"""Questions by id to ranked answers by id: rotate, scan, leave out what does not compete.

A question asks for the tail (direction 0) or the head (direction 1) of a source and a relation. What the graph knows
already does not compete, nor does the source itself, unless the relation joins some entity to itself in the graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.kernel import distances, nearest

Integers = NDArray[np.int64]
_BLOCK = 64  # questions that pass over the rows together
_CHUNK_ROWS = 1 << 16


class Asked(NamedTuple):
    """Q questions by id: source -1 is an entity that is not in the bundle, whose vector is in `vector_QD` all the same."""

    source: Integers
    relation: Integers
    direction: Integers
    vector_QD: NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle, source: Integers, relation: Integers, direction: Integers) -> Asked:
        """Questions about entities of the bundle."""
        source, relation, direction = (np.asarray(column, np.int64) for column in (source, relation, direction))
        return cls(source, relation, direction, bundle.rows(bundle.vectors, source))

    def take(self, index: Integers) -> Asked:
        """Some of them."""
        return Asked(self.source[index], self.relation[index], self.direction[index], self.vector_QD[index])


class Best(NamedTuple):
    """Answers of Q questions, best first: score (Q, k) float32, id (Q, k) with -1 where there are no more."""

    score_Qk: NDArray[np.float32]
    id_Qk: Integers


def rotated(bundle: Bundle, asked: Asked) -> NDArray[np.float32]:
    """(Q, D) sources rotated by their relations, against the phase for heads; `model.rotate` in numpy."""
    phase_QC = bundle.phase_RC[asked.relation] * (1 - 2 * asked.direction[:, None]).astype(np.float32)
    real, imaginary = np.split(np.asarray(asked.vector_QD, np.float32), 2, axis=1)
    cos, sin = np.cos(phase_QC), np.sin(phase_QC)
    return np.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=1).astype(np.float32)


def known_answers(bundle: Bundle, asked: Asked) -> list[Integers]:
    """The answers of each question that the graph has already, ascending."""
    in_graph = asked.source >= 0
    offsets, targets = bundle.known.lookup(np.maximum(asked.source, 0), asked.relation, asked.direction)
    parts = np.split(targets, offsets[1:-1])
    return [part if there else part[:0] for part, there in zip(parts, in_graph, strict=True)]


def not_competing(bundle: Bundle, asked: Asked) -> list[Integers]:
    """Known answers, and the source where its relation joins no entity to itself."""
    reflexive = np.isin(asked.relation, bundle.manifest["reflexive"])
    known = known_answers(bundle, asked)
    return [part if itself or at < 0 else np.union1d(part, at) for part, itself, at in zip(known, reflexive, asked.source, strict=True)]


def best_answers(bundle: Bundle, asked: Asked, left_out: list[Integers], top: int) -> Best:
    """The `top` best answers of each question.

    Args:
        left_out: ids of each question that do not compete, ascending.
        top: k; fewer columns where the bundle has fewer entities.
    """
    Q, k = len(asked.source), min(top, bundle.num_entities)
    found = Best(np.full((Q, k), -np.inf, np.float32), np.full((Q, k), -1, np.int64))
    query_QD = rotated(bundle, asked)
    for start in range(0, Q, _BLOCK):
        block = slice(start, start + _BLOCK)
        # Left out in the scan itself: a list long enough to leave them out afterwards would be as long as a hub has answers.
        near = nearest(bundle.vectors, query_QD[block], k, left_out=left_out[block])
        found.id_Qk[block] = near.id_Qk
        found.score_Qk[block] = bundle.gamma - near.distance_Qk
    return found


def place(bundle: Bundle, asked: Asked, target: int, left_out: Integers) -> tuple[float, float]:
    """Score and rank of one answer to the one question in `asked`: 1 + better + equal / 2, as evaluation ranks.

    Args:
        left_out: ids that do not compete with the target; the target may be among them.
    """
    query_1D = rotated(bundle, asked)
    wanted = float(distances(bundle.rows(bundle.vectors, np.array([target])).astype(bundle.vectors[0].dtype), query_1D)[0, 0])
    skip = np.union1d(left_out, target)
    better = equal = first = 0
    for part in bundle.vectors:
        for start in range(0, len(part), _CHUNK_ROWS):
            rows = part[start : start + _CHUNK_ROWS]
            distance = distances(rows, query_1D)[0]
            here = skip[(skip >= first + start) & (skip < first + start + len(rows))] - first - start
            distance[here] = np.inf
            better += int((distance < wanted).sum())
            equal += int((distance == wanted).sum())
        first += len(part)
    return bundle.gamma - wanted, 1 + better + equal / 2
