"""Imports a data set folder of LibKGE: `python -m tools.import_libkge SOURCE OUT`.

SOURCE holds train.del, valid.del, test.del (head, relation, tail as numbers), entity_ids.del and relation_ids.del (number TAB name),
and maybe entity_strings.del (name TAB text), which becomes text.tsv. Cached .pckl files beside them are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.importing import SPLITS, RawWriter, named, nothing_more, number_map, one_line, optional, require, rows, run_importer

_WHAT = "a LibKGE folder has train.del, valid.del, test.del, entity_ids.del and relation_ids.del"


def import_libkge(source: Path, out: Path) -> dict[str, Any]:
    """Write the raw folder.

    Returns:
        Counts of lines by file.

    Raises:
        DataError: a file is missing or malformed; it is named.
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
        yield named(entities, head, path, number), named(relations, relation, path, number), named(entities, tail, path, number)


if __name__ == "__main__":
    run_importer(__doc__, nothing_more, import_libkge)
