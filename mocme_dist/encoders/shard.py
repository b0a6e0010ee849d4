"""One shard through one encoder to one feature part: read, decode, collate in a thread; encode and write here.

The pieces of a shard form batches in id order and nothing else decides them, so a part has the same bytes whoever
makes it and however often. Timings and rates go to the result, never to the part's files.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import part_path, write_part
from mocme_dist.data.shards import Member
from mocme_dist.encoders.attempts import Attempt
from mocme_dist.encoders.encoder import Decoded, Encoder, Failure, decode_safely, printable
from mocme_dist.errors import DataError

EXAMPLES = 20  # failures listed by name; all are counted
NOTHING = {"samples": 0, "read_s": 0.0, "decode_s": 0.0, "encode_s": 0.0, "write_s": 0.0, "seconds": 0.0}  # a shard not encoded
T = TypeVar("T")
U = TypeVar("U")


def strict_error(entity: int, modality: str, cause: str, message: str) -> DataError:
    """What stops the job for one bad file when `encoders.strict` asks for it."""
    return DataError(f"entity {entity}: {modality}: {cause}: {message}; encoders.strict=false counts it as absent instead")


@dataclass
class _Chunk:
    """Pieces that are encoded together, of the entities in `rows` (local, ascending, repeated for several pieces)."""

    rows: list[int]
    batch: Any


@dataclass
class _Tally:
    """What one thread counts: the decoding one has its own, read after the last chunk, so no order depends on timing."""

    samples: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, entity: int, cause: str, message: str, modality: str, strict: bool) -> None:
        message = printable(message)
        if strict:
            raise strict_error(entity, modality, cause, message)
        self.failed[cause] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"id": entity, "cause": cause, "message": message[:200]})


def extract_shard(
    encoder: Encoder,
    dataset: Dataset,
    shard: int,
    config: EncodersConfig,
    pinned: str,
    on_rows: Callable[[int], None] | None = None,
    attempt: Attempt | None = None,
) -> dict[str, Any]:
    """Encode a shard and write its part.

    Args:
        encoder: of the modality to extract.
        dataset: packed data set; the part goes to DIRECTORY/features/MODALITY.
        shard: number of the shard.
        config: type on disk, limits, strictness.
        pinned: the encoder hash that the part carries.
        on_rows: called with the number of rows done since its last call.
        attempt: what earlier tries died of; decides how files are decoded and which ones are not.

    Returns:
        samples (entities with files of the modality) and seconds of each phase, for the report.

    Raises:
        ShardError: the shard is not what the manifest says.
        DataError: `config.strict` and a file cannot be decoded.
        StorageError: the part cannot be written.
    """
    started = time.monotonic()
    first, last = dataset.shards.bounds(shard)
    tally, overflown = _Tally(), _Tally()
    members = dataset.read_members(shard, config.max_member_mb * 2**20, encoder.modality)
    chunks = _chunks(members, encoder, first, tally, config, attempt)
    if attempt is None or not attempt.careful:
        chunks = run_ahead(chunks)
    present = np.zeros(last - first, dtype=np.uint8)
    # pages that are never written are never there
    values, count = np.empty((last - first, encoder.width), dtype=config.dtype), 0
    encode_s, done = 0.0, 0
    for row, vector, seconds in _entity_means(chunks, encoder):
        encode_s += seconds
        with np.errstate(over="ignore"):
            values[count] = vector
        if np.isfinite(values[count]).all():
            present[row] = 1
            count += 1
        else:
            overflown.add(first + row, "not finite", f"features leave the range of {config.dtype}", encoder.modality, config.strict)
        if on_rows is not None and row + 1 - done >= encoder.chunk:
            on_rows(row + 1 - done)
            done = row + 1
    stats = {
        "failed": dict(sorted((tally.failed + overflown.failed).items())),
        "examples": sorted(tally.examples + overflown.examples, key=lambda example: example["id"])[:EXAMPLES],
        "input_sha256": dataset.entries[shard].sha256,
        "encoder_hash": pinned,
    }
    writing = time.monotonic()
    write_part(dataset.directory / "features" / encoder.modality, shard, values[:count], present, stats)
    if on_rows is not None:
        on_rows(last - first - done)
    ended = time.monotonic()
    return {
        "samples": tally.samples,
        "read_s": tally.read_s,
        "decode_s": tally.decode_s,
        "encode_s": encode_s,
        "write_s": ended - writing,
        "seconds": ended - started,
    }


def leave_out(encoder: Encoder, dataset: Dataset, shard: int, config: EncodersConfig, pinned: str, why: str) -> dict[str, Any]:
    """Write the part of a shard that cannot be read: every entity absent, and the reason. The next run tries it again."""
    first, last = dataset.shards.bounds(shard)
    stats = {"failed": {}, "examples": [], "input_sha256": dataset.entries[shard].sha256, "encoder_hash": pinned, "bad_shard": why}
    values, present = np.empty((0, encoder.width), dtype=config.dtype), np.zeros(last - first, dtype=np.uint8)
    write_part(dataset.directory / "features" / encoder.modality, shard, values, present, stats)
    return dict(NOTHING)


def _chunks(
    members: Iterator[Member], encoder: Encoder, first: int, tally: _Tally, config: EncodersConfig, attempt: Attempt | None
) -> Iterator[_Chunk]:
    """Decode members into chunks of exactly `encoder.chunk` pieces; the last one may be shorter."""
    rows: list[int] = []
    pieces: list[Any] = []
    last = -1
    for member, decoded in _decode(members, encoder, tally, max(1, int(config.cpus_per_actor)), attempt):
        tally.samples += member.id != last
        last = member.id
        for failure in decoded.failures:
            tally.add(member.id, failure.cause, failure.message, encoder.modality, config.strict)
        rows.extend([member.id - first] * len(decoded.pieces))
        pieces.extend(decoded.pieces)
        while len(pieces) >= encoder.chunk:
            before = time.monotonic()
            chunk = _Chunk(rows[: encoder.chunk], encoder.collate(pieces[: encoder.chunk]))
            tally.decode_s += time.monotonic() - before
            del rows[: encoder.chunk], pieces[: encoder.chunk]
            yield chunk
    if pieces:
        yield _Chunk(rows, encoder.collate(pieces))


def _decode(
    members: Iterator[Member], encoder: Encoder, tally: _Tally, threads: int, attempt: Attempt | None
) -> Iterator[tuple[Member, Decoded]]:
    """Members with their pieces, in order; decoded by several threads where there are, a few members ahead."""
    careful = attempt if attempt is not None and attempt.careful else None

    def decode(member: Member) -> tuple[Member, Decoded, float]:
        before = time.monotonic()
        name = f"{member.id}/{member.name}"
        if member.content is None:
            message = f"{member.name}: {member.size:,} bytes, the limit is encoders.max_member_mb"
            decoded = Decoded(failures=[Failure("too large", message)])
        elif careful is not None and name in careful.deadly:
            decoded = Decoded(failures=[Failure("kills its worker", f"{member.name}: two workers died while they decoded it")])
        else:
            if careful is not None:
                careful.at(name)
            decoded = decode_safely(encoder, {member.name: member.content})
            if careful is not None:
                careful.at("")
        return dataclasses.replace(member, content=None), decoded, time.monotonic() - before

    def read() -> Iterator[Member]:
        while True:
            before = time.monotonic()
            member = next(members, None)
            tally.read_s += time.monotonic() - before
            if member is None:
                return
            yield member

    for member, decoded, seconds in _ahead(decode, read(), threads if careful is None else 1):
        tally.decode_s += seconds
        yield member, decoded


def _ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """`map`, on `threads` threads, at most two items ahead for each; one thread is a plain loop."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _entity_means(chunks: Iterable[_Chunk], encoder: Encoder) -> Iterator[tuple[int, np.ndarray, float]]:
    """(local row, mean over the entity's pieces (F,) float32, seconds spent in the encoder since the last yield)."""
    current, count, seconds = -1, 0, 0.0
    total = np.zeros(encoder.width, dtype=np.float32)
    for chunk in chunks:
        before = time.monotonic()
        features = encoder.encode(chunk.batch)
        seconds += time.monotonic() - before
        for row, vector in zip(chunk.rows, features, strict=True):
            if row != current and count:
                yield current, total / np.float32(count), seconds
                total, count, seconds = np.zeros_like(total), 0, 0.0
            current, count = row, count + 1
            total += vector
    if count:
        yield current, total / np.float32(count), seconds


def run_ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, produced by a thread that stays up to `depth` items ahead; its exception is raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(message: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                waiting.put(message, timeout=0.2)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=produce, name="decode-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, value = waiting.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()


def part_presence(directory: Path, shard: int) -> np.ndarray:
    """(rows,) bool of a feature part on disk: who is present."""
    from safetensors import safe_open

    with safe_open(part_path(directory, shard), framework="np") as part:
        return np.asarray(part.get_tensor("present"), dtype=bool)


def part_width(directory: Path, shard: int) -> int:
    """F of a feature part on disk, from its header."""
    from safetensors import safe_open

    with safe_open(part_path(directory, shard), framework="np") as part:
        return int(part.get_slice("values").get_shape()[1])
