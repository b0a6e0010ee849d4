"""Imports OGB-LSC WikiKG90Mv2: `mocme import wikikg90m SOURCE OUT [--mapping DIR]`.

SOURCE is the folder of the arrays (train_hrt.npy, val_hr.npy, val_t.npy, maybe entity_feat.npy), or one that holds it
as processed/. The published test answers are hidden: valid is cut in two halves by the order of its rows, the first is
valid here and the second test. --mapping DIR (entity.csv, relation.csv) gives Wikidata names, titles and descriptions;
without it names are the numbers. Arrays are memory-mapped and rows are written block by block; entity names stay in
memory (some 10 GB for all 91 million with titles).
"""

from __future__ import annotations

import argparse
import csv
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.tensors import map_array
from mocme_dist.errors import DataError
from mocme_dist.importers.raw_folder import RawWriter, one_line, open_text, require

_WHAT = "WikiKG90Mv2 has train_hrt.npy, val_hr.npy and val_t.npy"
_BLOCK = 1 << 16


def import_wikikg90m(source: Path, out: Path, mapping: Path | None = None) -> dict[str, Any]:
    """Write the raw folder.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: an array or a mapping is missing, or its shape differs from the published one.
    """
    folder = source / "processed" if (source / "processed").is_dir() else source
    train = _array(require(folder, "train_hrt.npy", what=_WHAT), 3)
    valid_hr, valid_t = (
        _array(require(folder, f"val_{name}.npy", what=_WHAT), columns) for name, columns in (("hr", 2), ("t", 1))
    )
    if len(valid_hr) != len(valid_t):
        raise DataError(
            f"{folder.absolute()}: val_hr.npy has {len(valid_hr)} rows, val_t.npy {len(valid_t)}; expected as many"
        )
    entities = _Names(
        mapping, "entity", max(int(train[:, [0, 2]].max()), int(valid_hr[:, 0].max()), int(valid_t.max())) + 1
    )
    relations = _Names(mapping, "relation", max(int(train[:, 1].max()), int(valid_hr[:, 1].max())) + 1)
    valid = np.column_stack([valid_hr, valid_t])
    half = len(valid) // 2
    with RawWriter(out, source, "wikikg90mv2") as writer:
        for split, triples in (("train", train), ("valid", valid[:half]), ("test", valid[half:])):
            writer.triples(split, _named(triples, entities, relations))
        if mapping is not None:
            rows = (
                (entities.name(number), title, text)
                for number, (title, text) in enumerate(entities.texts)
                if title or text
            )
            writer.table("text.tsv", rows, header=("entity", "label", "description"))
        features = folder / "entity_feat.npy"
        if features.is_file():
            shape = map_array(features).shape
            if len(shape) != 2 or shape[0] < entities.count:
                raise DataError(
                    f"{features.absolute()}: shape {shape}, expected a row for each of {entities.count:,} entities"
                )
            writer.feature_file("text", features, (entities.name(number) for number in range(shape[0])))
        return writer.counts


def _array(path: Path, columns: int) -> NDArray[np.int64]:
    """Return a memory-mapped integer array with `columns` columns; one column may be flat."""
    try:
        found = map_array(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.absolute()}: not an array of numbers: {error}") from None
    if not np.issubdtype(found.dtype, np.integer) or (found.ndim, found.shape[-1]) not in (
        (2, columns),
        (1, len(found) * (columns == 1)),
    ):
        raise DataError(
            f"{path.absolute()}: {found.dtype} of shape {found.shape}, expected integers of shape (n, {columns})"
        )
    if found.size and found.min() < 0:
        raise DataError(f"{path.absolute()}: holds the number {found.min()}; expected numbers from 0")
    return found.reshape(-1, columns)


class _Names:
    """Names by number, from a mapping file or the numbers themselves, and the texts of the mapping."""

    def __init__(self, mapping: Path | None, kind: str, count: int) -> None:
        self.count = count
        self.prefix = {"entity": "e", "relation": "r"}[kind]
        self.texts = list[tuple[str, str]]()
        self.names: list[str] | None = None
        if mapping is not None:
            path = require(mapping, f"{kind}.csv", what="the mapping has entity.csv and relation.csv")
            try:
                self.names = self._read(path, kind)
            except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
                raise DataError(f"{path.absolute()}: cannot be read as CSV: {error}") from None
            if len(self.names) < count:
                raise DataError(f"{path.absolute()}: {len(self.names):,} names, the arrays use {count:,}")

    def _read(self, path: Path, kind: str) -> list[str]:
        names: list[str] = []
        with open_text(path, newline="") as file:
            table = csv.DictReader(file)
            if not {"idx", kind} <= set(table.fieldnames or ()):
                raise DataError(
                    f"{path.absolute()}: columns {table.fieldnames}, expected idx, {kind} and maybe title, desc"
                )
            for row in table:
                if row["idx"] != str(len(names)):
                    raise DataError(
                        f"{path.absolute()}:{table.line_num}: idx {row['idx']}, expected {len(names)}: they must "
                        "ascend from 0"
                    )
                names.append(row[kind])
                if kind == "entity":
                    self.texts.append((one_line(row.get("title") or ""), one_line(row.get("desc") or "")))
        return names

    def name(self, number: int) -> str:
        """Return the name of a number."""
        return self.names[number] if self.names is not None and number < len(self.names) else f"{self.prefix}{number}"


def _named(triples: NDArray[np.int64], entities: _Names, relations: _Names) -> Iterator[tuple[str, str, str]]:
    for start in range(0, len(triples), _BLOCK):
        for head, relation, tail in np.asarray(triples[start : start + _BLOCK]).tolist():
            yield entities.name(head), relations.name(relation), entities.name(tail)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this importer."""
    parser.add_argument("--mapping", type=Path, metavar="DIR", help="folder of entity.csv and relation.csv")
