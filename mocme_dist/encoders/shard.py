"""Extracts one shard with one encoder to one feature part, in three steps that may run in different processes.

`decode_shard` reads, decodes and collates (in a thread of `extract_shard`); `encode_chunks` encodes; `PartBuilder`
averages the pieces of entities and writes the part.

The pieces of a shard form batches in id order, so a part is byte-identical whichever process computes it. Timings and
rates are returned and never stored in the part's files.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import part_path, write_part
from mocme_dist.data.shards import Member
from mocme_dist.encoders.crash_guard import CrashGuard
from mocme_dist.encoders.device import Fetch, Overlapped
from mocme_dist.encoders.encoder import Decoded, Decoder, Encoder, Failure, decode_safely, printable
from mocme_dist.errors import DataError
from mocme_dist.prefetch import Prefetcher

EXAMPLES = 20  # number of failures that are listed; all are counted
NOTHING = {
    "samples": 0,
    "read_s": 0.0,
    "decode_s": 0.0,
    "encode_s": 0.0,
    "write_s": 0.0,
    "seconds": 0.0,
}  # of a shard that was not encoded
T = TypeVar("T")
U = TypeVar("U")


def strict_error(entity: int, modality: str, cause: str, message: str) -> DataError:
    """Return the error that stops the job at a bad file if `encoders.strict` is set."""
    return DataError(
        f"entity {entity}: {modality}: {cause}: {message}; encoders.strict=false counts it as absent instead"
    )


@dataclass
class Chunk:
    """Pieces encoded together, of the entities in `rows` (local, ascending, repeated for several pieces)."""

    rows: list[int]
    batch: Any


@dataclass
class Encoded:
    """Features (n, F) float32 of a chunk's pieces, and the seconds that the encoder worked since the last chunk."""

    rows: list[int]
    features: np.ndarray
    seconds: float


@dataclass
class Tally:
    """Counts of one shard.

    Those of the decoding thread are read after the last chunk, so no order depends on timing.
    """

    samples: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Tally:
        """Return the tally of `to_json`."""
        return Tally(**{**values, "failed": Counter(values["failed"])})

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a dictionary of plain values."""
        return {**vars(self), "failed": dict(self.failed)}

    def add(self, entity: int, cause: str, message: str, modality: str, strict: bool) -> None:
        """Count a failure; raise DataError if `strict`."""
        message = printable(message)
        if strict:
            raise strict_error(entity, modality, cause, message)
        self.failed[cause] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"id": entity, "cause": cause, "message": message[:200]})


class PartBuilder:
    """Builds the part of a shard from the features of its chunks, given in their order.

    Args:
        dataset: packed data set; the part goes to DIRECTORY/features/MODALITY.
        shard: number of the shard.
        modality: modality of the part.
        width: F of its features.
        config: type on disk, strictness.
        on_rows: called with the number of rows done since its last call.
    """

    def __init__(
        self,
        dataset: Dataset,
        shard: int,
        modality: str,
        width: int,
        config: EncodersConfig,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self.dataset = dataset
        self.shard = shard
        self.modality = modality
        self.config = config
        self.on_rows = on_rows
        self.first, last = dataset.shards.bounds(shard)
        self.present = np.zeros(last - self.first, dtype=np.uint8)
        # pages that are never written take no memory
        self.values = np.empty((last - self.first, width), dtype=config.dtype)
        self.count = 0
        self.overflown = Tally()
        self.encode_s = 0.0
        self._done = 0
        self._row = -1
        self._pieces = 0
        self._sum = np.zeros(width, dtype=np.float32)

    def add(self, encoded: Encoded) -> None:
        """Add a chunk; an entity's features are the mean of its pieces, which may lie in several chunks."""
        self.encode_s += encoded.seconds
        for row, vector in zip(encoded.rows, encoded.features, strict=True):
            if row != self._row:
                self._finish_row()
            self._row = row
            self._pieces += 1
            self._sum += vector
        if self.on_rows is not None and encoded.rows:
            self.on_rows(self._row - self._done)
            self._done = self._row

    def _finish_row(self) -> None:
        if not self._pieces:
            return
        with np.errstate(over="ignore"):
            self.values[self.count] = self._sum / np.float32(self._pieces)
        if np.isfinite(self.values[self.count]).all():
            self.present[self._row] = 1
            self.count += 1
        else:
            message = f"features leave the range of {self.config.dtype}"
            self.overflown.add(self.first + self._row, "not finite", message, self.modality, self.config.strict)
        self._pieces = 0
        self._sum = np.zeros_like(self._sum)

    def write(self, tally: Tally, pinned: str) -> float:
        """Write the part after its last chunk, and return the seconds that this took.

        Args:
            tally: counts of decoding.
            pinned: encoder hash stored in the part.

        Raises:
            StorageError: the part cannot be written.
        """
        started = time.monotonic()
        self._finish_row()
        examples = sorted(tally.examples + self.overflown.examples, key=lambda example: example["id"])
        stats = {
            "failed": dict(sorted((tally.failed + self.overflown.failed).items())),
            "examples": examples[:EXAMPLES],
            "input_sha256": self.dataset.entries[self.shard].sha256,
            "encoder_hash": pinned,
        }
        directory = self.dataset.directory / "features" / self.modality
        write_part(directory, self.shard, self.values[: self.count], self.present, stats)
        if self.on_rows is not None:
            self.on_rows(len(self.present) - self._done)
        return time.monotonic() - started


def extract_shard(
    encoder: Encoder,
    dataset: Dataset,
    shard: int,
    config: EncodersConfig,
    pinned: str,
    on_rows: Callable[[int], None] | None = None,
    guard: CrashGuard | None = None,
) -> dict[str, Any]:
    """Encode a shard and write its part.

    Args:
        encoder: of the modality to extract.
        dataset: packed data set; the part goes to DIRECTORY/features/MODALITY.
        shard: number of the shard.
        config: type on disk, limits, strictness.
        pinned: encoder hash stored in the part.
        on_rows: called with the number of rows done since its last call.
        guard: decides how files are decoded, and which are not, after actors have died over this shard.

    Returns:
        samples (entities with files of the modality) and seconds per phase, for the report.

    Raises:
        ShardError: the shard differs from the manifest.
        DataError: `config.strict` and a file cannot be decoded.
        StorageError: the part cannot be written.
    """
    started = time.monotonic()
    tally = Tally()
    chunks = decode_shard(encoder, dataset, shard, config, tally, max(1, int(config.cpus_per_actor)), guard)
    if guard is None or not guard.isolate:
        chunks = _decoded_ahead(chunks)
    part = PartBuilder(dataset, shard, encoder.modality, encoder.width, config, on_rows)
    for encoded in encode_chunks(encoder, chunks):
        part.add(encoded)
    write_s = part.write(tally, pinned)
    return {
        "samples": tally.samples,
        "read_s": tally.read_s,
        "decode_s": tally.decode_s,
        "encode_s": part.encode_s,
        "write_s": write_s,
        "seconds": time.monotonic() - started,
    }


def leave_out(
    modality: str, width: int, dataset: Dataset, shard: int, config: EncodersConfig, pinned: str, why: str
) -> dict[str, Any]:
    """Write the part of an unreadable shard: all entities absent, and the reason. The next run tries it again."""
    first, last = dataset.shards.bounds(shard)
    stats = {
        "failed": {},
        "examples": [],
        "input_sha256": dataset.entries[shard].sha256,
        "encoder_hash": pinned,
        "bad_shard": why,
    }
    values = np.empty((0, width), dtype=config.dtype)
    present = np.zeros(last - first, dtype=np.uint8)
    write_part(dataset.directory / "features" / modality, shard, values, present, stats)
    return dict(NOTHING)


def decode_shard(
    decoder: Decoder,
    dataset: Dataset,
    shard: int,
    config: EncodersConfig,
    tally: Tally,
    threads: int,
    guard: CrashGuard | None,
) -> Iterator[Chunk]:
    """Yield chunks of exactly `decoder.chunk` decoded pieces; the last one may be shorter.

    Args:
        decoder: of the modality.
        dataset: packed data set.
        shard: number of the shard.
        config: limits, strictness.
        tally: counts and times, complete after the last chunk.
        threads: number of threads that decode.
        guard: decides how files are decoded, and which are not, after actors have died over this shard.

    Raises:
        ShardError: the shard differs from the manifest.
        DataError: `config.strict` and a file cannot be decoded.
    """
    first, _ = dataset.shards.bounds(shard)
    members = dataset.read_members(shard, config.max_member_mb * 2**20, decoder.modality)
    rows: list[int] = []
    pieces: list[Any] = []
    last = -1
    for member, decoded in _decode(members, decoder, tally, threads, guard):
        tally.samples += member.id != last
        last = member.id
        for failure in decoded.failures:
            tally.add(member.id, failure.cause, failure.message, decoder.modality, config.strict)
        rows.extend([member.id - first] * len(decoded.pieces))
        pieces.extend(decoded.pieces)
        while len(pieces) >= decoder.chunk:
            before = time.monotonic()
            chunk = Chunk(rows[: decoder.chunk], decoder.collate(pieces[: decoder.chunk]))
            tally.decode_s += time.monotonic() - before
            del rows[: decoder.chunk], pieces[: decoder.chunk]
            yield chunk
    if pieces:
        yield Chunk(rows, decoder.collate(pieces))


def _decode(
    members: Iterator[Member], decoder: Decoder, tally: Tally, threads: int, guard: CrashGuard | None
) -> Iterator[tuple[Member, Decoded]]:
    """Yield members with their pieces, in order; several threads decode a few members ahead."""
    isolate = guard if guard is not None and guard.isolate else None

    def decode(member: Member) -> tuple[Member, Decoded, float]:
        before = time.monotonic()
        name = f"{member.id}/{member.name}"
        if member.content is None:
            message = f"{member.name}: {member.size:,} bytes, the limit is encoders.max_member_mb"
            decoded = Decoded(failures=[Failure("too large", message)])
        elif isolate is not None and name in isolate.poisoned:
            decoded = Decoded(
                failures=[Failure("crashes its worker", f"{member.name}: two workers died while they decoded it")]
            )
        else:
            if isolate is not None:
                isolate.at(name)
            decoded = decode_safely(decoder, {member.name: member.content})
            if isolate is not None:
                isolate.at("")
        return dataclasses.replace(member, content=None), decoded, time.monotonic() - before

    def read() -> Iterator[Member]:
        while True:
            before = time.monotonic()
            member = next(members, None)
            tally.read_s += time.monotonic() - before
            if member is None:
                return
            yield member

    for member, decoded, seconds in _ahead(decode, read(), threads if isolate is None else 1):
        tally.decode_s += seconds
        yield member, decoded


def _ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """Map `function` over `items` in order, on `threads` threads, at most two items ahead per thread."""
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


def encode_chunks(encoder: Encoder, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
    """Yield the features of the chunks in their order.

    An `Overlapped` encoder gets the next chunk before the features of the last one are waited for.
    """
    if not isinstance(encoder, Overlapped):
        for chunk in chunks:
            before = time.monotonic()
            features = encoder.encode(chunk.batch)
            yield Encoded(chunk.rows, features, time.monotonic() - before)
        return
    waiting: tuple[list[int], Fetch] | None = None
    seconds = 0.0
    for chunk in chunks:
        before = time.monotonic()
        launched = (chunk.rows, encoder.launch(chunk.batch))
        if waiting is not None:
            rows, fetch = waiting
            features = fetch()
            yield Encoded(rows, features, seconds + time.monotonic() - before)
            seconds = 0.0
        else:
            seconds = time.monotonic() - before
        waiting = launched
    if waiting is not None:
        before = time.monotonic()
        rows, fetch = waiting
        features = fetch()
        yield Encoded(rows, features, seconds + time.monotonic() - before)


def _decoded_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items from a thread that decodes while the caller encodes; closing the iterator ends the thread."""
    with Prefetcher(items, what="files of a shard to be read and decoded") as ahead:
        yield from ahead


def part_presence(directory: Path, shard: int) -> np.ndarray:
    """Return the presence mask (rows,) of a feature part on disk."""
    from safetensors import safe_open

    with safe_open(part_path(directory, shard), framework="np") as part:
        return np.asarray(part.get_tensor("present"), dtype=bool)


def part_width(directory: Path, shard: int) -> int:
    """Return F of a feature part on disk, from its header."""
    from safetensors import safe_open

    with safe_open(part_path(directory, shard), framework="np") as part:
        return int(part.get_slice("values").get_shape()[1])
