"""Runs the tasks of an extraction on Ray Data actors, in one pool or in two. The only module that imports ray.data.

One pool: an actor takes a shard from its files to its part and returns only counts and timings.
Two pools: actors with a CPU decode shards to segments, and actors with a GPU (or CPUs) encode segments. Segments wait
in Ray's object store; Ray Data stops the decoding actors once they fill its share of it, and the encoding ones get the
next segment before they end the last. Features come to the driver, 4 F bytes per entity, which writes the parts in
threads; so an actor that dies costs one segment or one shard's decoding, and a driver that dies the shards in progress.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from mocme_dist import errors
from mocme_dist.cluster import connect_ray
from mocme_dist.config.schema import EncodersConfig
from mocme_dist.console import speak_to_driver
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import part_files
from mocme_dist.encoders.build import NETWORKS
from mocme_dist.encoders.crash_guard import CrashGuard
from mocme_dist.encoders.extractor import Result, Segment, SegmentEncoder, ShardDecoder, ShardExtractor, Task
from mocme_dist.encoders.heartbeat import Heartbeat, rows_done
from mocme_dist.encoders.shard import NOTHING, Encoded, PartBuilder, Tally, leave_out
from mocme_dist.memory import keep_pages
from mocme_dist.prefetch import Prefetcher

_WRITERS = 4  # threads of the driver that write and upload parts
Row = dict[str, Any]


def run_tasks(
    tasks: Sequence[Task], extractor: ShardExtractor, use_ray: bool, on_rows: Callable[[int], None] | None
) -> Iterator[Result]:
    """Yield results as they are ready; the first error stops the rest.

    Args:
        tasks: shards of modalities, or of the statistics.
        extractor: the job, which is also that of a loop in this process.
        use_ray: run on Ray actors.
        on_rows: called with the number of rows done since its last call, where this process sees them.

    Raises:
        MocmeError: a task failed.
    """
    stream: Generator[Result, None, None]
    if use_ray and tasks:
        stream = run_on_ray(tasks, extractor, on_rows)
    else:
        stream = (extractor.do(task, on_rows) for task in tasks)
    with closing(stream):
        for result in stream:
            if "error" in result:
                raise getattr(errors, result["error"])(result["message"])
            yield result


def open_cluster(encoders: EncodersConfig) -> None:
    """Join or start Ray, and import ray.data while its processes start."""
    connect_ray(
        math.ceil(encoders.actors * encoders.cpus_per_actor) + encoders.num_decode_actors(),
        trains=False,
        meanwhile=lambda: importlib.import_module("ray.data"),
    )


def run_on_ray(
    tasks: Sequence[Task], extractor: ShardExtractor, on_rows: Callable[[int], None] | None = None
) -> Generator[Result, None, None]:
    """Yield the results of tasks on Ray: those with a network in two pools if the configuration has two."""
    open_cluster(extractor.encoders)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # it warns that its progress bars are disabled
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    two = extractor.encoders.num_decode_actors() > 0
    halved = [task for task in tasks if two and _has_network(task, extractor)]
    whole = [task for task in tasks if not (two and _has_network(task, extractor))]
    if whole:
        yield from _in_one_pool(whole, extractor)
    if halved:
        yield from _in_two_pools(halved, extractor, on_rows)


def _has_network(task: Task, extractor: ShardExtractor) -> bool:
    kind = task["kind"]
    return kind in NETWORKS and extractor.dataset.modalities[kind].get("vectors") is None


def _items(tasks: Sequence[Task]) -> Any:
    """Return the tasks as a Ray Data set of one block per task; rows are JSON, so that Ray need not infer types."""
    import ray.data

    return ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))


def _pool(size: int, grows: bool = False) -> Any:
    from ray.data import ActorPoolStrategy

    # two in flight: the next task waits at the actor; more would unbalance the end
    return ActorPoolStrategy(min_size=1 if grows else size, max_size=size, max_tasks_in_flight_per_actor=2)


def _rows(done: Any, extractor: ShardExtractor) -> Iterator[Row]:
    """Yield the rows of a Ray Data set as they come.

    Raises:
        StorageError: none came, and no actor finished a row, for too long: Ray itself would wait for ever for actors
            that the cluster has no room for.
    """
    folder = extractor.heartbeats

    def alive() -> int:
        with suppress(OSError):
            return rows_done(folder) if folder is not None else 0
        return -1

    what = f"a shard from the actors, of which each needs {extractor.encoders.cpus_per_actor} CPUs (see `ray status`)"
    with Prefetcher(done.iter_rows(), what=what, alive=alive, close_s=0) as rows:
        yield from rows


# -- one pool


class _Actor:
    """A `ShardExtractor` in a Ray Data actor."""

    def __init__(self, extractor: ShardExtractor) -> None:
        speak_to_driver()
        keep_pages()
        self.extractor = extractor
        self.on_rows = Heartbeat(extractor.heartbeats).beat if extractor.heartbeats is not None else None

    def __call__(self, row: Row) -> Row:
        task = json.loads(row["task"])
        if self.extractor.heartbeats is None:
            return {"result": json.dumps(self.extractor.do(task, self.on_rows))}
        with CrashGuard(self.extractor.heartbeats, task["kind"], task["shard"]) as guard:
            return {"result": json.dumps(self.extractor.do(task, self.on_rows, guard))}


def _in_one_pool(tasks: Sequence[Task], extractor: ShardExtractor) -> Iterator[Result]:
    encoders = extractor.encoders
    gpus = encoders.gpus_per_actor if any(_has_network(task, extractor) for task in tasks) else 0
    done = _items(tasks).map(
        _Actor,
        fn_constructor_args=(extractor,),
        compute=_pool(min(encoders.actors, len(tasks))),
        num_cpus=encoders.cpus_per_actor,
        num_gpus=gpus or None,
    )
    for row in _rows(done, extractor):
        yield json.loads(row["result"])


# -- two pools


class Content:
    """Chunks or features of a segment; an object that Ray Data does not take for a list or a tensor of a column."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class _DecodingActor:
    """A `ShardDecoder` in a Ray Data actor."""

    def __init__(self, decoder: ShardDecoder) -> None:
        speak_to_driver()
        keep_pages()
        self.decoder = decoder

    def __call__(self, row: Row) -> Iterator[Row]:
        task = json.loads(row["task"])
        with _guard(self.decoder, task["kind"], task["shard"]) as guard:
            for segment, chunks in self.decoder.segments(task, guard):
                yield {"segment": json.dumps(asdict(segment)), "content": Content(chunks)}


class _EncodingActor:
    """A `SegmentEncoder` in a Ray Data actor."""

    def __init__(self, encoder: SegmentEncoder) -> None:
        speak_to_driver()
        keep_pages()
        self.encoder = encoder

    def __call__(self, row: Row) -> Row:
        segment = Segment(**json.loads(row["segment"]))
        with _guard(self.encoder, segment.kind, segment.shard, f"encode-{segment.index}-") as guard:
            encoded = self.encoder.encode(segment, row["content"].items, guard)
        return {"segment": json.dumps(asdict(segment)), "content": Content(encoded)}


def _guard(half: ShardDecoder | SegmentEncoder, kind: str, shard: int, part: str = "") -> Any:
    return nullcontext() if half.heartbeats is None else CrashGuard(half.heartbeats, kind, shard, part)


def _in_two_pools(
    tasks: Sequence[Task], extractor: ShardExtractor, on_rows: Callable[[int], None] | None
) -> Iterator[Result]:
    from ray.data import DataContext

    encoders = extractor.encoders
    # each segment is a block of its own, which is passed on at once
    DataContext.get_current().target_max_block_size = 1
    job = (extractor.place, encoders, extractor.text_columns, None, extractor.hashes, extractor.heartbeats)
    done = (
        _items(tasks)
        .flat_map(
            _DecodingActor,
            fn_constructor_args=(ShardDecoder(*job),),
            compute=_pool(min(encoders.num_decode_actors(), len(tasks)), grows=True),
            num_cpus=1,
        )
        .map(
            _EncodingActor,
            fn_constructor_args=(SegmentEncoder(*job),),
            compute=_pool(encoders.actors),
            num_cpus=encoders.cpus_per_actor,
            num_gpus=encoders.gpus_per_actor or None,
        )
    )
    rows = ((Segment(**json.loads(row["segment"])), row["content"].items) for row in _rows(done, extractor))
    yield from write_parts(rows, extractor, on_rows)


@dataclass
class _Shard:
    """A shard whose segments arrive at the driver, in any order."""

    builder: PartBuilder | None = None
    due: int = 0  # index of the next segment
    waiting: dict[int, tuple[Segment, list[Encoded]]] = field(default_factory=dict)
    seconds: float = 0.0


def write_parts(
    segments: Iterable[tuple[Segment, list[Encoded]]],
    extractor: ShardExtractor,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Write the parts of encoded segments, and yield a result per shard, or the first error.

    Args:
        segments: with the features of their chunks; those of a shard in any order, and each shard's to its last.
        extractor: the job.
        on_rows: called with the number of rows done since its last call.

    Raises:
        StorageError: a part cannot be written.
    """
    shards: dict[tuple[str, int], _Shard] = {}
    writing: set[Future[Result]] = set()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        for segment, encoded in segments:
            if segment.error:
                yield {**_task(segment), "error": segment.error, "message": segment.message}
                return
            shard = shards.setdefault((segment.kind, segment.shard), _Shard())
            shard.waiting[segment.index] = (segment, encoded)
            while (found := shard.waiting.pop(shard.due, None)) is not None:
                shard.due += 1
                _add(shard, *found, extractor, on_rows)
                if found[0].last:
                    del shards[segment.kind, segment.shard]
                    writing.add(pool.submit(_finish, shard, found[0], extractor))
            # a full pool waits for one of its threads, and with it the actors
            finished, writing = wait(writing, None if len(writing) > _WRITERS else 0, FIRST_COMPLETED)
            for future in finished:
                yield future.result()
        for future in writing:
            yield future.result()


def _task(segment: Segment) -> Task:
    return {"kind": segment.kind, "shard": segment.shard}


def _add(
    shard: _Shard,
    segment: Segment,
    encoded: list[Encoded],
    extractor: ShardExtractor,
    on_rows: Callable[[int], None] | None,
) -> None:
    shard.seconds += segment.seconds
    if segment.already or segment.bad_shard:
        return
    if shard.builder is None:
        shard.builder = PartBuilder(
            extractor.dataset, segment.shard, segment.kind, segment.width, extractor.encoders, on_rows
        )
    for chunk in encoded:
        shard.builder.add(chunk)


def _finish(shard: _Shard, last: Segment, extractor: ShardExtractor) -> Result:
    """Write and publish the part of a shard, and return its result."""
    dataset: Dataset = extractor.dataset
    pinned = extractor.hashes[last.kind]
    if last.already:
        return {**_task(last), **NOTHING, "already": True}
    if last.bad_shard:
        result = leave_out(last.kind, last.width, dataset, last.shard, extractor.encoders, pinned, last.bad_shard)
    else:
        assert shard.builder is not None
        assert last.tally is not None
        tally = Tally.of(last.tally)
        write_s = shard.builder.write(tally, pinned)
        result = {
            "samples": tally.samples,
            "read_s": tally.read_s,
            "decode_s": tally.decode_s,
            "encode_s": shard.builder.encode_s,
            "write_s": write_s,
            "seconds": shard.seconds,
        }
    dataset.publish(*part_files(last.kind, last.shard))
    return {**_task(last), **result}
