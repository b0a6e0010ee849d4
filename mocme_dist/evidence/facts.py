"""The training facts by place, where a place is a relation with a direction: 2 * relation + direction.

Gives the entities that have a fact at a place, how often an entity answers there, and the facts of an entity. All of it
is read from the table of known answers, whose arrays are mapped from disk and shared by the processes of a machine.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.known import KnownAnswers
from mocme_dist.kernels.evidence import FactTable

Integers = NDArray[np.int64]


def ranges(start: Integers, length: Integers) -> Integers:
    """Numbers of several ranges one after another: start[i], start[i] + 1, ..., start[i] + length[i] - 1."""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


class Facts:
    """Train facts by place.

    Attributes:
        known: the answers of each query, from train.
        num_relations, num_entities: sizes.
    """

    def __init__(self, known: KnownAnswers, num_entities: int) -> None:
        self.known, self.num_entities, self.num_relations = known, num_entities, known.num_relations
        place = np.asarray(known.keys) % (2 * self.num_relations)
        # Stable, so the sources of a place are in order of their ids.
        self._order = np.argsort(place, kind="stable")
        self._starts = np.searchsorted(place[self._order], np.arange(2 * self.num_relations + 1))

    def sources(self, place: int) -> Integers:
        """Ids of the entities that have an answer at a place, ascending."""
        at = self._order[self._starts[place] : self._starts[place + 1]]
        return np.asarray(self.known.keys[at] // (2 * self.num_relations))

    def answers(self, place: int) -> tuple[Integers, Integers]:
        """Ids of the entities that answer at a place, ascending, and how many facts each of them answers."""
        inverse = place ^ 1
        at = self._order[self._starts[inverse] : self._starts[inverse + 1]]
        return self.sources(inverse), np.asarray(self.known.offsets[at + 1] - self.known.offsets[at])

    def all(self) -> tuple[Integers, Integers, Integers]:
        """Every fact from both of its ends: the entity, the place, and the neighbour."""
        length = np.diff(self.known.offsets)
        key = np.repeat(np.asarray(self.known.keys), length)
        return key // (2 * self.num_relations), key % (2 * self.num_relations), np.asarray(self.known.targets)

    def degrees(self, ids: Integers) -> Integers:
        """(n,) number of facts of each entity, as head or as tail."""
        low, high = (np.searchsorted(self.known.keys, (ids + more) * 2 * self.num_relations) for more in (0, 1))
        return np.asarray(self.known.offsets[high] - self.known.offsets[low])

    def facts_of(self, ids: Integers) -> tuple[Integers, Integers, Integers]:
        """The facts of some entities: which of `ids` (its position), the place, and the neighbour, flat, in order."""
        R2 = 2 * self.num_relations
        low, high = (np.searchsorted(self.known.keys, (ids + more) * R2) for more in (0, 1))
        keys = ranges(low, high - low)
        length = self.known.offsets[keys + 1] - self.known.offsets[keys]
        owner = np.repeat(np.arange(len(ids)), high - low)
        neighbour = self.known.targets[ranges(np.asarray(self.known.offsets[keys]), length)]
        return np.repeat(owner, length), np.repeat(self.known.keys[keys] % R2, length), np.asarray(neighbour)

    def by_place(self) -> tuple[Integers, Integers, Integers]:
        """Return where each place's sources begin (places + 1,), all sources by place, and their numbers of answers."""
        answers = np.diff(self.known.offsets)[self._order]
        return self._starts, np.asarray(self.known.keys)[self._order] // (2 * self.num_relations), answers

    def table(self, first: int, last: int) -> FactTable:
        """The facts as kernels take them, with the rows of the entities [first, last)."""
        keys, offsets, targets, first_key_E = (
            np.ascontiguousarray(part)
            for part in (self.known.keys, self.known.offsets, self.known.targets, self._first_key_E)
        )
        return FactTable(keys, offsets, targets, first_key_E, 2 * self.num_relations, first, last - first)

    @cached_property
    def _first_key_E(self) -> Integers:
        """(entities + 1,) where the keys of each entity begin."""
        return np.searchsorted(self.known.keys, np.arange(self.num_entities + 1) * 2 * self.num_relations)

    def holders(self, place: Integers, neighbour: Integers) -> tuple[Integers, Integers]:
        """Where in `known.targets` the entities that have a fact (place, neighbour) start, and how many they are."""
        return self.known.spans(neighbour, place // 2, 1 - place % 2)


# Multiplications and additions per second of a rank on one core, in products of blocks; measured 20e9 and more on AVX2.
FLOPS = 10e9


class Cost(NamedTuple):
    """Pairs of a query and an entity: those in the search for neighbours, and those in likenesses to known answers."""

    searched: int
    compared: int

    def seconds(self, width: int, ranks: int) -> float:
        """Estimated time on a number of ranks, for dense spaces with `width` numbers per entity in all."""
        return 2 * (self.searched + self.compared) * width / FLOPS / ranks


def cost_of(facts: Facts, triples_T3: NDArray[np.int64]) -> Cost:
    """Both queries of each triple, each distinct one once."""
    head, relation, tail = np.asarray(triples_T3).T
    queries = np.unique(np.stack([np.append(head, tail), np.append(2 * relation, 2 * relation + 1)], 1), axis=0)
    source: Integers = queries[:, 0]
    place: Integers = queries[:, 1]
    sizes = np.array([len(facts.sources(at)) for at in range(2 * facts.num_relations)], np.int64)
    answered = facts.known.spans(source, place // 2, place % 2)[1] > 0
    return Cost(int(sizes[place].sum()), int(answered.sum()) * facts.num_entities)
