"""Shards to feature parts with frozen encoders: a Ray Data actor pool, or the same work in a plain loop.

The unit of work, of retry and of resume is one shard of one modality. An actor holds one encoder at a time, streams
the shard's tar from shared storage and writes the part there; only counts and timings come back. Complete parts are
never made again; the encoder hash decides what is complete. The one module that imports ray.data.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mocme_dist import errors
from mocme_dist.cluster import connect_ray, keep_pages
from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import part_files, part_is_complete
from mocme_dist.data.files import read_json, write_json
from mocme_dist.data.progress import Progress
from mocme_dist.encoders.attempts import Attempt
from mocme_dist.encoders.build import ENCODED, build_encoder, encoder_settings, with_absolute_paths
from mocme_dist.encoders.encoder import Encoder, encoder_hash
from mocme_dist.encoders.heartbeat import Heartbeat, watch
from mocme_dist.encoders.numeric import RULE, NumericStatistics, collect_numbers, fit_numbers
from mocme_dist.encoders.report import finish_modality, finish_report, timings
from mocme_dist.encoders.shard import NOTHING, extract_shard, leave_out
from mocme_dist.errors import ConfigError, DataError, MocmeError, ShardError

log = logging.getLogger(__name__)

READ_HERE_BYTES = 1 << 30  # shards up to this much are read for their statistics sooner than actors have started
Task = dict[str, Any]  # {"kind": a modality or "statistics", "shard": n}
Result = dict[str, Any]


def extract_features(
    dataset: Dataset,
    encoders: EncodersConfig,
    text_columns: Sequence[str],
    modalities: Sequence[str],
    use_ray: bool,
    max_missing: float = 1.0,
) -> dict[str, Any]:
    """Bring the features of `modalities` up to date and write extract_report.json into the data set.

    Args:
        dataset: packed; under a cluster its place must be the same path, or URL, on every node.
        encoders: which encoders, with how many actors.
        text_columns: columns that make an entity's text, in order.
        modalities: any of `ENCODED`; each must be in the data set.
        use_ray: run on Ray actors; otherwise in this process, with equal bytes as the result.
        max_missing: largest share of entities without any feature that is accepted.

    Returns:
        The report: per modality counts, failures by cause with examples, rates and bytes; shards that were left out.

    Raises:
        ConfigError: an encoder cannot be had, or the texts have none of the columns.
        ShardError: a shard is damaged and `on_bad_shard` is error.
        DataError: strict and a file cannot be decoded, or too many entities have no feature.
        StorageError: a part cannot be written.
    """
    wanted = _ordered(dataset, modalities)
    if "text" in wanted:
        _check_columns(dataset, text_columns)
    # actors start in another folder; they check the shards they read
    dataset = Dataset.open(dataset.place, check_shards=encoders.on_bad_shard == "error")
    encoders = with_absolute_paths(encoders)
    vectors = {modality: dataset.modalities[modality].get("vectors") for modality in wanted}
    counted = "numeric" in wanted and vectors["numeric"] is None
    statistics = _numeric_statistics(dataset, encoders, text_columns, use_ray) if counted else None
    settings = {name: encoder_settings(name, encoders, text_columns, statistics, vectors[name]) for name in wanted}
    hashes = {modality: encoder_hash(modality, settings[modality], encoders) for modality in wanted}
    pending = {modality: _pending(dataset, modality, hashes[modality]) for modality in wanted}
    tasks = [{"kind": modality, "shard": shard} for modality in wanted for shard in pending[modality]]
    results, seconds = _run_all(tasks, dataset, Workshop(dataset.place, encoders, tuple(text_columns), statistics, hashes), use_ray)
    rows = {}
    for modality in wanted:
        summary = finish_modality(dataset, modality, settings[modality], hashes[modality], encoders)
        made = sum("already" not in result for result in results[modality])
        summary["parts"] = {"done": made, "skipped": dataset.shards.num_shards - made}
        summary.update(timings(results[modality], seconds[modality]))
        rows[modality] = summary
    return finish_report(dataset, rows, max_missing)


class Workshop:
    """Does tasks one after another with one encoder at a time; what an actor is, and what the plain loop uses."""

    def __init__(
        self,
        place: str,
        encoders: EncodersConfig,
        text_columns: tuple[str, ...],
        statistics: NumericStatistics | None,
        hashes: dict[str, str],
    ) -> None:
        self.place, self.encoders, self.text_columns = place, encoders, text_columns
        self.statistics, self.hashes = statistics, hashes
        self.heartbeats: Path | None = None  # where actors say how far they are
        self.dataset: Dataset | None = None
        self.encoder: Encoder | None = None

    def do(self, task: Task, on_rows: Callable[[int], None] | None = None, attempt: Attempt | None = None) -> Result:
        """Run one task; a `MocmeError` comes back as {"error": kind, "message": text}."""
        # the sums of a product depend on how many threads share it
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, int(self.encoders.cpus_per_actor)))
        try:
            self.dataset = self.dataset or Dataset.open(self.place, check_shards=False)
            if task["kind"] == "statistics":
                return {**task, **self._statistics(self.dataset, task["shard"])}
            result = self._extract(self.dataset, task["kind"], task["shard"], on_rows, attempt)
            self.dataset.publish(*part_files(task["kind"], task["shard"]))
            return {**task, **result}
        except MocmeError as error:
            return {**task, "error": type(error).__name__, "message": str(error)}
        except torch.OutOfMemoryError as error:
            message = f"encoders.{task['kind']}: {str(error).splitlines()[0]}; lower encoders.{task['kind']}.batch_size"
            return {**task, "error": ConfigError.__name__, "message": message}
        finally:
            torch.set_num_threads(threads)

    def _statistics(self, dataset: Dataset, shard: int) -> Result:
        samples = dataset.read_samples(shard, self.encoders.max_member_mb * 2**20, "numeric")
        try:
            return {"numbers": collect_numbers(sample.members for sample in samples)}
        except ShardError as error:
            if self.encoders.on_bad_shard == "error":
                raise
            return {"numbers": {}, "bad_shard": str(error)}

    def _extract(
        self, dataset: Dataset, modality: str, shard: int, on_rows: Callable[[int], None] | None, attempt: Attempt | None
    ) -> Result:
        pinned = self.hashes[modality]
        if part_is_complete(dataset.directory / "features" / modality, shard, dataset.entries[shard].sha256, pinned):
            return {**NOTHING, "already": True}  # by another run, or by this task before its actor was lost
        if attempt is not None:
            attempt.check()
        encoder = self._encoder_of(dataset, modality)
        try:
            return extract_shard(encoder, dataset, shard, self.encoders, pinned, on_rows, attempt)
        except ShardError as error:
            if self.encoders.on_bad_shard == "error":
                raise
            log.warning("%s: left out: %s", modality, error)
            return leave_out(encoder, dataset, shard, self.encoders, pinned, str(error))

    def _encoder_of(self, dataset: Dataset, modality: str) -> Encoder:
        if self.encoder is None or self.encoder.modality != modality:
            self.encoder = None  # free the old one first: two do not need to fit
            vectors = dataset.modalities[modality].get("vectors")
            encoder = build_encoder(modality, self.encoders, self.text_columns, self.statistics, vectors=vectors)
            found = encoder_hash(modality, encoder.settings, self.encoders)
            if found != self.hashes[modality]:
                raise DataError(
                    f"encoders.{modality}: this node's weights or settings give hash {found[:12]}, "
                    f"the driver's {self.hashes[modality][:12]}; bring the same files to every node"
                )
            self.encoder = encoder
        return self.encoder


class _Actor:
    """A workshop in a Ray Data actor; rows in and out are JSON, so Ray has no types to guess."""

    def __init__(self, workshop: Workshop) -> None:
        keep_pages()
        self.workshop = workshop
        self.on_rows = Heartbeat(workshop.heartbeats).beat if workshop.heartbeats is not None else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = json.loads(row["task"])
        if self.workshop.heartbeats is None:
            return {"result": json.dumps(self.workshop.do(task, self.on_rows))}
        with Attempt(self.workshop.heartbeats, task["kind"], task["shard"]) as attempt:
            return {"result": json.dumps(self.workshop.do(task, self.on_rows, attempt))}


def _ordered(dataset: Dataset, modalities: Sequence[str]) -> list[str]:
    have = [name for name in ENCODED if name in dataset.modalities]
    for name in modalities:
        if name not in have:
            raise ConfigError(f"modality {name}: {dataset.directory} has no such files to encode; it has {', '.join(have) or 'none'}")
    return [name for name in have if name in modalities]


def _check_columns(dataset: Dataset, text_columns: Sequence[str]) -> None:
    there = dataset.modalities["text"].get("columns")
    if there is None:  # imported vectors
        return
    unknown = [name for name in text_columns if name not in there]
    if len(unknown) == len(text_columns):
        raise ConfigError(f"data.text_columns: the data set's texts have no column {', '.join(unknown)}; they have {', '.join(there)}")
    if unknown:
        log.warning("data.text_columns: the data set's texts have no column %s; they have %s", ", ".join(unknown), ", ".join(there))


# -- running tasks


def _run(tasks: Sequence[Task], workshop: Workshop, use_ray: bool, on_rows: Callable[[int], None] | None) -> Iterator[Result]:
    """Results in the order they are ready; the first error stops the rest."""
    stream: Generator[Result, None, None]
    stream = _run_ray(tasks, workshop) if use_ray and tasks else (workshop.do(task, on_rows) for task in tasks)
    with closing(stream):
        for result in stream:
            if "error" in result:
                raise getattr(errors, result["error"])(result["message"])
            yield result


def open_cluster(encoders: EncodersConfig) -> None:
    """Join or start Ray, and import ray.data while its processes start: neither waits for the other."""
    connect_ray(math.ceil(encoders.actors * encoders.cpus_per_actor), trains=False, meanwhile=lambda: importlib.import_module("ray.data"))


def _run_ray(tasks: Sequence[Task], workshop: Workshop) -> Generator[Result, None, None]:
    encoders, size = workshop.encoders, min(workshop.encoders.actors, len(tasks))
    open_cluster(encoders)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    rows = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
    done = rows.map(
        _Actor,  # type: ignore[arg-type]  # Ray builds one per actor
        fn_constructor_args=(workshop,),
        # two in flight: the next shard's description waits at the actor; more would unbalance the end
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=encoders.cpus_per_actor,
        num_gpus=encoders.gpus_per_actor or None,
    )
    for row in done.iter_rows():
        yield json.loads(row["result"])


def _run_all(
    tasks: Sequence[Task], dataset: Dataset, workshop: Workshop, use_ray: bool
) -> tuple[dict[str, list[Result]], dict[str, float]]:
    """Results per modality, and its share of the wall-clock seconds: actors work on several at once, so it goes by their work."""
    results: dict[str, list[Result]] = {modality: [] for modality in workshop.hashes}
    sizes = {shard: last - first for shard in range(dataset.shards.num_shards) for first, last in [dataset.shards.bounds(shard)]}
    before = time.monotonic()
    if not tasks:
        return results, dict.fromkeys(results, 0.0)
    with (
        Progress("extract", sum(sizes[task["shard"]] for task in tasks)) as progress,
        watch(dataset.directory / "features", progress) as folder,
    ):
        workshop.heartbeats = folder
        finished = 0
        for result in _run(tasks, workshop, use_ray, None if use_ray else progress.add):
            finished += sizes[result["shard"]]
            progress.raise_to(finished)
            results[result["kind"]].append(result)
    work = {modality: sum(result["seconds"] for result in done) for modality, done in results.items()}
    scale = (time.monotonic() - before) / max(sum(work.values()), 1e-9)
    return results, {modality: seconds * scale for modality, seconds in work.items()}


# -- what is done, and what is left


def _numeric_statistics(dataset: Dataset, encoders: EncodersConfig, columns: Sequence[str], use_ray: bool) -> NumericStatistics:
    """Statistics of all numbers, from features/numeric/statistics.json when that is of these shards."""
    name = "features/numeric/statistics.json"
    path = dataset.directory / name
    dataset.bring(name)
    hashes = [entry.sha256 for entry in dataset.entries]
    made_from = {"shards": hashes, "max_attributes": encoders.numeric.max_attributes, "rule": RULE}
    try:
        stored = read_json(path)
        if stored["made_from"] == made_from:
            return NumericStatistics.from_json(stored)
    except (DataError, KeyError, TypeError):
        pass  # absent or torn: made below
    tasks = [{"kind": "statistics", "shard": shard} for shard in range(dataset.shards.num_shards)]
    workshop = Workshop(dataset.place, encoders, tuple(columns), None, {})
    use_ray = use_ray and sum(entry.bytes for entry in dataset.entries) > READ_HERE_BYTES
    bad: list[int] = []

    def in_order() -> Iterator[Any]:
        """Numbers of the shards in their order; what comes early waits, so that little is held of a large data set."""
        waiting: dict[int, Any] = {}
        due = 0
        for result in _run(tasks, workshop, use_ray, None):
            waiting[result["shard"]] = result["numbers"]
            bad.extend([result["shard"]] if "bad_shard" in result else [])
            progress.add(1)
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    with Progress("numeric statistics", len(tasks), "shards") as progress:
        statistics = fit_numbers(in_order(), encoders.numeric.max_attributes)
    # without some shards they are good for this run only
    write_json(path, {"made_from": {**made_from, "without": sorted(bad)} if bad else made_from, **statistics.to_json()})
    dataset.publish(name)
    return statistics


def _pending(dataset: Dataset, modality: str, pinned: str) -> list[int]:
    """Shards whose part is missing or stale. A manifest of another encoder is withdrawn before its parts change."""
    directory = dataset.directory / "features" / modality
    manifest = directory / "manifest.json"
    dataset.bring(f"features/{modality}/*.json")
    if manifest.is_file() and read_json(manifest).get("encoder_hash") != pinned:
        log.info("%s: encoder or settings changed; its parts are made again", modality)
        dataset.withdraw(f"features/{modality}/manifest.json")
    there = dataset.remote_part_sizes(modality)
    return [
        shard
        for shard, entry in enumerate(dataset.entries)
        if not part_is_complete(directory, shard, entry.sha256, pinned, None if there is None else there.get(shard, -1))
    ]
