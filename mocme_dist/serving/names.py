"""Ids, labels and aliases of entities or relations over Parquet columns, and suggestions for misspelt names.

Everything works on the columns as they are in memory: five million names never become Python objects at once, as a
library for fuzzy matching would require. Numbers pass between numpy and pyarrow as buffers, because pyarrow.array,
pyarrow.scalar and to_numpy import pandas, which takes longer than the rest of the start.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError, DataError, one_line

Integers = NDArray[np.int64]
_ONE_BY_ONE = 8  # up to this many names are compared one after another; more are looked up together
_SHORTLIST = 48  # of each slice of the column; compared letter by letter afterwards
_SUGGESTED = 4
_SHOWN = 5  # entities that an ambiguous name lists
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += 32


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return the one of a few names that is most like `name`, if any is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


class Column(NamedTuple):
    """Texts by which ids are found.

    Attributes:
        kind: "id", "label" or "alias".
        texts: Arrow column of large strings.
        ids: id of each text, or None if the position is the id.
    """

    kind: str
    texts: Any
    ids: Integers | None

    def to_ids(self, positions: Integers) -> Integers:
        """Return the ids of some positions."""
        return positions if self.ids is None else self.ids[positions]


class Names:
    """The ids of a Parquet file, by row, with labels and aliases from a second file.

    An id is the name in the raw files; a row is its number. Where a label is missing, the id takes its place.

    Args:
        path: Parquet file with a column `name`.
        count: expected number of rows.
        kind: "entity" or "relation", for messages.
        labels: Parquet file with the columns `label` and `aliases`, or None.

    Raises:
        DataError: a file does not exist.
    """

    def __init__(self, path: Path, count: int, kind: str, labels: Path | None = None) -> None:
        self.path = path
        self.labels_path = labels
        self.count = count
        self.kind = kind
        # Mapped now and read on first use: another file may have this name by then.
        self._content = _mapped(path)
        self._labels = None if labels is None else _mapped(labels)

    @cached_property
    def column(self) -> Any:
        """The ids as an Arrow column.

        Raises:
            DataError: the file cannot be read or has another length.
        """
        import pyarrow

        return self._read(self.path, self._content, "name").cast(pyarrow.large_string())

    @cached_property
    def labels(self) -> Any | None:
        """The labels as an Arrow column with nulls, or None if there are none."""
        return None if self.labels_path is None else self._read(self.labels_path, self._labels, "label")

    @cached_property
    def aliases(self) -> Column | None:
        """The aliases of all rows, one after another, or None if there are none."""
        import pyarrow.compute

        if self.labels_path is None:
            return None
        lists = self._read(self.labels_path, self._labels, "aliases").combine_chunks()
        texts, parents = pyarrow.compute.list_flatten(lists), pyarrow.compute.list_parent_indices(lists)
        return Column("alias", pyarrow.chunked_array([texts]), _as_numpy(parents)) if len(texts) else None

    def _read(self, path: Path, content: Any, column: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(content))) as file:
                found = file.read(columns=[column])[column]
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); export the bundle again") from None
        if len(found) != self.count:
            raise DataError(
                f"{path.absolute()}: {len(found)} names, the manifest says {self.count}; export the bundle again"
            )
        return found

    def take(self, rows: Integers) -> list[str]:
        """Return the ids of some rows."""
        return list(self.column.take(_as_arrow(rows)).to_pylist())

    def id_at(self, row: int) -> str:
        """Return the id of one row.

        Raises:
            ConfigError: the row does not exist.
        """
        if not 0 <= row < self.count:
            raise ConfigError(f"{self.kind} {row}: expected a row from 0 to {self.count - 1:,}")
        return self.take(np.array([row]))[0]

    def label_at(self, row: int) -> str:
        """Return the label of one row; its id where it has none."""
        return self.take_labels(np.array([row]))[0]

    def take_labels(self, rows: Integers) -> list[str]:
        """Return the labels of some rows; the id where a row has no label."""
        names = self.take(rows)
        if self.labels is None:
            return names
        labels = self.labels.take(_as_arrow(rows)).to_pylist()
        return [name if label is None else label for name, label in zip(names, labels, strict=True)]

    def columns(self) -> Iterator[Column]:
        """Yield ids, labels and aliases, in the order in which a text is looked up."""
        yield Column("id", self.column, None)
        if self.labels is not None:
            yield Column("label", self.labels, None)
        if self.aliases is not None:
            yield self.aliases

    def find(self, texts: Sequence[str]) -> dict[str, int]:
        """Return the rows of those texts that are an id, a label or an alias of exactly one row.

        An id comes before a label, a label before an alias; letter case counts only if it decides.
        """
        return {text: rows[0] for text, rows in self.lookup(texts).items() if len(rows) == 1}

    def lookup(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return for each text the rows that it may mean, ascending; texts that mean none are left out."""
        found: dict[str, list[int]] = {}
        wanted = list(dict.fromkeys(texts))
        for column in self.columns():
            found |= _matches(column, wanted)
            wanted = [text for text in wanted if text not in found]
            if not wanted:
                return found
        for column in self.columns():
            lowered = {text: text.lower() for text in wanted}
            here = _matches(column._replace(texts=_lower(column.texts)), list(dict.fromkeys(lowered.values())))
            found |= {text: here[lower] for text, lower in lowered.items() if lower in here}
            wanted = [text for text in wanted if text not in found]
        return found

    def id_of(self, text: str) -> int:
        """Return the row that an id, a label or an alias means; see `find`.

        Raises:
            ConfigError: it means none, and the message has suggestions; or several, and the message lists them.
        """
        rows = self.lookup([text]).get(text, [])
        if len(rows) == 1:
            return rows[0]
        raise ConfigError(self.problem(text, rows))

    def problem(self, text: str, rows: Sequence[int]) -> str:
        """Return why a text cannot be used: `rows` are those that it may mean."""
        if not rows:
            words = self.search(text, 2, np.negative) if text.strip() else []
            close = dict.fromkeys([*self.suggest(text), *self.take_labels(np.array(words, np.int64))])
            return f"{self.kind} {text!r}: not known here; {self._hint(list(close)[:_SUGGESTED])}"
        plural = {"entity": "entities", "relation": "relations"}[self.kind]
        shown = ", ".join(repr(name) for name in self.take(np.array(rows[:_SHOWN])))
        more = ", ..." if len(rows) > _SHOWN else ""
        return f"{len(rows)} {plural} are called {text}: {shown}{more}; use one of these ids"

    def _hint(self, close: Sequence[str]) -> str:
        if close:
            return "did you mean " + ", ".join(repr(other) for other in close) + "?"
        if self.count <= 40:
            return "known are " + ", ".join(self.column.to_pylist())
        return f"none of the {self.count:,} names is like it; --entities PREFIX lists names that begin alike"

    def search(self, prefix: str, k: int, weight: Callable[[Integers], Integers]) -> list[int]:
        """Return up to `k` rows with an id, label or alias that begins with `prefix`, or has a word that does.

        Case and accents are ignored. Whole names come first, then names that begin so, then words; each group by
        descending weight.

        Args:
            prefix: what has been typed; "" matches all.
            k: how many rows.
            weight: function of rows to their weights.
        """
        import pyarrow.compute

        wanted, groups, taken = _plain(prefix), [], np.zeros(0, np.int64)
        for matches in (pyarrow.compute.equal, pyarrow.compute.starts_with, pyarrow.compute.match_substring):
            text = f" {wanted}" if matches is pyarrow.compute.match_substring else wanted
            text = _as_text([text])[0] if matches is pyarrow.compute.equal else text
            found = [
                column.to_ids(_true_positions(matches(column.texts, text), column.texts)) for column in self._plain
            ]
            rows = np.setdiff1d(np.concatenate(found), taken)
            groups.append(rows[np.argsort(-weight(rows), kind="stable")][:k])
            taken = np.union1d(taken, rows)
            if len(taken) >= k:
                break
        return [int(row) for row in np.concatenate(groups)[:k]]

    @cached_property
    def _plain(self) -> list[Column]:
        """Columns without case and accents; made once, in about 2 s per million names with accents."""
        return [column._replace(texts=_without_accents(column.texts)) for column in self.columns()]

    def suggest(self, text: str, count: int = 3) -> list[str]:
        """Return up to `count` ids or labels that are most like `text`, best first.

        Names that share pairs of neighbouring letters are found on the columns' bytes; the best of them are compared
        letter by letter (difflib).
        """
        wanted = _LOWER[np.frombuffer(text.encode("utf8", "replace"), np.uint8)]
        shortlist: dict[str, None] = {}
        for column in self.columns():
            for chunk in column.texts.chunks:
                for start in range(0, len(chunk), 1 << 19):
                    piece = chunk.slice(start, 1 << 19)
                    shortlist |= dict.fromkeys(piece.take(_most_pairs(piece, wanted)).to_pylist())
        folded = text.casefold()
        scored = [
            (difflib.SequenceMatcher(None, folded, other.casefold()).ratio(), other)
            for other in shortlist
            if other is not None
        ]
        best = sorted((pair for pair in scored if pair[0] >= 0.6), key=lambda pair: (-pair[0], pair[1]))
        return [other for _, other in best[:count]]


def _mapped(path: Path) -> Any:
    try:
        return np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); export the bundle again") from None


def _matches(column: Column, wanted: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of the texts that a column holds, ascending and distinct."""
    if len(wanted) <= _ONE_BY_ONE:
        found = {text: column.to_ids(_positions_of(column.texts, text)) for text in wanted}
        return {text: np.unique(rows).tolist() for text, rows in found.items() if len(rows)}
    import pyarrow.compute

    positions = _true_positions(pyarrow.compute.is_in(column.texts, value_set=_as_text(wanted)), column.texts)
    rows_of: dict[str, list[int]] = {}
    texts = column.texts.take(_as_arrow(positions)).to_pylist()
    for text, row in zip(texts, column.to_ids(positions).tolist(), strict=True):
        rows_of.setdefault(text, []).append(row)
    return {text: sorted(set(rows)) for text, rows in rows_of.items()}


def _positions_of(texts: Any, text: str) -> Integers:
    """Return the positions of one text, at 3 ns per name."""
    import pyarrow.compute

    return _true_positions(pyarrow.compute.equal(texts, _as_text([text])[0]), texts)


def _true_positions(mask: Any, texts: Any) -> Integers:
    """Return where a mask over a column is true."""
    import pyarrow.compute

    return _as_numpy(pyarrow.compute.indices_nonzero(mask)) if len(texts) else np.zeros(0, np.int64)


def _lower(texts: Any) -> Any:
    import pyarrow.compute

    return pyarrow.compute.utf8_lower(texts)


def _plain(text: str) -> str:
    """Return a text in lower case, without accents, with spaces for underscores."""
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).replace("_", " ")


def _without_accents(texts: Any) -> Any:
    """Return a column as `_plain` changes a text; only what is not ASCII is decomposed, which is the slow part."""
    import pyarrow
    import pyarrow.compute as compute

    lowered = compute.replace_substring(compute.utf8_lower(texts), pattern="_", replacement=" ").combine_chunks()
    accented = compute.invert(compute.string_is_ascii(lowered))
    decomposed = compute.utf8_normalize(compute.filter(lowered, accented), "NFKD")
    bare = compute.replace_substring_regex(decomposed, pattern=r"\p{M}", replacement="")
    return pyarrow.chunked_array([compute.replace_with_mask(lowered, accented, bare)])


def _most_pairs(piece: Any, wanted: NDArray[np.uint8]) -> Any:
    """Return the positions of the names that share most pairs of letters with `wanted`, for their length (Dice)."""
    _, offset_buffer, data = piece.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[piece.offset : piece.offset + len(piece) + 1]
    letters = (
        _LOWER[np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]] if data is not None else np.zeros(0, np.uint8)
    )
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


def _as_numpy(array: Any) -> Integers:
    """Return an Arrow array of 64-bit integers as numpy reads its buffer."""
    if len(array) == 0:
        return np.zeros(0, np.int64)
    return np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array)]


def _as_arrow(ids: Integers) -> Any:
    """Return ids as an Arrow array."""
    import pyarrow

    ids = np.ascontiguousarray(ids, np.int64)
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(ids), [None, pyarrow.py_buffer(ids)])


def _as_text(names: Sequence[str]) -> Any:
    """Return names as an Arrow array."""
    import pyarrow

    texts = [name.encode("utf8", "replace") for name in names]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))]
    return pyarrow.Array.from_buffers(pyarrow.large_string(), len(texts), buffers)
