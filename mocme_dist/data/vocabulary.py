"""Names and ids: which entities and relations exist, and which number each has for good.

Names are bytes of UTF-8 while a folder is read. Entities are sorted by those bytes, then a seeded permutation gives the
ids, so that a contiguous range of ids is a random sample. Relations are sorted, and the place is the id.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path
from mocme_dist.data.layouts import RawFile, decode

_INTEGER = re.compile(rb"-?[0-9]+")


class Names(dict[bytes, int]):
    """Names to numbers, in the order of first sight; an unknown name is checked and joins, unless the set is closed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.closed_by: str | None = None

    def __missing__(self, name: bytes) -> int:
        """Number of a new name.

        Raises:
            ValueError: it is empty, not UTF-8, or not one of a closed set; the caller adds file and line.
        """
        if not name.strip():
            raise ValueError(f"the {self.kind} is empty")
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.kind} {name[:40]!r} is not UTF-8 ({error.reason} at byte {error.start})") from None
        if self.closed_by is not None:
            raise ValueError(f"{self.kind} '{text}' is not in {self.closed_by}; add it there or delete that file")
        self[name] = number = len(self)
        return number


def read_entity_file(file: RawFile) -> Names:
    """The names that entity2id.txt (name TAB id, maybe a first line with their count) allows.

    The ids must be 0 ... n-1 in any order; packing gives its own.

    Raises:
        DataError: a line is malformed, a name or an id is there twice, or an id lies outside 0 ... n-1.
    """
    names = Names("entity")
    ids, numbers = array("q"), array("q")
    promised: tuple[int, int] | None = None
    for number, line in file.lines():
        fields = line.split(b"\t")
        if len(fields) == 1 and not names and promised is None and _INTEGER.fullmatch(line.strip()):
            promised = (number, int(line))
            continue
        if len(fields) != 2:
            file.fail(number, f"expected 2 tab-separated fields (name, id), got {len(fields)}")
        name, text = fields[0], fields[1].strip()
        # Numbers of more than 18 digits would not fit 64 bits; no graph has them.
        if not _INTEGER.fullmatch(text) or len(text) > 18:
            file.fail(number, f"the id is {decode(file, number, fields[1], 'id')!r}; expected a whole number")
        if name in names:
            file.fail(number, f"entity '{decode(file, number, name, 'entity')}' is there twice, first on line {numbers[names[name]]}")
        try:
            names[name]
        except ValueError as error:
            file.fail(number, str(error))
        ids.append(int(text))
        numbers.append(number)
    _check_ids(file, np.frombuffer(ids, dtype=np.int64), numbers)
    if promised is not None and promised[1] != len(names):
        file.fail(promised[0], f"says {promised[1]} names, the file holds {len(names)}")
    names.closed_by = file.label
    return names


def _check_ids(file: RawFile, ids: NDArray[np.int64], numbers: Sequence[int]) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= len(ids)))
    if len(outside):
        file.fail(numbers[int(outside[0])], f"id {ids[outside[0]]} lies outside 0 ... {len(ids) - 1}, the file holds {len(ids)} names")
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        first, second = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        file.fail(numbers[second], f"id {ids[second]} is there twice, first on line {numbers[first]}")


def entity_order(names: Names, seed: int) -> tuple[list[bytes], NDArray[np.int64]]:
    """Names by id, and for every number in `names` the id: sorted by bytes, then permuted."""
    ordered = sorted(names)
    id_of_place = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))
    place_of_id = np.empty_like(id_of_place)
    place_of_id[id_of_place] = np.arange(len(ordered))
    by_id = [ordered[place] for place in place_of_id.tolist()]
    return by_id, _ids_of(names, by_id)


def relation_order(names: Names) -> tuple[list[bytes], NDArray[np.int64]]:
    """Names by id, and for every number in `names` the id: the place among the sorted names."""
    by_id = sorted(names)
    return by_id, _ids_of(names, by_id)


def _ids_of(names: Names, by_id: list[bytes]) -> NDArray[np.int64]:
    ids = np.empty(len(names), dtype=np.int64)
    ids[np.fromiter((names[name] for name in by_id), np.int64, len(by_id))] = np.arange(len(by_id))
    return ids


def write_names(path: Path, names: list[bytes]) -> None:
    """Write columns id and name as Parquet."""
    import pyarrow
    import pyarrow.parquet

    # Arrow's short string type counts bytes in 31 bits; large_string has no such end, and slices bound the memory.
    schema = pyarrow.schema([("id", pyarrow.int64()), ("name", pyarrow.large_string())])
    step = 1 << 18
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(names), step):
            part = [name.decode("utf-8") for name in names[start : start + step]]
            writer.write_table(
                pyarrow.table({"id": np.arange(start, start + len(part)), "name": pyarrow.array(part, pyarrow.large_string())}, schema)
            )
