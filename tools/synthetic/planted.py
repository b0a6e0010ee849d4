"""The planted graph.

Every line and every feature is a function of (seed, number), so any part is made without the others.

An entity has two latent factors, a of A and b of B; the A * B pairs are its groups, and inside a group entities have a
Zipf popularity. Relation r shifts both factors: the tail of (h, r) lies in the group (a + s_r mod A, b + t_r mod B),
drawn by popularity. Nothing else is in the graph, so whoever knows groups and popularities answers as well as anybody
can (`truth.py`). Modalities show the factors in part: one the first, one the second, one nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mocme_dist.batching.sampler import key64, mix64

Integers = NDArray[np.int64]
SPLITS = ("train", "valid", "test")
CHUNK = 1 << 20
# Which stream of random numbers is for what.
_HEAD_GROUP, _HEAD, _RELATION, _TAIL, _SPLIT, _PRESENT = range(6)


@dataclass(frozen=True)
class Modality:
    """One modality: what it shows (factor 0, factor 1, or None for pure noise), how wide it is and who has it."""

    name: str
    factor: int | None
    width: int = 32
    share: float = 0.8
    noise: float = 1.0


MODALITIES = (Modality("text", 0), Modality("image", 1), Modality("numeric", None))


@dataclass(frozen=True)
class Planted:
    """A graph of `num_entities` and about `num_triples` lines over all splits; Zipf draws repeat some.

    Entity e is in group e % (A * B) and the (e // (A * B))-th most popular there.
    """

    num_entities: int
    num_triples: int
    num_relations: int = 16
    factors: tuple[int, int] = (8, 8)
    exponent: float = 0.8
    valid: float = 0.02
    test: float = 0.02
    seed: int = 0
    modalities: tuple[Modality, ...] = MODALITIES

    def __post_init__(self) -> None:
        if self.num_triples < self.num_entities or self.num_entities < self.num_groups:
            raise ValueError(
                f"{self.num_triples:,} triples, {self.num_entities:,} entities, {self.num_groups} groups: expected as"
                " many triples as entities at least, because train shows each once, and as many entities as groups"
            )

    @property
    def num_groups(self) -> int:
        """A * B."""
        return self.factors[0] * self.factors[1]

    @cached_property
    def shifts_R2(self) -> Integers:
        """(R, 2) how far each relation moves the two factors; none leaves both where they are."""
        code = np.random.default_rng([self.seed, 1]).integers(1, self.num_groups, self.num_relations)
        return np.stack([code // self.factors[1], code % self.factors[1]], 1)

    def group_of(self, entity: Integers) -> Integers:
        """Groups of entities."""
        return entity % self.num_groups

    def target_group(self, group: Integers, relation: Integers, inverse: bool = False) -> Integers:
        """Group of the tails of heads in `group`, or of the heads of tails in it."""
        A, B = self.factors
        shift = -self.shifts_R2[relation] if inverse else self.shifts_R2[relation]
        return (group // B + shift[:, 0]) % A * B + (group % B + shift[:, 1]) % B

    def _uniform(self, number: Integers, stream: int) -> NDArray[np.float64]:
        """(n,) numbers in [0, 1), one for each of `number` and stream."""
        bits = mix64(number.astype(np.uint64) ^ key64(self.seed, 11, stream)) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def _member(self, group: Integers, u: NDArray[np.float64]) -> Integers:
        """Entities of the groups, Zipf by `u`: place j of n with weight near (j + 1) ** -exponent, by its integral."""
        n = (self.num_entities - group + self.num_groups - 1) // self.num_groups
        power = 1 - self.exponent
        place = np.floor(((1 + n) ** power * u + (1 - u)) ** (1 / power)).astype(np.int64) - 1
        return np.minimum(place, n - 1) * self.num_groups + group

    def lines(self, number: Integers) -> Integers:
        """(n, 3) head, relation, tail of lines; lines 0 ... E - 1 have each entity once as head."""
        group = (self._uniform(number, _HEAD_GROUP) * self.num_groups).astype(np.int64)
        head = np.where(number < self.num_entities, number, self._member(group, self._uniform(number, _HEAD)))
        relation = (self._uniform(number, _RELATION) * self.num_relations).astype(np.int64)
        tail = self._member(self.target_group(self.group_of(head), relation), self._uniform(number, _TAIL))
        return np.stack([head, relation, tail], 1)

    def split_of(self, triples_T3: Integers) -> NDArray[np.int8]:
        """0, 1, 2 for train, valid, test: a function of the triple, so no triple is in two splits.

        What covers stays in train.
        """
        key = mix64(triples_T3[:, 0].astype(np.uint64)) ^ triples_T3[:, 1].astype(np.uint64)
        u = self._uniform((mix64(key) ^ triples_T3[:, 2].astype(np.uint64)).view(np.int64), _SPLIT)
        split = np.where(u < self.test, 2, np.where(u < self.test + self.valid, 1, 0)).astype(np.int8)
        aside = np.flatnonzero(split)
        covers = (self.lines(triples_T3[aside, 0]) == triples_T3[aside]).all(1)
        split[aside[covers]] = 0
        return split

    def chunks(self) -> Iterator[tuple[Integers, NDArray[np.int8]]]:
        """All lines with their splits, a million at a time."""
        for start in range(0, self.num_triples, CHUNK):
            triples_T3 = self.lines(np.arange(start, min(start + CHUNK, self.num_triples)))
            yield triples_T3, self.split_of(triples_T3)

    def codes(self, entity: Integers) -> Integers:
        """(n, 2) factors of entities."""
        return np.stack([self.group_of(entity) // self.factors[1], self.group_of(entity) % self.factors[1]], 1)

    def present(self, modality: Modality, entity: Integers) -> NDArray[np.bool_]:
        """(n,) who has the modality, at random."""
        place = self.modalities.index(modality)
        return self._uniform(entity, _PRESENT + place) < modality.share

    def features(self, modality: Modality, entity: Integers, block: int) -> NDArray[np.float16]:
        """(n, F) features of entities that have it: the code of their factor plus noise; `block` numbers the call.

        A code has norm sqrt(F), the noise `modality.noise` times that.
        """
        place = self.modalities.index(modality)
        noise = np.random.Generator(np.random.Philox(key=[self.seed + (place << 32), block]))
        value = noise.standard_normal((len(entity), modality.width), dtype=np.float32)
        if modality.factor is not None:
            book = np.random.default_rng([self.seed, 2, place]).standard_normal(
                (self.factors[modality.factor], modality.width)
            )
            value = value * modality.noise + book.astype(np.float32)[self.codes(entity)[:, modality.factor]]
        return value.astype(np.float16)
