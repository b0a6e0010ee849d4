"""Extracts features of shards with frozen encoders, on Ray Data actors or in a plain loop.

The unit of resume is one shard of one modality. Complete parts are never computed again; the encoder hash decides what
is complete. The actors are in `encoders.pools`, their work in `encoders.extractor`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import finished_hash, part_is_complete
from mocme_dist.data.files import read_json, write_json
from mocme_dist.data.manifests import NumericRecord, checked
from mocme_dist.data.progress import Progress
from mocme_dist.encoders.build import ENCODED, encoder_settings, with_absolute_paths
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.extractor import Result, ShardExtractor, Task
from mocme_dist.encoders.heartbeat import watch
from mocme_dist.encoders.numeric import RULE, NumericStatistics, fit_numbers
from mocme_dist.encoders.pools import run_tasks
from mocme_dist.encoders.report import finish_modality, finish_report, timings
from mocme_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

READ_HERE_BYTES = 1 << 30  # shards of this total size are read for their statistics before actors would have started


def extract_features(
    dataset: Dataset,
    encoders: EncodersConfig,
    text_columns: Sequence[str] | None,
    modalities: Sequence[str],
    use_ray: bool,
    max_missing: float = 1.0,
) -> dict[str, Any]:
    """Bring the features of `modalities` up to date and write extract_report.json into the data set.

    Args:
        dataset: packed data set; on a cluster its path or URL must be the same on every node.
        encoders: encoders, and the actors that run them.
        text_columns: columns of an entity's text, in order; None takes all (`Dataset.text_columns`).
        modalities: any of `ENCODED`; each must be in the data set.
        use_ray: run on Ray actors; otherwise in this process, with byte-identical results.
        max_missing: largest accepted share of entities without any feature.

    Returns:
        The report: counts, failures by cause with examples, rates and bytes per modality; skipped shards.

    Raises:
        ConfigError: an encoder is not available, or the texts have none of the columns.
        ShardError: a shard is damaged and `on_bad_shard` is error.
        DataError: strict and a file cannot be decoded, or too many entities have no feature.
        StorageError: a part cannot be written.
    """
    wanted = _ordered(dataset, modalities)
    text_columns = dataset.text_columns(text_columns)
    if "text" in wanted:
        _check_columns(dataset, text_columns)
    # by its absolute path, because actors start in another folder; they verify the shards they read
    dataset = Dataset.open(dataset.place, check_shards=encoders.on_bad_shard == "error")
    dataset.sweep()
    encoders = with_absolute_paths(encoders)
    vectors = {modality: dataset.modalities[modality].get("vectors") for modality in wanted}
    counted = "numeric" in wanted and vectors["numeric"] is None
    statistics = _numeric_statistics(dataset, encoders, text_columns, use_ray) if counted else None
    settings = {name: encoder_settings(name, encoders, text_columns, statistics, vectors[name]) for name in wanted}
    hashes = {modality: encoder_hash(modality, settings[modality], encoders) for modality in wanted}
    pending = {modality: _pending(dataset, modality, hashes[modality]) for modality in wanted}
    tasks = [{"kind": modality, "shard": shard} for modality in wanted for shard in pending[modality]]
    extractor = ShardExtractor(dataset.place, encoders, text_columns, statistics, hashes)
    results, seconds = _run_all(tasks, dataset, extractor, use_ray)
    rows = {}
    for modality in wanted:
        summary = finish_modality(dataset, modality, settings[modality], hashes[modality], encoders)
        made = sum("already" not in result for result in results[modality])
        summary["parts"] = {"done": made, "skipped": dataset.shards.num_shards - made}
        summary.update(timings(results[modality], seconds[modality]))
        rows[modality] = summary
    return finish_report(dataset, rows, max_missing)


def _ordered(dataset: Dataset, modalities: Sequence[str]) -> list[str]:
    have = [name for name in ENCODED if name in dataset.modalities]
    for name in modalities:
        if name not in have:
            raise ConfigError(
                f"modality {name}: {dataset.directory} has no such files to encode; it has {', '.join(have) or 'none'}"
            )
    return [name for name in have if name in modalities]


def _check_columns(dataset: Dataset, text_columns: Sequence[str]) -> None:
    there = dataset.modalities["text"].get("columns")
    if there is None:  # imported vectors
        return
    unknown = [name for name in text_columns if name not in there]
    if len(unknown) == len(text_columns):
        raise ConfigError(
            f"data.text_columns: the data set's texts have no column {', '.join(map(repr, unknown))}; they have "
            f"{', '.join(map(repr, there))}"
        )
    if unknown:
        log.warning(
            "data.text_columns: the data set's texts have no column %s; they have %s",
            ", ".join(map(repr, unknown)),
            ", ".join(map(repr, there)),
        )


# -- running tasks


def _run_all(
    tasks: Sequence[Task], dataset: Dataset, extractor: ShardExtractor, use_ray: bool
) -> tuple[dict[str, list[Result]], dict[str, float]]:
    """Return results per modality, and each modality's share of the wall-clock time by the actors' work."""
    results: dict[str, list[Result]] = {modality: [] for modality in extractor.hashes}
    sizes = {
        shard: last - first
        for shard in range(dataset.shards.num_shards)
        for first, last in [dataset.shards.bounds(shard)]
    }
    before = time.monotonic()
    if not tasks:
        return results, dict.fromkeys(results, 0.0)
    with (
        Progress("extract", sum(sizes[task["shard"]] for task in tasks)) as progress,
        watch(dataset.directory / "features", progress) as folder,
    ):
        extractor.heartbeats = folder
        finished = 0
        for result in run_tasks(tasks, extractor, use_ray, progress.add):
            finished += sizes[result["shard"]]
            progress.raise_to(finished)
            results[result["kind"]].append(result)
    work = {modality: sum(result["seconds"] for result in done) for modality, done in results.items()}
    scale = (time.monotonic() - before) / max(sum(work.values()), 1e-9)
    return results, {modality: seconds * scale for modality, seconds in work.items()}


# -- statistics, and pending shards


def _numeric_statistics(
    dataset: Dataset, encoders: EncodersConfig, columns: Sequence[str], use_ray: bool
) -> NumericStatistics:
    """Return statistics of all numbers, from features/numeric/statistics.json if that was made from these shards."""
    name = "features/numeric/statistics.json"
    path = dataset.directory / name
    dataset.bring(name)
    hashes = [entry.sha256 for entry in dataset.entries]
    made_from = {"shards": hashes, "max_attributes": encoders.numeric.max_attributes, "rule": RULE}
    try:
        stored = read_json(path)
        if stored["made_from"] == made_from and checked(NumericRecord, stored, path, ""):
            dataset.publish_missing(name)
            return NumericStatistics.from_json(stored)
    except (DataError, KeyError, TypeError):
        pass  # absent or damaged: computed below
    tasks = [{"kind": "statistics", "shard": shard} for shard in range(dataset.shards.num_shards)]
    extractor = ShardExtractor(dataset.place, encoders, tuple(columns), None, {})
    use_ray = use_ray and sum(entry.bytes for entry in dataset.entries) > READ_HERE_BYTES
    bad: list[int] = []

    def in_order() -> Iterator[Any]:
        """Yield the shards' numbers in order; early results wait, so that memory stays small."""
        waiting: dict[int, Any] = {}
        due = 0
        for result in run_tasks(tasks, extractor, use_ray, None):
            waiting[result["shard"]] = result["numbers"]
            bad.extend([result["shard"]] if "bad_shard" in result else [])
            first, last = dataset.shards.bounds(result["shard"])
            progress.add(last - first)
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    with Progress("numeric statistics", dataset.num_entities) as progress:
        statistics = fit_numbers(in_order(), encoders.numeric.max_attributes)
    # statistics without some shards are valid for this run only
    write_json(path, {"made_from": {**made_from, "without": sorted(bad)} if bad else made_from, **statistics.to_json()})
    dataset.publish(name)
    return statistics


def _pending(dataset: Dataset, modality: str, pinned: str) -> list[int]:
    """Return shards whose part is missing or stale; first withdraws a manifest of another encoder."""
    directory = dataset.directory / "features" / modality
    manifest = directory / "manifest.json"
    dataset.bring(f"features/{modality}/*.json")
    if manifest.is_file() and finished_hash(dataset.directory, modality) != pinned:
        log.info("%s: encoder or settings changed; its parts are made again", modality)
        dataset.withdraw(f"features/{modality}/manifest.json")
    there = dataset.remote_part_sizes(modality)
    return [
        shard
        for shard, entry in enumerate(dataset.entries)
        if not part_is_complete(directory, shard, entry.sha256, pinned, None if there is None else there.get(shard, -1))
    ]
