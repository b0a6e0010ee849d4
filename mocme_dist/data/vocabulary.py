"""Names and ids: which entities and relations exist, and the permanent id of each.

Names are UTF-8 bytes while a folder is read. Entities are sorted by those bytes, then a seeded permutation gives the
ids, so that a contiguous range of ids is a random sample. The id of a relation is its place in sorted order.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path
from mocme_dist.data.tsv import RawFile, decode

_INTEGER = re.compile(rb"-?[0-9]+")
# Numbers of more digits may not fit 64 bits; no graph has them.
_MAX_DIGITS = 18
# Longer names are files in which a tab is missing; a bundle stores names in memory.
MAX_NAME_BYTES = 4096
# Characters without a glyph: zero-width space, soft hyphen, word joiner, byte order mark, marks of direction. Joiners
# (U+200C, U+200D) are kept because they change what is shown.
_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)


_NO_TWINS: Mapping[bytes, bytes] = {}


class Names(dict[bytes, int]):
    """Names to numbers in order of first appearance; a new name is checked and added, unless the set is closed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.closed_by: str | None = None

    def __missing__(self, name: bytes) -> int:
        """Return the number of a new name.

        Raises:
            ValueError: it is empty, too long, not UTF-8, or not one of a closed set; the caller adds file and line.
        """
        if not name.strip():
            raise ValueError(f"the {self.kind} is empty")
        if len(name) > MAX_NAME_BYTES:
            raise ValueError(
                f"{self.kind} {name[:40]!r}... has {len(name):,} bytes; expected a name of at most {MAX_NAME_BYTES:,}"
            )
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.kind} {name[:40]!r} is not UTF-8 ({error.reason} at byte {error.start})") from None
        if self.closed_by is not None:
            raise ValueError(f"{self.kind} '{text}' is not in {self.closed_by}; add it there or delete that file")
        self[name] = number = len(self)
        return number


def visible_text(text: str) -> str:
    """Return a text in composed form (NFC), without characters that have no glyph, white space folded."""
    return " ".join(unicodedata.normalize("NFC", text.translate(_INVISIBLE)).split())


def find_twins(names: Iterable[bytes]) -> list[list[bytes]]:
    """Return groups of names that look the same: they differ in Unicode form, invisible characters or white space.

    The first name of a group is the plain form if that is one of the names, else the first by bytes.
    """
    groups: dict[bytes, list[bytes]] = {}
    known = names if isinstance(names, dict) else set(names)
    for name in known:
        if name.isascii() and name == b" ".join(name.split()):
            continue  # the plain form already
        plain = visible_text(name.decode("utf-8")).encode()
        if plain != name:
            groups.setdefault(plain, []).append(name)
    found = [[plain, *sorted(group)] if plain in known else sorted(group) for plain, group in sorted(groups.items())]
    return [group for group in found if len(group) > 1]


def read_entity_file(file: RawFile) -> Names:
    """Return the names that entity2id.txt (name TAB id, possibly after a first line with their count) allows.

    The ids must be 0 ... n-1 in any order; packing gives its own.

    Raises:
        DataError: a line is malformed, a name or an id occurs twice, or an id is outside 0 ... n-1.
    """
    names = Names("entity")
    ids = array("q")
    numbers = array("q")
    promised: tuple[int, int] | None = None
    for number, line in file.lines():
        fields = line.split(b"\t")
        is_count = len(fields) == 1 and len(line.strip()) <= _MAX_DIGITS and _INTEGER.fullmatch(line.strip())
        if is_count and not names and promised is None:
            promised = (number, int(line))
            continue
        if len(fields) != 2:
            file.fail(number, f"expected 2 tab-separated fields (name, id), got {len(fields)}")
        name = fields[0]
        text = fields[1].strip()
        if not _INTEGER.fullmatch(text) or len(text) > _MAX_DIGITS:
            file.fail(number, f"the id is {decode(file, number, fields[1][:40], 'id')!r}; expected a whole number")
        if name in names:
            file.fail(
                number,
                f"entity '{decode(file, number, name, 'entity')}' occurs twice, first on line {numbers[names[name]]}",
            )
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
        file.fail(
            numbers[int(outside[0])],
            f"id {ids[outside[0]]} is outside 0 ... {len(ids) - 1}, the file holds {len(ids)} names",
        )
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        first, second = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        file.fail(numbers[second], f"id {ids[second]} occurs twice, first on line {numbers[first]}")


def entity_order(
    names: Names, seed: int, twins: Mapping[bytes, bytes] = _NO_TWINS
) -> tuple[list[bytes], NDArray[np.int64]]:
    """Return names by id, and the id for every number in `names`: sorted by bytes, then permuted.

    Args:
        names: all entities.
        seed: of the permutation.
        twins: names that share the id of another name.
    """
    ordered = sorted(names.keys() - twins.keys() if twins else names)
    id_of_place = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))
    place_of_id = np.empty_like(id_of_place)
    place_of_id[id_of_place] = np.arange(len(ordered))
    by_id = [ordered[place] for place in place_of_id.tolist()]
    return by_id, _ids_of(names, by_id, twins)


def relation_order(names: Names, twins: Mapping[bytes, bytes] = _NO_TWINS) -> tuple[list[bytes], NDArray[np.int64]]:
    """Return names by id, and the id for every number in `names`: the place among the sorted names."""
    by_id = sorted(names.keys() - twins.keys() if twins else names)
    return by_id, _ids_of(names, by_id, twins)


def _ids_of(names: Names, by_id: list[bytes], twins: Mapping[bytes, bytes]) -> NDArray[np.int64]:
    ids = np.empty(len(names), dtype=np.int64)
    ids[np.fromiter((names[name] for name in by_id), np.int64, len(by_id))] = np.arange(len(by_id))
    for name in twins:
        ids[names[name]] = ids[names[twins[name]]]
    return ids


def write_names(path: Path, names: list[bytes]) -> None:
    """Write columns id and name as Parquet."""
    import pyarrow
    import pyarrow.parquet

    # Arrow's string type counts bytes in 31 bits; large_string has no such limit, and slices bound the memory.
    schema = pyarrow.schema([("id", pyarrow.int64()), ("name", pyarrow.large_string())])
    step = 1 << 18
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(names), step):
            part = [name.decode("utf-8") for name in names[start : start + step]]
            writer.write_table(
                pyarrow.table(
                    {"id": np.arange(start, start + len(part)), "name": pyarrow.array(part, pyarrow.large_string())},
                    schema,
                )
            )
