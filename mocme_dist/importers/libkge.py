"""Imports a data set folder of LibKGE: `mocme import libkge SOURCE OUT`.

SOURCE holds train.del, valid.del, test.del (head, relation, tail as numbers), entity_ids.del and relation_ids.del
(number TAB name),
and maybe entity_strings.del (name TAB text), which becomes text.tsv. Cached .pckl files beside them are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocme_dist.importers.raw_folder import (
    SPLITS,
    RawWriter,
    named,
    number_map,
    one_line,
    optional,
    require,
    rows,
)

_WHAT = "a LibKGE folder has train.del, valid.del, test.del, entity_ids.del and relation_ids.del"


def import_libkge(source: Path, out: Path) -> dict[str, Any]:
    """Write the raw folder.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: a file is missing or malformed.
    """
    entities = number_map(require(source, "entity_ids.del", what=_WHAT), name_first=False)
    relations = number_map(require(source, "relation_ids.del", what=_WHAT), name_first=False)
    with RawWriter(out, source, "libkge") as writer:
        writer.entity_ids(entities)
        for split in SPLITS:
            writer.triples(split, _triples(require(source, f"{split}.del", what=_WHAT), entities, relations))
        strings = optional(source, "entity_strings.del")
        if strings is not None:
            texts = ((name, one_line(text)) for _, (name, text) in rows(strings, 2))
            writer.table("text.tsv", texts, header=("entity", "label"))
        return writer.counts


def _triples(path: Path, entities: list[str], relations: list[str]) -> Iterator[tuple[str, str, str]]:
    for number, (head, relation, tail) in rows(path, 3):
        yield (
            named(entities, head, path, number),
            named(relations, relation, path, number),
            named(entities, tail, path, number),
        )
