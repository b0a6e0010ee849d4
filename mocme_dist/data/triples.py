"""Triples of a split: reading, removal of duplicates, cutting, and comparison with the other splits.

All functions work on (T, 3) int64 arrays of head, relation, tail; no Python object is kept per line.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.tsv import RawFile
from mocme_dist.data.vocabulary import Names, read_entity_file
from mocme_dist.errors import DataError

log = logging.getLogger(__name__)

Integers = NDArray[np.int64]
# Numbers kept in memory before they are written to the spool: 24 MiB.
_SPOOL = 3 << 20


def read_splits(
    files: Mapping[str, RawFile], fixed: RawFile | None, work: Path
) -> tuple[Names, Names, dict[str, Integers]]:
    """Return names of entities and relations, and the triples of each file as numbers of those names, without headers.

    Args:
        files: lines of head, relation, tail, by split.
        fixed: entity2id.txt, if there is one; it lists all entities.
        work: folder for temporary files.

    Raises:
        DataError: see `read_triples`; also if the columns are in another order.
    """
    entities, relations, splits = _read_all(files, fixed, work, ())
    if found := headers(splits):
        log.warning(
            "%s: the first line is taken for a header and left out: its relation and its names occur in no other line",
            ", ".join(files[split].label for split in found),
        )
        entities, relations, splits = _read_all(files, fixed, work, found)
    _check_columns(next(iter(files.values())), entities, relations)
    return entities, relations, splits


def _read_all(
    files: Mapping[str, RawFile], fixed: RawFile | None, work: Path, headed: Collection[str]
) -> tuple[Names, Names, dict[str, Integers]]:
    entities = read_entity_file(fixed) if fixed else Names("entity")
    relations = Names("relation")
    splits = {
        split: read_triples(file, entities, relations, work / f"{split}.numbers", split in headed)
        for split, file in files.items()
    }
    return entities, relations, splits


def headers(splits: Mapping[str, Integers]) -> list[str]:
    """Return the splits that begin with a header: its relation and names occur in no line but first ones."""
    found = []
    for split, triples in splits.items():
        head, relation, tail = triples[0].tolist()
        elsewhere = (
            (others[1:, 1] == relation).any() or np.isin(others[1:, [0, 2]], (head, tail)).any()
            for others in splits.values()
        )
        if len(triples) > 1 and head != tail and not any(elsewhere):
            found.append(split)
    return found


def _check_columns(file: RawFile, entities: Names, relations: Names) -> None:
    """Refuse the order head, tail, relation: more relations than entities, or most relations are also entities."""
    both = sum(name in entities and not name.isdigit() for name in relations)  # numbers may start at 0 for both
    if len(relations) > len(entities) or 2 * both > len(relations):
        raise DataError(
            f"{file.path.absolute()}: {len(relations):,} relations, {both:,} of them also entities, and "
            f"{len(entities):,} entities; expected the columns head, relation, tail, and these look like head, tail, "
            f"relation: swap the last two in every split, as in awk -F'\\t' -v OFS='\\t' '{{print $1, $3, $2}}' "
            f"{file.label}"
        )


def read_triples(file: RawFile, entities: Names, relations: Names, spool: Path, headed: bool = False) -> Integers:
    """Return (T, 3) numbers of `entities` and `relations`, which grow by new names.

    Args:
        file: lines of head, relation, tail.
        entities, relations: names so far.
        spool: temporary file for the numbers while their count is unknown; removed at the end.
        headed: skip the first line, which is a header.

    Raises:
        DataError: a line does not have three fields, a name is empty, not UTF-8 or not allowed, or there is no triple.
    """
    flat = array("q")
    number = before = 0
    lines = file.lines()
    if headed:
        next(lines, None)
    with spool.open("wb") as out:
        try:
            for number, line in lines:
                fields = line.split(b"\t")
                if len(fields) != 3:
                    file.fail(number, f"expected 3 tab-separated fields (head, relation, tail), got {len(fields)}")
                flat.append(entities[fields[0]])
                flat.append(relations[fields[1]])
                flat.append(entities[fields[2]])
                if len(flat) >= _SPOOL:
                    flat.tofile(out)
                    del flat[:]
                before = number
        except ValueError as error:
            hint = "" if before else "; if this line is a header, delete it; the columns are head, relation, tail"
            file.fail(number, f"{error}{hint}")
        flat.tofile(out)
    triples = np.fromfile(spool, dtype=np.int64).reshape(-1, 3)
    spool.unlink()
    if not len(triples):
        raise DataError(
            f"{file.path.absolute()}: holds no triple; expected lines of head, relation, tail with tabs between"
        )
    return triples


@dataclass(frozen=True)
class KeySpace:
    """Maps triples to int64 keys that are equal for equal triples only."""

    num_entities: int
    num_relations: int

    def __post_init__(self) -> None:
        if self.num_entities**2 * self.num_relations > np.iinfo(np.int64).max:
            raise DataError(
                f"{self.num_entities:,} entities and {self.num_relations:,} relations: entities^2 * relations must "
                "stay below 2^63"
            )

    def triples(self, triples_T3: Integers) -> Integers:
        """Return (T,) keys of whole triples."""
        return (triples_T3[:, 0] * self.num_relations + triples_T3[:, 1]) * self.num_entities + triples_T3[:, 2]

    def pairs(self, triples_T3: Integers, inverse: bool = False) -> Integers:
        """Return (T,) keys of (head, tail), or of (tail, head)."""
        head, tail = (2, 0) if inverse else (0, 2)
        return triples_T3[:, head] * self.num_entities + triples_T3[:, tail]


def distinct(triples_T3: Integers, keys: KeySpace) -> Integers:
    """Return the triples without repetitions, in the order of their first occurrence."""
    key = keys.triples(triples_T3)
    # Stable, so the first of equal keys is the first in the file.
    order = np.argsort(key, kind="stable")
    repeated = np.flatnonzero(key[order[1:]] == key[order[:-1]]) + 1
    return np.delete(triples_T3, order[repeated], axis=0) if len(repeated) else triples_T3


def leakage(
    train_T3: Integers, valid_T3: Integers | None, test_T3: Integers, keys: KeySpace
) -> dict[str, dict[str, float]]:
    """Return how many distinct triples of a split another split gives away.

    Returns:
        Per kind the number of `triples`, the total `of`, and the `share`. Pairs are compared without their relation:
        `test_pairs_in_train` for (head, tail), `test_inverse_pairs_in_train` for (tail, head).
    """
    train = np.sort(keys.triples(train_T3))
    train_pairs = np.sort(keys.pairs(train_T3))
    test = keys.triples(test_T3)
    found = {"test_in_train": _contained(test, train)}
    if valid_T3 is not None:
        valid = keys.triples(valid_T3)
        found["test_in_valid"] = _contained(test, np.sort(valid))
        found["valid_in_train"] = _contained(valid, train)
    found["test_pairs_in_train"] = _contained(keys.pairs(test_T3), train_pairs)
    found["test_inverse_pairs_in_train"] = _contained(keys.pairs(test_T3, inverse=True), train_pairs)
    return {
        name: {"triples": int(hit.sum()), "of": len(hit), "share": round(float(hit.mean()), 6)}
        for name, hit in found.items()
    }


def _contained(wanted: Integers, ascending: Integers) -> NDArray[np.bool_]:
    """Return which of `wanted` occur in `ascending`, which is not empty; np.isin would sort and copy both."""
    place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[place] == wanted
    return found


def cut_development_set(
    train_T3: Integers, share: float, seed: int, keys: KeySpace, option: str = "data.dev=cut:"
) -> tuple[Integers, Integers]:
    """Hold out round(share * T) triples of train; train keeps at least one triple of every entity and relation.

    Args:
        train_T3: (T, 3) distinct triples.
        share: of the triples, between 0 and 1.
        seed: of the draw.
        keys: sizes of the graph.
        option: how the user set the share, for the message.

    Returns:
        (remaining train, development set), both in their original order.

    Raises:
        DataError: the share cannot be held out.
    """
    wanted = max(1, round(share * len(train_T3)))
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1]))).permutation(len(train_T3))
    places = np.arange(len(order))
    # The last triple of each name in the drawn order stays, which affects names of few triples only, as drawing one by
    # one would. An assignment with repeated indices keeps the last value.
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
            f"{option}{share:.3g}: {wanted} of {len(train_T3)} train triples to hold out, only {len(chosen)} can go "
            f"without an entity or relation losing its last one; use {option}{len(chosen) / len(train_T3):.2g} or less"
        )
    out = np.zeros(len(order), dtype=bool)
    out[chosen] = True
    return train_T3[~out], train_T3[out]


@dataclass(frozen=True)
class Seen:
    """Which entities and relations occur in train."""

    entities: NDArray[np.bool_]
    relations: NDArray[np.bool_]

    @classmethod
    def of(cls, train_T3: Integers, keys: KeySpace) -> Seen:
        """Return the entities and relations in `train_T3`."""
        entities = np.zeros(keys.num_entities, dtype=bool)
        relations = np.zeros(keys.num_relations, dtype=bool)
        entities[train_T3[:, 0]] = entities[train_T3[:, 2]] = True
        relations[train_T3[:, 1]] = True
        return cls(entities, relations)

    def covers(self, triples_T3: Integers) -> NDArray[np.bool_]:
        """Return (T,) whether head, relation and tail were all seen."""
        return self.entities[triples_T3[:, 0]] & self.relations[triples_T3[:, 1]] & self.entities[triples_T3[:, 2]]

    def unseen_in(self, triples_T3: Integers) -> tuple[Integers, Integers]:
        """Return ids of the unseen entities and relations in `triples_T3`, ascending."""
        entities = np.unique(triples_T3[:, [0, 2]])
        relations = np.unique(triples_T3[:, 1])
        return entities[~self.entities[entities]], relations[~self.relations[relations]]
