"""Packs a raw folder into a data set: graph, shards and a manifest that is written last.

Packing is deterministic byte for byte and streams: memory is bounded by the vocabulary, the triples as integers and a
buffer. Input is refused before shards are written, and a failed packing leaves nothing behind.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import FORMAT, MANIFEST, SPLITS, Dataset
from mocme_dist.data.files import file_entry, write_json
from mocme_dist.data.graph import fingerprint, write_graph
from mocme_dist.data.labels import (
    ENTITY_LABELS,
    RELATION_LABELS,
    RELATIONS_TABLE,
    LabelWriter,
    alias_column,
    label_column,
    label_writer,
    read_relation_labels,
)
from mocme_dist.data.modalities import TABLES, Collected, ShardBuilder, Spill, collect, misnamed
from mocme_dist.data.pack_workspace import is_packed, media_hash, source_hash, workspace
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.data.shards import SUFFIXES
from mocme_dist.data.storage import is_url
from mocme_dist.data.triples import Integers, KeySpace, Seen, cut_development_set, distinct, leakage, read_splits
from mocme_dist.data.tsv import find_file, require_file
from mocme_dist.data.vectors import Vectors, open_vectors
from mocme_dist.data.vocabulary import Names, entity_order, find_twins, relation_order
from mocme_dist.errors import DataError, StorageError
from mocme_dist.partition import ShardPartition

log = logging.getLogger(__name__)

# Share of test pairs linked in train in the other direction from which a warning is logged.
_INVERSE_WARNING = 0.05
# Settings that decide the bytes of a data set.
_SETTINGS = ("shard_rows", "seed", "dev", "unseen", "allow_leakage", "max_missing", "twins", "label_column")
# Groups of names that the report lists.
_SHOWN = 20


def pack_folder(raw: Path, out: str | Path, data: DataConfig) -> Dataset:
    """Pack `raw` into `out`; a data set of the same content and settings is kept.

    Args:
        raw: folder with train.txt, valid.txt, test.txt and the tables of the modalities.
        out: new or empty folder, or one left by an interrupted packing; for an fsspec URL the data set is packed
            locally, then uploaded.
        data: settings; `raw`, `dataset` and `text_columns` are not used.

    Raises:
        ConfigError: `out` holds something else.
        DataError: a raw file is missing or malformed, or the graph breaks a rule that `data` sets.
        LockedError: another process packs into `out`.
        StorageError: `out` cannot be written.
    """
    raw = Path(raw)
    for name, meant in misnamed(raw).items():
        log.warning("%s is not read; did you mean %s?", name, meant)
    for split in ("train", "test", "valid"):  # test first: its message covers valid as well
        if split != "valid" or data.dev == "file":
            require_file(raw, f"{split}.txt")
    source = {"sha256": source_hash(raw), "settings": {name: getattr(data, name) for name in _SETTINGS}}
    mirror = RemoteStorage(str(out)) if is_url(out) else None
    if mirror is not None and MANIFEST in mirror.list(MANIFEST):
        mirror.pull(MANIFEST, "graph/*")
    elif mirror is not None:
        # left by a data set that was deleted, or by an upload that was killed: it says nothing about the remote content
        shutil.rmtree(mirror.path, ignore_errors=True)
    folder = mirror.path if mirror else Path(out)
    if is_packed(raw, folder, source):
        log.info("%s: already packed from this content with these settings", out)
        return Dataset.open(out)
    source["media"] = media_hash(raw)
    try:
        with workspace(folder) as work:
            packed = _pack(raw, folder, work, data, source)
    except OSError as error:
        raise StorageError(f"{folder.absolute()}: cannot be written: {error.strerror or error}") from error
    if mirror is None:
        return packed
    mirror.sweep()
    mirror.push_tree(last=[MANIFEST])
    return Dataset.open(out)


def _pack(raw: Path, out: Path, work: Path, data: DataConfig, source: dict[str, Any]) -> Dataset:
    graph = out / "graph"
    names, relation_names, splits = _read_graph(raw, work)
    report: dict[str, Any] = {"rows": {}, "duplicates": {}, "self_loops": {}}
    report["twins"] = {"rule": data.twins}
    entity_twins = _twins("entities", names, data.twins, report["twins"])
    relation_twins = _twins("relations", relation_names, data.twins, report["twins"])
    entity_names, entity_ids = entity_order(names, data.seed, entity_twins)
    relation_list, relation_ids = relation_order(relation_names, relation_twins)
    keys = KeySpace(len(entity_names), len(relation_list))
    for split, triples in splits.items():
        triples[:, 0] = entity_ids[triples[:, 0]]
        triples[:, 1] = relation_ids[triples[:, 1]]
        triples[:, 2] = entity_ids[triples[:, 2]]
        splits[split] = distinct(triples, keys)
        report["rows"][split] = len(triples)
        report["duplicates"][split] = len(triples) - len(splits[split])
        report["self_loops"][split] = int((splits[split][:, 0] == splits[split][:, 2]).sum())
    report["leakage"] = leakage(splits["train"], splits.get("valid"), splits["test"], keys)
    _judge_leakage(report["leakage"], data)
    everything = np.concatenate(list(splits.values()))
    _divide(splits, keys, data, report, (entity_names, relation_list))

    write_graph(graph, {split: splits[split] for split in SPLITS}, everything, entity_names, relation_list)
    sizes = {split: len(splits[split]) for split in SPLITS}
    splits.clear()
    del everything

    # Every name's number becomes its id in place: a second dictionary of all names would double the largest structure.
    for name, identity in zip(names, entity_ids.tolist(), strict=True):
        names[name] = identity
    partition = ShardPartition(len(entity_names), data.shard_rows)
    vectors = {modality: found for modality in TABLES if (found := open_vectors(raw, modality, names)) is not None}
    labels: dict[str, Any] = {"relations": _pack_relation_labels(raw, graph / RELATION_LABELS, relation_list)}
    builder, collected = _pack_modalities(raw, out, work / "spill", names, partition, vectors, data, labels)
    modalities = _modalities(builder, collected, vectors)
    report["vectors"] = _vector_report(raw, builder, vectors)
    _report_modalities(report, builder, collected, data)
    manifest = {
        "format": FORMAT,
        "num_entities": len(entity_names),
        "num_relations": len(relation_list),
        "shard_rows": data.shard_rows,
        "seed": data.seed,
        "dev": data.dev,
        "splits": sizes,
        "modalities": modalities,
        "labels": labels,
        "shards": [asdict(entry) for entry in builder.entries],
        "graph": {path.name: file_entry(path) for path in sorted(graph.iterdir())},
        "report": report,
        "source": source,
        "fingerprint": fingerprint(graph, (entity_names, relation_list), [entry.sha256 for entry in builder.entries]),
    }
    write_json(out / MANIFEST, manifest)
    return Dataset.open(out)


def _read_graph(raw: Path, work: Path) -> tuple[Names, Names, dict[str, Integers]]:
    """Return names of entities and relations, and each split that has a file as numbers of those names."""
    files = {split: file for split in SPLITS if (file := find_file(raw, f"{split}.txt")) is not None}
    return read_splits(files, find_file(raw, "entity2id.txt"), work)


def _twins(kind: str, names: Names, rule: str, report: dict[str, Any]) -> dict[bytes, bytes]:
    """Report names that look the same; return which name each is joined to, none unless `rule` is join."""
    groups = find_twins(names)
    report[kind] = {"groups": len(groups), "first": [[name.decode() for name in group] for group in groups[:_SHOWN]]}
    if groups:
        log.warning(
            "%d %s have names that look the same, such as %s; %s",
            sum(len(group) for group in groups),
            kind,
            " and ".join(ascii(name.decode()) for name in groups[0]),
            "they are joined" if rule == "join" else "they stay apart: data.twins=join makes one of each group",
        )
    return {name: group[0] for group in groups for name in group[1:]} if rule == "join" else {}


def _judge_leakage(found: Mapping[str, Mapping[str, float]], data: DataConfig) -> None:
    test = found["test_in_train"]
    if test["triples"]:
        message = f"{test['triples']} of {test['of']} test triples occur in train"
        if not data.allow_leakage:
            raise DataError(
                f"{message}; a score on them measures memory: mend the split, or set data.allow_leakage=true to accept "
                "them"
            )
        log.warning("%s (%.1f %%); a score on them measures memory", message, 100 * test["share"])
    valid = found.get("valid_in_train")
    if valid and valid["triples"] and data.dev == "file":
        share = 100 * valid["share"]
        log.warning(
            "%d of %d valid triples occur in train (%.1f %%); data.dev=cut:0.1 holds a clean set out of train",
            valid["triples"],
            valid["of"],
            share,
        )
    inverse = found["test_inverse_pairs_in_train"]
    if inverse["share"] >= _INVERSE_WARNING:
        log.warning(
            "%d of %d test triples have their (tail, head) linked in train: inverse relations may leak",
            inverse["triples"],
            inverse["of"],
        )


def _divide(
    splits: dict[str, Integers],
    keys: KeySpace,
    data: DataConfig,
    report: dict[str, Any],
    names: tuple[list[bytes], list[bytes]],
) -> None:
    """Cut the development set if requested, then apply the rule for entities and relations that are not in train."""
    if data.dev != "file":
        in_file = len(splits["valid"]) if "valid" in splits else 0
        splits["train"], splits["valid"] = cut_development_set(
            splits["train"], float(data.dev.removeprefix("cut:")), data.seed, keys
        )
        report["development_set"] = {"cut_from_train": len(splits["valid"]), "valid_file_set_aside": in_file}
    seen = Seen.of(splits["train"], keys)
    report["unseen"] = {"rule": data.unseen}
    problems: list[str] = []
    unseen: dict[bytes, None] = {}
    for split in ("valid", "test"):
        covered = seen.covers(splits[split])
        entities, relations = seen.unseen_in(splits[split])
        count = len(covered) - int(covered.sum())
        report["unseen"][split] = {
            "triples": count,
            "of": len(covered),
            "entities": len(entities),
            "relations": len(relations),
        }
        if count:
            problems.append(f"{count} of {len(covered)} {split} triples")
            unseen.update(
                dict.fromkeys(
                    [names[1][relation] for relation in relations] + [names[0][entity] for entity in entities]
                )
            )
        if data.unseen == "skip":
            splits[split] = splits[split][covered]
            if not len(splits[split]):
                raise DataError(
                    f"{split}: data.unseen=skip leaves out all of its {len(covered)} triples; mend the split or set "
                    "data.unseen=keep"
                )
    if problems and data.unseen == "error":
        shown = ", ".join(f"'{name.decode()}'" for name in list(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        raise DataError(
            f"{' and '.join(problems)} have an entity or relation that train never shows ({len(unseen)} names: "
            f"{shown}); set data.unseen=skip to leave those triples out or data.unseen=keep to rank them all the same"
        )


def _pack_relation_labels(raw: Path, path: Path, relations: list[bytes]) -> int:
    """Write the labels of relations.tsv and return how many there are."""
    file = find_file(raw, RELATIONS_TABLE)
    if file is None:
        return 0
    found, ignored = read_relation_labels(file, relations)
    if ignored:
        log.warning("%s: %d rows of relations that are not in the graph were ignored", file.label, ignored)
    with label_writer(path) as writer:
        for label, aliases in found:
            writer.add(label, aliases)
    return writer.count


def _pack_modalities(
    raw: Path,
    out: Path,
    work: Path,
    ids: Mapping[bytes, int],
    partition: ShardPartition,
    vectors: Mapping[str, Vectors],
    data: DataConfig,
    labels: dict[str, Any],
) -> tuple[ShardBuilder, Collected]:
    """Write the shards and the labels of entities; `labels` takes the columns they come from and their number."""
    spill = Spill(work, partition.shard_rows)
    # Texts and numbers are packed next to their vectors: they are small, and answers show them.
    collected = collect(raw, ids, spill, aside=[modality for modality in vectors if modality in SUFFIXES])
    columns = collected.columns.get("text", ())
    labels |= {"column": label_column(columns, data.label_column), "aliases": alias_column(columns), "entities": 0}

    def build(writer: LabelWriter | None) -> ShardBuilder:
        wanted = (writer, (labels["column"], labels["aliases"])) if writer is not None else None
        builder = ShardBuilder(raw, partition, spill, columns, vectors, wanted)
        builder.write(out / "shards")
        return builder

    if labels["column"] is None and labels["aliases"] is None:
        return build(None), collected
    with label_writer(out / "graph" / ENTITY_LABELS) as writer:
        builder = build(writer)
    labels["entities"] = writer.count
    return builder, collected


def _vector_report(raw: Path, builder: ShardBuilder, vectors: Mapping[str, Vectors]) -> dict[str, Any]:
    """Return counts of each file of vectors, and the table that it replaces."""
    report = {}
    for modality, several in vectors.items():
        table = find_file(raw, TABLES[modality][0])
        if table is not None:
            log.info("%s: imported, not computed; %s plays no part in the features", several.label, table.label)
        if several.counts["outside_graph"]:
            log.warning(
                "%s: %d rows of entities that are not in the graph were ignored",
                several.label,
                several.counts["outside_graph"],
            )
        counts = {
            **several.counts,
            "all_zero": builder.zero_rows[modality],
            "instead_of": table.label if table is not None else None,
        }
        report[modality] = {**several.facts, **counts}
    return report


def _modalities(builder: ShardBuilder, collected: Collected, vectors: Mapping[str, Vectors]) -> dict[str, Any]:
    """Return the manifest's record of the modalities that at least one entity has."""
    extra: dict[str, dict[str, Any]] = {
        "text": {"columns": list(collected.columns.get("text", ()))},
        "numeric": {"attributes": len(builder.attributes)},
        **{modality: {"files": builder.files[modality]} for modality in SUFFIXES},
    }
    extra = {
        modality: {"vectors": vectors[modality].facts} if modality in vectors else extra[modality] for modality in extra
    }
    found = {}
    for modality, present in builder.present.items():
        if present.any():
            found[modality] = {"entities": int(present.sum()), **extra[modality]}
        elif modality in vectors:
            log.warning("%s: no entity of the graph has a vector; the modality is left out", vectors[modality].label)
        elif modality in collected.columns:
            log.warning("%s: no entity of the graph has this modality; it is left out", TABLES[modality][0])
    return found


def _report_modalities(report: dict[str, Any], builder: ShardBuilder, collected: Collected, data: DataConfig) -> None:
    present: NDArray[np.bool_] = np.logical_or.reduce(list(builder.present.values()))
    missing = len(present) - int(present.sum())
    total = len(present)
    share = missing / total
    report["missing"] = {"entities": missing, "of": total, "share": round(share, 6)}
    report["ignored_rows"] = {modality: collected.ignored[modality] for modality in collected.columns}
    report["cleaned"] = {
        name: builder.counts[name]
        for name in ("replaced_text_cells", "merged_text_rows", "averaged_numbers", "repeated_files")
    }
    report["undecodable"] = {
        modality: {"files": count, "first": collected.undecodable_names[modality]}
        for modality, count in collected.undecodable.items()
    }
    for modality, count in collected.undecodable.items():
        log.warning(
            "%s: %d files of an unknown format are left out (expected %s), the first: %s",
            TABLES[modality][0],
            count,
            ", ".join(SUFFIXES[modality]),
            ", ".join(f"'{name}'" for name in collected.undecodable_names[modality]),
        )
    for modality, count in report["ignored_rows"].items():
        if count:
            log.warning(
                "%s: %d rows of entities that are not in the graph were ignored, the first of '%s'",
                *(TABLES[modality][0], count, collected.ignored_name[modality]),
            )
    if share > data.max_missing:
        raise DataError(
            f"{missing} of {total} entities ({100 * share:.1f} %) have no text, number, image, audio or video file; "
            f"expected at most {100 * data.max_missing:g} %: add their rows or raise data.max_missing"
        )
