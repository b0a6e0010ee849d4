"""Names to ids and back over a Parquet column, and what a misspelt name may have meant.

All is done on the column as it lies in memory: five million names are never Python objects at once. Numbers pass between
numpy and pyarrow as buffers: pyarrow.array, pyarrow.scalar and to_numpy import pandas, which takes longer than all the rest of a start.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError, DataError

_ONE_BY_ONE = 8  # so many names are compared one after another; more are looked up together
_SLICE = 1 << 16
_SHORTLIST = 48  # of each slice of the column; compared letter by letter afterwards
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += 32


def closest(name: str, known: Sequence[str]) -> str | None:
    """The one of a few names that is most like `name`, if any is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


class Names:
    """The names of a Parquet file; the position is the id.

    Args:
        path: with a column `name`.
        count: how many there must be.
        kind: "entity" or "relation", for messages.
    """

    def __init__(self, path: Path, count: int, kind: str) -> None:
        self.path, self.count, self.kind = path, count, kind

    @cached_property
    def column(self) -> Any:
        """The names as an Arrow column.

        Raises:
            DataError: the file cannot be read or has another length.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                column = file.read(columns=["name"])["name"].cast(pyarrow.large_string())
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path.absolute()}: cannot be read ({error}); export the bundle again") from None
        if len(column) != self.count:
            raise DataError(f"{self.path.absolute()}: {len(column)} names, the manifest says {self.count}; export the bundle again")
        return column

    def take(self, ids: NDArray[np.int64]) -> list[str]:
        """The names of some ids."""
        return list(self.column.take(_as_arrow(ids)).to_pylist())

    def find(self, names: Sequence[str]) -> dict[str, int]:
        """Ids of those of `names` that are there."""
        wanted = list(dict.fromkeys(names))
        if len(wanted) <= _ONE_BY_ONE:
            return {name: at for name in wanted if (at := self._find_one(name)) is not None}
        import pyarrow.compute

        found = pyarrow.compute.indices_nonzero(pyarrow.compute.is_in(self.column, value_set=_as_text(wanted)))
        places = np.frombuffer(found.buffers()[1], np.uint64)[found.offset : found.offset + len(found)].astype(np.int64)
        return dict(zip(self.take(places), places.tolist(), strict=True))

    def _find_one(self, name: str) -> int | None:
        """The id of one name: slice by slice, so that half the column is read on average, at 3 ns a name."""
        import pyarrow.compute

        wanted, first = _as_text([name])[0], 0
        for chunk in self.column.chunks:
            for start in range(0, len(chunk), _SLICE):
                found = pyarrow.compute.indices_nonzero(pyarrow.compute.equal(chunk.slice(start, _SLICE), wanted))
                if len(found):
                    return first + start + int(found[0].as_py())
            first += len(chunk)
        return None

    def id_of(self, name: str) -> int:
        """The id of a name; where only upper and lower case differ, and one name fits, that one is meant.

        Raises:
            ConfigError: there is none; the message says what may have been meant.
        """
        found = self.find([name])
        if name in found:
            return found[name]
        close = self.suggest(name)
        alike = [other for other in close if other.casefold() == name.casefold()]
        if len(alike) == 1:
            return self.find(alike)[alike[0]]
        raise ConfigError(f"{self.kind} {name!r}: not known here; {self._hint(close)}")

    def _hint(self, close: Sequence[str]) -> str:
        if close:
            return "did you mean " + ", ".join(repr(other) for other in close) + "?"
        if self.count <= 40:
            return "known are " + ", ".join(self.column.to_pylist())
        return f"none of the {self.count:,} names is like it; names are those of the raw folder's files"

    def suggest(self, name: str, count: int = 3) -> list[str]:
        """Up to `count` names that are most like `name`, best first.

        Names that share pairs of neighbouring letters are found on the column's bytes; the best of them are compared
        letter by letter (difflib).
        """
        wanted = _LOWER[np.frombuffer(name.encode("utf8", "replace"), np.uint8)]
        shortlist: list[str] = []
        for chunk in self.column.chunks:
            for start in range(0, len(chunk), 1 << 19):
                piece = chunk.slice(start, 1 << 19)
                shortlist += piece.take(_most_pairs(piece, wanted)).to_pylist()
        folded = name.casefold()
        scored = [(difflib.SequenceMatcher(None, folded, other.casefold()).ratio(), other) for other in shortlist]
        best = sorted((pair for pair in scored if pair[0] >= 0.6), key=lambda pair: (-pair[0], pair[1]))
        return [other for _, other in best[:count]]


def _most_pairs(piece: Any, wanted: NDArray[np.uint8]) -> Any:
    """Positions of the names that share most pairs of letters with `wanted`, for their length (Dice)."""
    _, offset_buffer, data = piece.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[piece.offset : piece.offset + len(piece) + 1]
    letters = _LOWER[np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]] if data is not None else np.zeros(0, np.uint8)
    offsets = offsets - offsets[0]
    pairs = np.zeros(1 << 16, bool)
    pairs[(wanted[:-1].astype(np.uint16) << 8) | wanted[1:]] = True
    shared = np.zeros(len(letters) + 1, np.int32)
    if len(letters) > 1:
        np.cumsum(pairs[(letters[:-1].astype(np.uint16) << 8) | letters[1:]], out=shared[1:-1], dtype=np.int32)
        shared[-1] = shared[-2]
    # A pair lies in a name when it starts before the name's last letter.
    last = np.maximum(offsets[1:] - 1, offsets[:-1])
    count = shared[last] - shared[offsets[:-1]]
    score = 2.0 * count / np.maximum(np.diff(offsets) + len(wanted) - 2, 1)
    best = np.argpartition(-score, min(_SHORTLIST, len(score) - 1))[:_SHORTLIST]
    return _as_arrow(best[score[best] > 0.2])


def _as_arrow(ids: NDArray[np.int64]) -> Any:
    """Ids as an Arrow array."""
    import pyarrow

    ids = np.ascontiguousarray(ids, np.int64)
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(ids), [None, pyarrow.py_buffer(ids)])


def _as_text(names: Sequence[str]) -> Any:
    """Names as an Arrow array."""
    import pyarrow

    texts = [name.encode("utf8", "replace") for name in names]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))]
    return pyarrow.Array.from_buffers(pyarrow.large_string(), len(texts), buffers)
