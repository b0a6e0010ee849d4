"""What a finished extraction leaves behind: a modality's manifest, its summary for the report, the table for people."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FEATURES_FORMAT, part_path, recorded_presence
from mocme_dist.data.files import read_json, write_json
from mocme_dist.encoders.build import ENCODED
from mocme_dist.encoders.shard import EXAMPLES, part_presence, part_width, strict_error
from mocme_dist.errors import DataError

log = logging.getLogger(__name__)


def finish_modality(dataset: Dataset, modality: str, settings: dict[str, Any], pinned: str, encoders: EncodersConfig) -> dict[str, Any]:
    """Write the modality's manifest from its parts' files, and sum them up."""
    directory = dataset.directory / "features" / modality
    dataset.bring(f"features/{modality}/*.json")
    parts = [read_json(part_path(directory, shard).with_suffix(".json")) for shard in range(dataset.shards.num_shards)]
    failed: Counter[str] = Counter()
    for part in parts:
        failed.update(part["failed"])
    examples = [example for part in parts for example in part["examples"]][:EXAMPLES]
    if encoders.strict and examples:
        raise strict_error(examples[0]["id"], modality, examples[0]["cause"], examples[0]["message"])
    for shard, part in enumerate(parts):
        if part["encoder_hash"] != pinned:
            raise DataError(
                f"{part_path(directory, shard)}: encoder_hash {part['encoder_hash'][:12]}, this run's is {pinned[:12]}; another run with "
                "other settings writes here at the same time: let it end, then run this again"
            )
    left_out = [(shard, part["bad_shard"]) for shard, part in enumerate(parts) if "bad_shard" in part]
    present = sum(part["present"] for part in parts)
    if not present:
        log.warning("%s: not one entity has features of this modality", modality)
    manifest = {
        "format": FEATURES_FORMAT,
        "modality": modality,
        "width": _width(dataset, modality, parts[0]),
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
        "failed": manifest["failed"],
        "examples": [{**example, "name": names[example["id"]]} for example in examples],
        "bytes": sum(part["bytes"] for part in parts),
        "encoder_hash": pinned,
        "skipped_shards": [{"shard": shard, "file": dataset.entries[shard].name, "reason": reason} for shard, reason in left_out],
    }


def finish_report(dataset: Dataset, rows: dict[str, dict[str, Any]], max_missing: float) -> dict[str, Any]:
    """The whole report, written to extract_report.json before it is judged.

    It holds `rows`, of this run, and the last rows of the other finished modalities; all of them count for what is missing.

    Raises:
        DataError: more than the share `max_missing` of the entities have no feature of any finished modality.
    """
    missing = dataset.num_entities
    encoded = [name for name in ENCODED if name in dataset.modalities]
    finished = {name: _finished(dataset, name) for name in encoded if name not in rows}
    names = [name for name in encoded if name in rows or finished[name]]
    before = _rows_before(dataset)
    # rows of modalities that this run left alone stay, those of other features than lie there now do not
    kept = {name: row for name, row in before.items() if finished.get(name) and row.get("encoder_hash") == finished[name]}
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
            f"{missing:,} of {dataset.num_entities:,} entities have no features ({100 * share:.1f} %); expected at most "
            f"{100 * max_missing:g} %: add their files, or raise --max-missing (data.max_missing)"
        )
    return report


def _presence(dataset: Dataset, modality: str, shard: int) -> np.ndarray:
    """(rows,) who is present in a part, from its JSON; from the part itself where that is of an older version."""
    directory = dataset.directory / "features" / modality
    found = recorded_presence(read_json(part_path(directory, shard).with_suffix(".json")))
    if found is None:
        dataset.bring(f"features/{modality}/{part_path(directory, shard).name}")
        found = part_presence(directory, shard)
    return found


def _width(dataset: Dataset, modality: str, stats: dict[str, Any]) -> int:
    """F, as `_presence` finds it."""
    if "width" in stats:
        return int(stats["width"])
    first = part_path(dataset.directory / "features" / modality, 0)
    dataset.bring(f"features/{modality}/{first.name}")
    return part_width(first.parent, 0)


def _finished(dataset: Dataset, modality: str) -> str:
    """The encoder hash of a modality's finished features; empty where there are none."""
    directory = dataset.directory / "features" / modality
    dataset.bring(f"features/{modality}/*.json")
    if not (directory / "manifest.json").is_file():
        return ""
    there, shards = dataset.remote_part_sizes(modality), range(dataset.shards.num_shards)
    if not all(part_path(directory, shard).is_file() if there is None else shard in there for shard in shards):
        return ""
    return str(read_json(directory / "manifest.json").get("encoder_hash", ""))


def _rows_before(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The rows of the last report, by modality."""
    dataset.bring("extract_report.json")
    try:
        return dict(read_json(dataset.directory / "extract_report.json")["modalities"])
    except (DataError, KeyError, TypeError, ValueError):
        return {}  # absent, or not one of ours: its rows are made again with their modalities


def timings(results: Iterable[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    """Rates and phases over the shards done now; phases are sums over actors, decoding overlaps encoding."""
    results = list(results)
    samples = sum(result["samples"] for result in results)
    busy = sum(result["seconds"] for result in results)
    phases = {key: round(sum(result[key] for result in results), 3) for key in ("read_s", "decode_s", "encode_s", "write_s")}
    return {
        "samples": samples,
        "seconds": round(wall_s, 3),  # with the start of actors and the loading of weights
        "samples_per_s": round(samples / wall_s, 1) if wall_s else 0.0,
        "samples_per_s_per_actor": round(samples / busy, 1) if busy else 0.0,
        "busy_fraction": round(phases["encode_s"] / busy, 4) if busy else 0.0,  # of the shards' time, in the encoder
        "phases": phases,
    }


def report_table(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    titles = f"{'modality':<10}{'width':>7}{'present':>11}{'share':>8}{'failed':>8}{'samples/s':>11}{'MiB':>9}"
    lines = [titles + "  parts done/skipped, failures"]
    for name, row in report["modalities"].items():
        causes = ", ".join(f"{cause} {count}" for cause, count in row["failed"].items())
        lines.append(
            f"{name:<10}{row['width']:>7}{row['present']:>11,}{row['share']:>8.1%}{sum(row['failed'].values()):>8,}"
            f"{row['samples_per_s']:>11,.1f}{row['bytes'] / 2**20:>9.1f}  {row['parts']['done']}/{row['parts']['skipped']}  {causes}"
        )
    missing = report["missing"]
    lines.append(f"{missing['entities']:,} of {missing['of']:,} entities have no features ({missing['share']:.1%})")
    skipped = {entry["file"]: entry["reason"] for row in report["modalities"].values() for entry in row["skipped_shards"]}
    lines += [f"left out: {reason}" for reason in skipped.values()]
    return "\n".join(lines)
