"""Results of a finished extraction: a modality's manifest, its summary for the report, and the table for readers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import (
    FEATURES_FORMAT,
    count_constant_columns,
    finished_hash,
    part_path,
    read_part_record,
    recorded_presence,
)
from mocme_dist.data.files import read_json, write_json
from mocme_dist.encoders.build import ENCODED
from mocme_dist.encoders.shard import EXAMPLES, part_presence, part_width, strict_error
from mocme_dist.errors import DataError

log = logging.getLogger(__name__)


def finish_modality(
    dataset: Dataset, modality: str, settings: dict[str, Any], pinned: str, encoders: EncodersConfig
) -> dict[str, Any]:
    """Write the modality's manifest from the JSON of its parts, and return a summary."""
    directory = dataset.directory / "features" / modality
    dataset.bring(f"features/{modality}/*.json")
    parts = [read_part_record(directory, shard) for shard in range(dataset.shards.num_shards)]
    failed: Counter[str] = Counter()
    for part in parts:
        failed.update(part["failed"])
    examples = [example for part in parts for example in part["examples"]][:EXAMPLES]
    if encoders.strict and examples:
        raise strict_error(examples[0]["id"], modality, examples[0]["cause"], examples[0]["message"])
    for shard, part in enumerate(parts):
        if part["encoder_hash"] != pinned:
            raise DataError(
                f"{part_path(directory, shard)}: encoder_hash {part['encoder_hash'][:12]}, this run's is "
                f"{pinned[:12]}; another run with other settings writes here at the same time: let it end, then run "
                "this again"
            )
    left_out = [(shard, part["bad_shard"]) for shard, part in enumerate(parts) if "bad_shard" in part]
    present = sum(part["present"] for part in parts)
    if not present:
        log.warning("%s: not one entity has features of this modality", modality)
    width = _width(dataset, modality, parts[0])
    constant = count_constant_columns(parts, width)
    # presence columns of attributes that all entities have are constant by design
    if constant and modality != "numeric":
        log.warning("%s: %d of %d feature columns have the same value for all entities", modality, constant, width)
    manifest = {
        "format": FEATURES_FORMAT,
        "modality": modality,
        "width": width,
        "dtype": encoders.dtype,
        "encoder": settings,
        "encoder_hash": pinned,
        "num_rows": dataset.num_entities,
        "shard_rows": dataset.shards.shard_rows,
        "present": present,
        "failed": dict(sorted(failed.items())),
        "skipped_shards": [shard for shard, _ in left_out],
    }
    write_json(directory / "manifest.json", manifest)
    dataset.publish(f"features/{modality}/manifest.json")
    names = dataset.entity_names() if examples else []
    return {
        "width": manifest["width"],
        "present": present,
        "absent": dataset.num_entities - present,
        "share": round(present / dataset.num_entities, 4),
        "constant_columns": constant,
        "failed": manifest["failed"],
        "examples": [{**example, "name": names[example["id"]]} for example in examples],
        "bytes": sum(part["bytes"] for part in parts),
        "encoder_hash": pinned,
        "skipped_shards": [
            {"shard": shard, "file": dataset.entries[shard].name, "reason": reason} for shard, reason in left_out
        ],
    }


def finish_report(dataset: Dataset, rows: dict[str, dict[str, Any]], max_missing: float) -> dict[str, Any]:
    """Write extract_report.json and return it, before checking it against `max_missing`.

    It holds `rows` of this run and the last rows of the other finished modalities.

    Raises:
        DataError: more than the share `max_missing` of the entities have no feature of any finished modality.
    """
    missing = dataset.num_entities
    encoded = [name for name in ENCODED if name in dataset.modalities]
    finished = {name: _finished(dataset, name) for name in encoded if name not in rows}
    names = [name for name in encoded if name in rows or finished[name]]
    before = _rows_before(dataset)
    # rows of modalities that this run did not touch stay unless their features have changed
    kept = {
        name: row for name, row in before.items() if finished.get(name) and row.get("encoder_hash") == finished[name]
    }
    rows = {name: (rows | kept)[name] for name in names if name in rows or name in kept}
    if names:
        missing = sum(
            int((~np.logical_or.reduce([_presence(dataset, name, shard) for name in names])).sum())
            for shard in range(dataset.shards.num_shards)
        )
    share = missing / dataset.num_entities
    report = {
        "modalities": rows,
        "missing": {"entities": missing, "of": dataset.num_entities, "share": round(share, 6)},
        "n_skipped": len({entry["shard"] for row in rows.values() for entry in row["skipped_shards"]}),
    }
    write_json(dataset.directory / "extract_report.json", report)
    dataset.publish("extract_report.json")
    if share > max_missing:
        raise DataError(
            f"{missing:,} of {dataset.num_entities:,} entities have no features ({100 * share:.1f} %); expected at "
            f"most {100 * max_missing:g} %: add their files, or raise --max-missing (data.max_missing)"
        )
    return report


def _presence(dataset: Dataset, modality: str, shard: int) -> np.ndarray:
    """Return the presence mask (rows,) of a part from its JSON, or from the part itself in older versions."""
    directory = dataset.directory / "features" / modality
    found = recorded_presence(read_part_record(directory, shard))
    if found is None:
        dataset.bring(f"features/{modality}/{part_path(directory, shard).name}")
        found = part_presence(directory, shard)
    return found


def _width(dataset: Dataset, modality: str, stats: dict[str, Any]) -> int:
    """Return F of a part, from the same sources."""
    if "width" in stats:
        return int(stats["width"])
    first = part_path(dataset.directory / "features" / modality, 0)
    dataset.bring(f"features/{modality}/{first.name}")
    return part_width(first.parent, 0)


def _finished(dataset: Dataset, modality: str) -> str:
    """Return the encoder hash of a modality's finished features; empty if there are none."""
    directory = dataset.directory / "features" / modality
    dataset.bring(f"features/{modality}/*.json")
    if not (directory / "manifest.json").is_file():
        return ""
    there = dataset.remote_part_sizes(modality)
    shards = range(dataset.shards.num_shards)
    if not all(part_path(directory, shard).is_file() if there is None else shard in there for shard in shards):
        return ""
    return finished_hash(dataset.directory, modality)


def _rows_before(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return the rows of the last report, by modality."""
    dataset.bring("extract_report.json")
    try:
        return dict(read_json(dataset.directory / "extract_report.json")["modalities"])
    except (DataError, KeyError, TypeError, ValueError):
        return {}  # absent or damaged: its rows are written again with their modalities


def timings(results: Iterable[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    """Return rates and phases of the shards of this run.

    Phases are sums over actors, and decoding overlaps encoding.
    """
    results = list(results)
    samples = sum(result["samples"] for result in results)
    busy = sum(result["seconds"] for result in results)
    phases = {
        key: round(sum(result[key] for result in results), 3) for key in ("read_s", "decode_s", "encode_s", "write_s")
    }
    return {
        "samples": samples,
        "seconds": round(wall_s, 3),  # including the start of actors and the loading of weights
        "samples_per_s": round(samples / wall_s, 1) if wall_s else 0.0,
        "samples_per_s_per_actor": round(samples / busy, 1) if busy else 0.0,
        # share of the shards' time spent in the encoder
        "busy_fraction": round(phases["encode_s"] / busy, 4) if busy else 0.0,
        "phases": phases,
    }


def report_table(report: dict[str, Any]) -> str:
    """Return the report as a table for readers."""
    titles = f"{'modality':<10}{'width':>7}{'present':>11}{'share':>8}{'failed':>8}{'samples/s':>11}{'MiB':>9}"
    lines = [titles + "  parts done/skipped, failures"]
    for name, row in report["modalities"].items():
        causes = ", ".join(f"{cause} {count}" for cause, count in row["failed"].items())
        lines.append(
            f"{name:<10}{row['width']:>7}{row['present']:>11,}{row['share']:>8.1%}{sum(row['failed'].values()):>8,}"
            f"{row['samples_per_s']:>11,.1f}{row['bytes'] / 2**20:>9.1f}  "
            f"{row['parts']['done']}/{row['parts']['skipped']}  {causes}"
        )
    missing = report["missing"]
    lines.append(f"{missing['entities']:,} of {missing['of']:,} entities have no features ({missing['share']:.1%})")
    skipped = {
        entry["file"]: entry["reason"] for row in report["modalities"].values() for entry in row["skipped_shards"]
    }
    lines += [f"left out: {reason}" for reason in skipped.values()]
    return "\n".join(lines)
