"""Imports a data set that PyKEEN wrote (`dataset.to_directory_binary(SOURCE)`): `mocme import pykeen SOURCE OUT`.

SOURCE holds training, validation and testing, each with numeric_triples.tsv.gz, entity_to_id.tsv.gz and
relation_to_id.tsv.gz.
The .pth files beside them are pickles and are not read: the tables hold all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocme_dist.errors import DataError
from mocme_dist.importers.raw_folder import RawWriter, named, require, rows

_WHAT = (
    "a PyKEEN folder has training/, validation/ and testing/ with numeric_triples.tsv.gz, entity_to_id.tsv.gz and "
    "relation_to_id.tsv.gz"
)
_FOLDERS = {"train": "training", "valid": "validation", "test": "testing"}


def import_pykeen(source: Path, out: Path) -> dict[str, Any]:
    """Write the raw folder.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: a file is missing or malformed, or the parts number their entities differently.
    """
    entities, relations = (_labels(source / "training", kind) for kind in ("entity", "relation"))
    with RawWriter(out, source, "pykeen") as writer:
        writer.entity_ids(entities)
        for split, folder in _FOLDERS.items():
            if _labels(source / folder, "entity") != entities or _labels(source / folder, "relation") != relations:
                raise DataError(
                    f"{(source / folder).absolute()}: numbers entities or relations otherwise than training does"
                )
            writer.triples(
                split, _triples(require(source / folder, "numeric_triples.tsv", what=_WHAT), entities, relations)
            )
        return writer.counts


def _labels(folder: Path, kind: str) -> list[str]:
    """Names by number; the file has a header of `id` and `label`."""
    path = require(folder, f"{kind}_to_id.tsv", what=_WHAT)
    names: list[str] = []
    for number, (identity, label) in rows(path, 2):
        if number == 1 and (identity, label) == ("id", "label"):
            continue
        if identity != str(len(names)):
            raise DataError(f"{path.absolute()}:{number}: id {identity}, expected {len(names)}: ids must ascend from 0")
        names.append(label)
    return names


def _triples(path: Path, entities: list[str], relations: list[str]) -> Iterator[tuple[str, str, str]]:
    for number, (head, relation, tail) in rows(path, 3):
        if number == 1 and not head.isdecimal():
            continue
        yield (
            named(entities, head, path, number),
            named(relations, relation, path, number),
            named(entities, tail, path, number),
        )
