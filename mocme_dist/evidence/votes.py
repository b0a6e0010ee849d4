"""Distinct queries, and the votes of the nearest entities for the answers that they have in train; numpy alone.

Every rank knows the merged lists of neighbours and the facts of train, and keeps the votes for its own entities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.evidence.facts import Facts, Integers, ranges
from mocme_dist.evidence.units import NOBODY, cosine_of, from_keys
from mocme_dist.kernels.evidence import EvidenceKernels

Floats = NDArray[np.float64]
# Sums of votes that are held at once: 8 MB.
_SUMS = 1 << 20
FLOOR = 1e-3
# Bias of a candidate that nothing is known of: its score is this number, whatever its distance.
LAST = -1e30


class Entries(NamedTuple):
    """Values of some candidates of each query, by query, then by candidate: offsets (U + 1,), local rows and values."""

    offsets: Integers
    row: NDArray[np.int32]
    value: NDArray[np.float32]


def spread(entries: Entries, at_u: Integers, num_queries: int) -> Entries:
    """Entries of some queries as those of all, of which they are the ones at `at_u`."""
    length_U = np.zeros(num_queries, np.int64)
    length_U[at_u] = np.diff(entries.offsets)
    return entries._replace(offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(length_U)]))


def to_entries(query: Integers, row: Integers, value: Floats, num_queries: int) -> Entries:
    """Entries of ascending (query, row)."""
    offsets = np.searchsorted(query, np.arange(num_queries + 1))
    return Entries(offsets, row.astype(np.int32), value.astype(np.float32))


def largest(query: Integers, keys: Integers, num_queries: int, count: int) -> Integers:
    """(u, count) the largest keys of each query, in descending order, `NOBODY` where there are fewer.

    `query` ascends.
    """
    out = np.full((num_queries, count), NOBODY)
    order = np.lexsort((-keys, query))
    begin = np.searchsorted(query, np.arange(num_queries))
    place = np.arange(len(query)) - begin[query]
    kept = place < count
    out[query[kept], place[kept]] = keys[order][kept]
    return out


class Asked(NamedTuple):
    """U distinct queries without their answers: sources, and places in ascending order."""

    source_U: Integers
    place_U: Integers

    @classmethod
    def distinct(cls, source: Integers, relation: Integers, direction: Integers) -> tuple[Asked, Integers]:
        """The distinct queries, and which of them each query is."""
        place = 2 * np.asarray(relation) + np.asarray(direction)
        pairs, index = np.unique(np.stack([place, np.asarray(source)], 1), axis=0, return_inverse=True)
        return cls(np.ascontiguousarray(pairs[:, 1]), np.ascontiguousarray(pairs[:, 0])), index.reshape(-1)


def vote_weights(keys_Uk: Integers, beta: float) -> NDArray[np.float64]:
    """(U, k) softmax of beta cosine over each query's neighbours, times the cosine of the nearest.

    0 where there is none.
    """
    closeness_Uk, _ = from_keys(keys_Uk)
    there_Uk = keys_Uk != NOBODY
    cosine_Uk = np.where(there_Uk, cosine_of(closeness_Uk), -np.inf)
    nearest_U1 = np.where(there_Uk.any(1), cosine_Uk.max(1, initial=-np.inf), 0.0)[:, None]
    weight_Uk = np.where(there_Uk, np.exp(beta * (cosine_Uk - nearest_U1)), 0.0)
    total_U1 = weight_Uk.sum(1, keepdims=True)
    return weight_Uk / np.where(total_U1 > 0, total_U1, 1.0) * np.maximum(nearest_U1, 0.0)


def votes(
    keys_Uk: Integers,
    beta: float,
    asked: Asked,
    facts: Facts,
    first: int,
    last: int,
    kernels: EvidenceKernels | None = None,
) -> Entries:
    """log(A + FLOOR) - log(FLOOR) of the entities [first, last) with votes, A the sum of the votes for each."""
    weight_Uk, ids_Uk = vote_weights(keys_Uk, beta), from_keys(keys_Uk)[1]
    if kernels is not None:
        offsets, row, total = kernels.votes(facts.table(first, last), asked.place_U, ids_Uk, weight_Uk)
        return Entries(offsets, row, (np.log(total + FLOOR) - np.log(FLOOR)).astype(np.float32))
    query, neighbour = np.nonzero(weight_Uk > 0)
    places = asked.place_U[query]
    start, length = facts.known.spans(ids_Uk[query, neighbour], places // 2, places % 2)
    ends, rows, found = np.searchsorted(query, np.arange(len(asked.source_U) + 1)), last - first, []
    size = max(1, _SUMS // max(1, rows))
    for low in range(0, len(asked.source_U), size):
        part = slice(ends[low], ends[min(low + size, len(asked.source_U))])
        targets = facts.known.targets[ranges(start[part], length[part])] - first
        mine = (targets >= 0) & (targets < rows)
        at = (np.repeat(query[part] - low, length[part]) * rows + targets)[mine]
        weight = np.repeat(weight_Uk[query[part], neighbour[part]], length[part])[mine]
        sums = np.bincount(at, weight)  # in the order of the neighbours, on every rank
        distinct = np.flatnonzero(sums > 0)
        found.append((distinct + low * rows, sums[distinct]))
    pair = np.concatenate([np.zeros(0, np.int64), *(pair for pair, _ in found)])
    value = np.log(np.concatenate([np.zeros(0), *(value for _, value in found)]) + FLOOR) - np.log(FLOOR)
    return to_entries(pair // max(1, rows), pair % max(1, rows), value, len(asked.source_U))
