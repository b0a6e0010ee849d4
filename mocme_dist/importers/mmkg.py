"""Imports the multi-modal benchmarks as MMRNS, AdaMF-MAT, NativE, MyGO and MoMoK publish them.

`mocme import mmkg SOURCE OUT`.

SOURCE holds one graph in either form, with what there is of features beside it or in --embeddings DIR:
  OpenKE form   entity2id.txt, relation2id.txt (a first line with their count), {train,valid,test}2id.txt (head, tail,
                relation, as numbers)
  named form    entity2id.txt, {train,valid,test}.txt (head, relation, tail, by name or number, between tabs or spaces)
  features      NAME-visual.pth, NAME-textual.pth, NAME-numeric.pth, NAME-audio.pth, NAME-video.pth or img_features.pth,
                text_features.pth, numeric_features.pth: one row per entity in the order of entity2id.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocme_dist.errors import DataError
from mocme_dist.importers.raw_folder import SPLITS, RawWriter, lines, named, number_map, optional, require

_WHAT = "a release has entity2id.txt, relation2id.txt and {train,valid,test}2id.txt or {train,valid,test}.txt"
# The endings that the releases use, and our modality.
FEATURES = {
    "image": ("-visual.pth", "img_features.pth", "-image.pth"),
    "text": ("-textual.pth", "text_features.pth", "-text.pth"),
    "numeric": ("-numeric.pth", "numeric_features.pth"),
    "audio": ("-audio.pth", "audio_features.pth"),
    "video": ("-video.pth", "video_features.pth"),
}


def import_mmkg(source: Path, out: Path, embeddings: Path | None = None, name: str | None = None) -> dict[str, Any]:
    """Write the raw folder of one published graph.

    Args:
        embeddings: where the feature files lie; SOURCE when not given.
        name: the graph's name in the feature files' names, when DIR holds those of several graphs; default SOURCE's
            own.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: a file is missing or malformed.
    """
    entities = number_map(require(source, "entity2id.txt", what=_WHAT))
    relation_file = optional(source, "relation2id.txt")
    relations = number_map(relation_file) if relation_file else []
    with RawWriter(out, source, "mmkg") as writer:
        writer.entity_ids(entities)
        for split in SPLITS:
            path = require(source, f"{split}2id.txt", f"{split}.txt", what=_WHAT)
            by_number = path.name.startswith(f"{split}2id")
            writer.triples(
                split, _numbered(path, entities, relations) if by_number else _by_name(path, entities, relations)
            )
        for modality, path in find_features(embeddings or source, name or source.resolve().name).items():
            writer.feature_file(modality, path, entities)
        return writer.counts


def _numbered(path: Path, entities: list[str], relations: list[str]) -> Iterator[tuple[str, str, str]]:
    """OpenKE's order: head, tail, relation."""
    for number, line in lines(path):
        fields = line.split()
        if number == 1 and len(fields) == 1:
            continue
        if len(fields) != 3:
            raise DataError(f"{path.absolute()}:{number}: expected head, tail and relation numbers, got {line[:80]!r}")
        head, tail, relation = fields
        yield (
            named(entities, head, path, number),
            named(relations, relation, path, number),
            named(entities, tail, path, number),
        )


def _by_name(path: Path, entities: list[str], relations: list[str]) -> Iterator[tuple[str, str, str]]:
    """Head, relation, tail by name, or all by number where no entity has such a name."""
    known = set(entities)
    for number, line in lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 4 and fields[3] == ".":
            fields = fields[:3]
        if len(fields) != 3:
            raise DataError(f"{path.absolute()}:{number}: expected head, relation and tail, got {line[:80]!r}")
        head, relation, tail = (field.strip() for field in fields)
        if head not in known and head.isdecimal():
            head = named(entities, head, path, number)
            tail = named(entities, tail, path, number)
            relation = named(relations, relation, path, number)
        for entity in (head, tail):
            if entity not in known:
                raise DataError(f"{path.absolute()}:{number}: {entity!r} is not in entity2id.txt")
        yield head, relation, tail


def find_features(folder: Path, name: str) -> dict[str, Path]:
    """Feature file of each modality in `folder`: NAME-visual.pth and its like, or a name without a graph's.

    Raises:
        DataError: the folder is missing, or two files would do for one modality.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: folder not found; --embeddings takes the folder of the .pth files")
    found: dict[str, Path] = {}
    for modality, endings in FEATURES.items():
        candidates = [folder / f"{name}{ending}" if ending.startswith("-") else folder / ending for ending in endings]
        files = [path for path in candidates if path.is_file()]
        if len(files) > 1:
            raise DataError(
                f"{folder.absolute()}: {files[0].name} and {files[1].name} are both features of {modality}; keep one"
            )
        if files:
            found[modality] = files[0]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this importer."""
    parser.add_argument(
        "--embeddings", type=Path, metavar="DIR", help="folder of the .pth feature files; default SOURCE"
    )
    parser.add_argument("--name", help="the graph's name in the names of the feature files; default the name of SOURCE")
