"""Triples of a split: read, freed of duplicates, cut, and compared with the other splits.

Everything works on (T, 3) int64 arrays of head, relation, tail; no Python object outlives its line.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.layouts import RawFile
from mocme_dist.data.vocabulary import Names
from mocme_dist.errors import DataError

Integers = NDArray[np.int64]
# Numbers kept in memory before they go to the spool: 24 MiB.
_SPOOL = 3 << 20


def read_triples(file: RawFile, entities: Names, relations: Names, spool: Path) -> Integers:
    """(T, 3) numbers of `entities` and `relations`, which grow by the names that are new.

    Args:
        file: lines of head, relation, tail.
        entities, relations: names seen so far.
        spool: a temporary file that takes the numbers while their count is unknown; removed at the end.

    Raises:
        DataError: a line has not three fields, a name is empty, not UTF-8 or not allowed, or there is no triple.
    """
    flat = array("q")
    number = 0
    with spool.open("wb") as out:
        try:
            for number, line in file.lines():
                fields = line.split(b"\t")
                if len(fields) != 3:
                    file.fail(number, f"expected 3 tab-separated fields (head, relation, tail), got {len(fields)}")
                flat.append(entities[fields[0]])
                flat.append(relations[fields[1]])
                flat.append(entities[fields[2]])
                if len(flat) >= _SPOOL:
                    flat.tofile(out)
                    del flat[:]
        except ValueError as error:
            file.fail(number, str(error))
        flat.tofile(out)
    triples = np.fromfile(spool, dtype=np.int64).reshape(-1, 3)
    spool.unlink()
    if not len(triples):
        raise DataError(f"{file.path.absolute()}: holds no triple; expected lines of head, relation, tail with tabs between")
    return triples


@dataclass(frozen=True)
class KeySpace:
    """Makes one int64 of a triple; two triples are equal when their keys are."""

    num_entities: int
    num_relations: int

    def __post_init__(self) -> None:
        if self.num_entities**2 * self.num_relations > np.iinfo(np.int64).max:
            raise DataError(
                f"{self.num_entities:,} entities and {self.num_relations:,} relations: entities^2 * relations must stay below 2^63"
            )

    def triples(self, triples_T3: Integers) -> Integers:
        """(T,) keys of whole triples."""
        return (triples_T3[:, 0] * self.num_relations + triples_T3[:, 1]) * self.num_entities + triples_T3[:, 2]

    def pairs(self, triples_T3: Integers, inverse: bool = False) -> Integers:
        """(T,) keys of (head, tail), or of (tail, head)."""
        head, tail = (2, 0) if inverse else (0, 2)
        return triples_T3[:, head] * self.num_entities + triples_T3[:, tail]


def distinct(triples_T3: Integers, keys: KeySpace) -> Integers:
    """The triples without repetitions, in the order of their first occurrence."""
    key = keys.triples(triples_T3)
    # Stable, so the first of equal keys is the first in the file.
    order = np.argsort(key, kind="stable")
    repeated = np.flatnonzero(key[order[1:]] == key[order[:-1]]) + 1
    return np.delete(triples_T3, order[repeated], axis=0) if len(repeated) else triples_T3


def leakage(train_T3: Integers, valid_T3: Integers | None, test_T3: Integers, keys: KeySpace) -> dict[str, dict[str, float]]:
    """How much of a split is given away by another, over distinct triples.

    Returns:
        Per kind `triples` (how many), `of` (of how many) and `share`. Pairs are compared without their relation:
        `test_pairs_in_train` for (head, tail), `test_inverse_pairs_in_train` for (tail, head).
    """
    train, train_pairs = np.sort(keys.triples(train_T3)), np.sort(keys.pairs(train_T3))
    test = keys.triples(test_T3)
    found = {"test_in_train": _contained(test, train)}
    if valid_T3 is not None:
        valid = keys.triples(valid_T3)
        found["test_in_valid"] = _contained(test, np.sort(valid))
        found["valid_in_train"] = _contained(valid, train)
    found["test_pairs_in_train"] = _contained(keys.pairs(test_T3), train_pairs)
    found["test_inverse_pairs_in_train"] = _contained(keys.pairs(test_T3, inverse=True), train_pairs)
    return {name: {"triples": int(hit.sum()), "of": len(hit), "share": round(float(hit.mean()), 6)} for name, hit in found.items()}


def _contained(wanted: Integers, ascending: Integers) -> NDArray[np.bool_]:
    """Which of `wanted` occur in `ascending`, which is not empty; np.isin sorts and copies both."""
    place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[place] == wanted
    return found


def cut_development_set(train_T3: Integers, share: float, seed: int, keys: KeySpace) -> tuple[Integers, Integers]:
    """Hold round(share * T) triples of train out, such that train keeps every entity and relation it shows.

    Returns:
        (remaining train, development set), both in the order they had.

    Raises:
        DataError: so many cannot be held out.
    """
    wanted = max(1, round(share * len(train_T3)))
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1]))).permutation(len(train_T3))
    places = np.arange(len(order))
    # The last triple of each name in the drawn order stays: only names of few triples feel it, as with drawing one
    # by one. An assignment with repeated indices keeps the last value.
    last_of_entity = np.full((2, keys.num_entities), -1)
    last_of_entity[0, train_T3[order, 0]] = places
    last_of_entity[1, train_T3[order, 2]] = places
    last_of_relation = np.full(keys.num_relations, -1)
    last_of_relation[train_T3[order, 1]] = places
    kept = np.concatenate([last_of_entity.max(axis=0), last_of_relation])
    free = np.ones(len(order), dtype=bool)
    free[kept[kept >= 0]] = False
    chosen = order[free][:wanted]
    if len(chosen) < wanted:
        raise DataError(
            f"data.dev=cut:{share:g}: {wanted} of {len(train_T3)} train triples to hold out, only {len(chosen)} can go without "
            f"an entity or relation losing its last one; use data.dev=cut:{len(chosen) / len(train_T3):.2g} or less"
        )
    out = np.zeros(len(order), dtype=bool)
    out[chosen] = True
    return train_T3[~out], train_T3[out]


@dataclass(frozen=True)
class Seen:
    """Which entities and relations the triples of train show."""

    entities: NDArray[np.bool_]
    relations: NDArray[np.bool_]

    @classmethod
    def of(cls, train_T3: Integers, keys: KeySpace) -> Seen:
        """What `train_T3` shows."""
        entities, relations = np.zeros(keys.num_entities, dtype=bool), np.zeros(keys.num_relations, dtype=bool)
        entities[train_T3[:, 0]] = entities[train_T3[:, 2]] = True
        relations[train_T3[:, 1]] = True
        return cls(entities, relations)

    def covers(self, triples_T3: Integers) -> NDArray[np.bool_]:
        """(T,) whether head, relation and tail were all seen."""
        return self.entities[triples_T3[:, 0]] & self.relations[triples_T3[:, 1]] & self.entities[triples_T3[:, 2]]

    def unseen_in(self, triples_T3: Integers) -> tuple[Integers, Integers]:
        """Ids of the entities and of the relations in `triples_T3` that were not seen, ascending."""
        entities, relations = np.unique(triples_T3[:, [0, 2]]), np.unique(triples_T3[:, 1])
        return entities[~self.entities[entities]], relations[~self.relations[relations]]
