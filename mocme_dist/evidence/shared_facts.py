"""Likeness by shared facts: cosines of sparse vectors with a column for each (place, neighbour), weighted by tf-idf.

No vector is stored: the facts of an entity and the holders of a fact are read from the table of known answers. A fact
that more than `max_holders` entities have says little and would cost most: it is no column. Every rank reads what it
needs of any entity, and gives likenesses to its own entities only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.evidence.facts import Facts, Integers, ranges
from mocme_dist.evidence.units import NOBODY, closeness_of, to_keys
from mocme_dist.evidence.votes import Entries, largest, to_entries
from mocme_dist.kernels.evidence import EvidenceKernels, FactTable

Floats = NDArray[np.float64]
# Sums of likenesses to a rank's entities that are held at once: 8 MB.
_SUMS = 1 << 20
_IDS = 1 << 16


class Columns(NamedTuple):
    """Sparse rows, flat: which row, the column as place and neighbour, how many hold it, and its weight."""

    row: Integers
    place: Integers
    neighbour: Integers
    start: Integers
    holders: Integers
    idf: Floats


class SharedFacts:
    """Likeness to the entities [first, last).

    Args:
        facts: of train.
        max_holders: entities that a fact may have to be a column.
        max_answers: known answers of a query that its mean is taken of, those of the smallest ids.
        kernels: of evidence.cpp, or None for numpy.
    """

    def __init__(
        self,
        facts: Facts,
        first: int,
        last: int,
        max_holders: int,
        max_answers: int,
        kernels: EvidenceKernels | None = None,
    ) -> None:
        self.facts, self.first, self.last, self.kernels = facts, first, last, kernels
        self.max_holders, self.max_answers = max_holders, max_answers
        most = int(np.diff(facts.known.offsets).max(initial=0))
        self._idf_h = np.log(facts.num_entities / np.maximum(np.arange(min(most, max_holders) + 1), 1))
        ids = np.arange(first, last)
        parts = [self.lengths(ids[start : start + _IDS]) for start in range(0, len(ids), _IDS)]
        self.length_r = np.concatenate([np.zeros(0), *parts])

    def columns(self, ids: Integers) -> Columns:
        """The columns of some entities."""
        row, place, neighbour = self.facts.facts_of(ids)
        start, holders = self.facts.holders(place, neighbour)
        kept = holders <= self.max_holders
        row, place, neighbour, start, holders = (part[kept] for part in (row, place, neighbour, start, holders))
        return Columns(row, place, neighbour, start, holders, self._idf_h[holders])

    def lengths(self, ids: Integers) -> Floats:
        """(n,) lengths of the vectors of some entities; 0 without a column."""
        columns = self.columns(ids)
        return np.sqrt(np.bincount(columns.row, np.square(columns.idf), minlength=len(ids)))

    def nearest(self, source_U: Integers, place_U: Integers, count: int) -> Integers:
        """(U, count) keys (`units`) of the nearest of this rank's entities that have a fact at the query's place.

        Args:
            source_U: ids. place_U: best in order, so that neighbours share their place.
        """
        if self.kernels is not None:
            arrays = (self._table(), self._idf_h, self.length_r, source_U, place_U)
            return self.kernels.shared_nearest(*arrays, self.max_holders, count)
        keys_Uk = np.full((len(source_U), count), NOBODY)
        for block in self._blocks(len(source_U)):
            source_u, place_u = source_U[block], place_U[block]
            columns, length_u = self.columns(source_u), self.lengths(source_u)
            sums_ur = self._sums(columns.row, columns, np.square(columns.idf), len(source_u))
            query, row = _positive(sums_ur)
            kept = self._has_place(query, row, place_u) & (row + self.first != source_u[query])
            query, row = query[kept], row[kept]
            cosine = sums_ur[query, row] / (length_u[query] * self.length_r[row])
            keys = to_keys(closeness_of(np.minimum(cosine, 1.0)), row + self.first)
            keys_Uk[block] = largest(query, keys, len(source_u), count)
        return keys_Uk

    def likeness(self, source_U: Integers, place_U: Integers) -> Entries:
        """Cosines of this rank's entities to the mean of each query's known answers.

        Those that share nothing are left out.
        """
        if self.kernels is not None:
            arrays = (self._table(), self._idf_h, self.length_r, source_U, place_U)
            offsets, rows, likeness = self.kernels.shared_likeness(*arrays, self.max_holders, self.max_answers)
            return Entries(offsets, rows, likeness.astype(np.float32))
        found = []
        for block in self._blocks(len(source_U)):
            source_u, place_u = source_U[block], place_U[block]
            start, length = self.facts.known.spans(source_u, place_u // 2, place_u % 2)
            length = np.minimum(length, self.max_answers)
            answers, query = self.facts.known.gather(start, length), np.repeat(np.arange(len(source_u)), length)
            columns = self._mean(answers, query, source_u, place_u)
            weight = columns.idf  # of the mean, not the column's
            size_u = np.sqrt(np.bincount(columns.row, np.square(weight), minlength=len(source_u)))
            sums_ur = self._sums(columns.row, columns, weight * self._idf_h[columns.holders], len(source_u))
            query, row = _positive(sums_ur)
            found.append((query + block.start, row, sums_ur[query, row] / (size_u[query] * self.length_r[row])))
        query, row, value = (
            np.concatenate([np.zeros(0, kind), *parts])
            for kind, parts in zip(
                (np.int64, np.int64, float), zip(*found, strict=True) if found else ([], [], []), strict=True
            )
        )
        return to_entries(query, row, value, len(source_U))

    def _table(self) -> FactTable:
        return self.facts.table(self.first, self.last)

    def _mean(self, answers: Integers, query: Integers, source_u: Integers, place_u: Integers) -> Columns:
        """Sum of the unit vectors of each query's answers, weighted by `idf`, without the column that makes them
        answers.
        """
        columns = self.columns(answers)
        length = np.sqrt(np.bincount(columns.row, np.square(columns.idf), minlength=len(answers)))
        owner = query[columns.row]
        kept = (columns.place != (place_u[owner] ^ 1)) | (columns.neighbour != source_u[owner])
        weight = columns.idf / np.where(length > 0, length, 1.0)[columns.row]
        order = np.lexsort((columns.neighbour, columns.place, owner))
        order = order[kept[order]]
        owner, place, neighbour = owner[order], columns.place[order], columns.neighbour[order]
        new = np.ones(len(order), bool)
        new[1:] = (owner[1:] != owner[:-1]) | (place[1:] != place[:-1]) | (neighbour[1:] != neighbour[:-1])
        group = np.cumsum(new) - 1
        summed = np.bincount(group, weight[order], minlength=int(new.sum())).astype(np.float64)
        start, holders = columns.start[order][new], columns.holders[order][new]
        return Columns(owner[new], place[new], neighbour[new], start, holders, summed)

    def _blocks(self, num_queries: int) -> Iterator[slice]:
        size = max(1, _SUMS // max(1, self.last - self.first))
        return (slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size))

    def _sums(self, query: Integers, columns: Columns, weight: Floats, num_queries: int) -> Floats:
        """(u, r) sums of the weights of the columns that each entity of this rank holds, in the order of
        the columns.
        """
        holder = self.facts.known.targets[ranges(columns.start, columns.holders)] - self.first
        rows = self.last - self.first
        inside = (holder >= 0) & (holder < rows)
        at = (np.repeat(query, columns.holders) * rows + holder)[inside]
        weights = np.repeat(weight, columns.holders)[inside]
        sums = np.bincount(at, weights, minlength=num_queries * rows).astype(np.float64, copy=False)
        return sums.reshape(num_queries, rows)

    def _has_place(self, query: Integers, row: Integers, place_u: Integers) -> NDArray[np.bool_]:
        """Which of some pairs, by query, are of an entity that has a fact at the query's place."""
        has = np.zeros(len(row), bool)
        starts = np.flatnonzero(np.diff(place_u, prepend=-1))  # of runs of one place
        for begin, end in zip(starts, [*starts[1:], len(place_u)], strict=True):
            low, high = np.searchsorted(query, [begin, end])
            sources = self.facts.sources(int(place_u[begin])) - self.first
            mask_r = np.zeros(self.last - self.first, bool)
            mask_r[sources[(sources >= 0) & (sources < len(mask_r))]] = True
            has[low:high] = mask_r[row[low:high]]
        return has


def _positive(sums_ur: Floats) -> tuple[Integers, Integers]:
    """Places of the sums above 0: of booleans they are found five times as fast as of numbers."""
    at = np.flatnonzero(sums_ur.ravel() > 0)
    return at // sums_ur.shape[1], at % sums_ur.shape[1]
