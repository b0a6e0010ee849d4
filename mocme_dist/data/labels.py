"""Labels and aliases of entities and relations: the columns that hold them, and the Parquet files that store them.

A file has the columns label and aliases (a list), one row per id; both are null where the raw folder names none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist.data.files import atomic_path
from mocme_dist.data.tsv import RawFile, Table, decode
from mocme_dist.errors import DataError

ENTITY_LABELS = "entity_labels.parquet"
RELATION_LABELS = "relation_labels.parquet"
RELATIONS_TABLE = "relations.tsv"
_LABEL_NAMES = {"label", "labels", "name", "title", "preflabel"}
_ALIAS_NAMES = {"alias", "aliases", "altlabel", "altlabels", "synonyms", "also_known_as"}
_BATCH = 1 << 16

Names = tuple[str | None, list[str] | None]  # label and aliases of one id


def label_column(columns: Sequence[str], wanted: str | None) -> str | None:
    """Return the text column that holds labels: the wanted one, or the first whose name says so.

    "label", "name" or "title" comes before a column that merely contains such a word, as "label_en" does.

    Raises:
        DataError: the wanted column does not exist.
    """
    if wanted is not None and wanted not in columns:
        found = ", ".join(columns) or "none"
        raise DataError(f"data.label_column={wanted}: text.tsv has no such column; its text columns: {found}")
    if wanted is not None:
        return wanted
    exact = [column for column in columns if column.lower() in _LABEL_NAMES]
    words = [column for column in columns if _LABEL_NAMES & set(re.split(r"[^a-z]+", column.lower()))]
    return next(iter([*exact, *words]), None)


def alias_column(columns: Sequence[str]) -> str | None:
    """Return the text column that holds aliases, separated by "|", or None."""
    return next((column for column in columns if column.lower() in _ALIAS_NAMES), None)


def split_aliases(cell: str | None, label: str | None) -> list[str] | None:
    """Return the distinct aliases of a cell without the label itself, or None if there are none."""
    names = dict.fromkeys(alias.strip() for alias in (cell or "").split("|"))
    return [alias for alias in names if alias and alias != label] or None


class LabelWriter:
    """Writes labels id by id, in slices, so that memory does not grow with the number of entities.

    Attributes:
        count: labels written so far.
    """

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema
        self._rows: list[Names] = []
        self.count = 0

    def add(self, label: str | None, aliases: list[str] | None) -> None:
        """Append the row of the next id."""
        self._rows.append((label, aliases))
        self.count += label is not None
        if len(self._rows) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are buffered."""
        import pyarrow

        columns = zip(*self._rows, strict=True) if self._rows else ((), ())
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()


@contextmanager
def label_writer(path: Path) -> Iterator[LabelWriter]:
    """Write a file of labels; the file appears when the block ends without an error."""
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.large_string()
    schema = pyarrow.schema([("label", text), ("aliases", pyarrow.list_(text))])
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as file:
        writer = LabelWriter(file, schema)
        yield writer
        writer.flush()


def add_entities(
    writer: LabelWriter, first: int, last: int, texts: Mapping[int, Mapping[str, str]], columns: tuple[str | None, ...]
) -> None:
    """Append the entities [first, last), given their text cells by column.

    Args:
        columns: the label column and the alias column; None where there is none.
    """
    label_name, alias_name = columns
    for entity in range(first, last):
        cells = texts.get(entity, {})
        label = cells.get(label_name) if label_name else None
        writer.add(label, split_aliases(cells.get(alias_name) if alias_name else None, label))


def read_relation_labels(file: RawFile, relations: Sequence[bytes]) -> tuple[list[Names], int]:
    """Return label and aliases of each relation from relations.tsv, and how many rows name no relation of the graph.

    Args:
        file: a table with the columns id (or relation), label and, optionally, aliases.
        relations: names by id.

    Raises:
        DataError: the header is another one, or a label is not UTF-8.
    """
    header = next((line for _, line in file.lines()), b"").split(b"\t")[0]
    table = Table(file, ("relation" if header.strip() == b"relation" else "id", "label"))
    aliases = alias_column(table.columns)
    place = {name: number for number, name in enumerate(relations)}
    found: list[Names] = [(None, None)] * len(relations)
    ignored = 0
    for number, fields in table.rows():
        at = place.get(fields[0])
        if at is None:
            ignored += 1
            continue
        label = decode(file, number, fields[1], "label").strip() or None
        cell = decode(file, number, fields[table.columns.index(aliases)], "aliases") if aliases else None
        found[at] = (label, split_aliases(cell, label))
    return found, ignored
