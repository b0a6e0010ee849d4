"""Imports Wikidata5m, triples and texts: `mocme import wikidata5m SOURCE OUT [--setting inductive]`.

SOURCE holds wikidata5m_SETTING_{train,valid,test}.txt (head, relation, tail), wikidata5m_text.txt (entity TAB
description) and maybe wikidata5m_entity.txt (entity, then its names, tab-separated), gzipped or not. Entities without a
fact are left out. Memory is bounded by the names of the entities.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocme_dist.errors import DataError
from mocme_dist.importers.raw_folder import SPLITS, RawWriter, lines, one_line, optional, require, rows

_WHAT = (
    "Wikidata5m has wikidata5m_SETTING_train.txt, _valid.txt, _test.txt, wikidata5m_text.txt and wikidata5m_entity.txt"
)


def import_wikidata5m(source: Path, out: Path, setting: str = "transductive") -> dict[str, Any]:
    """Write the raw folder: the label is an entity's first name, the aliases its others.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: a file is missing or malformed.
    """
    text = require(source, "wikidata5m_text.txt", what=_WHAT)
    seen: set[str] = set()
    with RawWriter(out, source, f"wikidata5m {setting}") as writer:
        for split in SPLITS:
            writer.triples(split, _noted(require(source, f"wikidata5m_{setting}_{split}.txt", what=_WHAT), seen))
        names = _names(optional(source, "wikidata5m_entity.txt"), seen)
        writer.table("text.tsv", _texts(text, names, seen), header=("entity", "label", "description", "aliases"))
        return writer.counts


def _noted(path: Path, seen: set[str]) -> Iterator[tuple[str, str, str]]:
    for _, (head, relation, tail) in rows(path, 3):
        seen.update((head, tail))
        yield head, relation, tail


def _names(path: Path | None, seen: set[str]) -> dict[str, str]:
    """The names of each entity that has a fact, tab-separated as in the file."""
    if path is None:
        return {}
    split = (line.partition("\t") for _, line in lines(path))
    return {entity: names for entity, _, names in split if entity in seen}


def _texts(path: Path, names: dict[str, str], seen: set[str]) -> Iterator[tuple[str, str, str, str]]:
    """A row for each entity with a description, then those with names alone."""
    for number, line in lines(path):
        entity, tab, description = line.partition("\t")
        if not tab:
            raise DataError(f"{path.absolute()}:{number}: expected an entity, a tab and its text, got {line[:80]!r}")
        if entity in seen:
            label, aliases = _split_names(names.pop(entity, ""))
            yield entity, label, one_line(description), aliases
    for entity, own in names.items():
        label, aliases = _split_names(own)
        yield entity, label, "", aliases


def _split_names(own: str) -> tuple[str, str]:
    label, *aliases = (one_line(name) for name in own.split("\t"))
    return label, ", ".join(alias for alias in aliases if alias)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this importer."""
    parser.add_argument(
        "--setting", choices=("transductive", "inductive"), default="transductive", help="which of the two splits"
    )
