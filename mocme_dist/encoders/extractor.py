"""Work of one process in an extraction: whole shards, or the decoding or the encoding half of them.

`ShardExtractor` takes a shard from its files to its part. In two pools a `ShardDecoder` turns a shard into segments,
which are a few collated chunks each, and a `SegmentEncoder` turns a segment into features; the driver writes the part
(`encoders.pools`). Errors that users can cause come back in the result, so that no actor dies of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import part_files, part_is_complete
from mocme_dist.encoders.build import build_decoder, build_encoder, encoder_settings
from mocme_dist.encoders.crash_guard import CrashGuard
from mocme_dist.encoders.encoder import Decoder, Encoder, encoder_hash
from mocme_dist.encoders.numeric import NumericStatistics, collect_numbers
from mocme_dist.encoders.shard import (
    NOTHING,
    Chunk,
    Encoded,
    Tally,
    decode_shard,
    encode_chunks,
    extract_shard,
    leave_out,
)
from mocme_dist.errors import ConfigError, DataError, MocmeError, ShardError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20  # chunks are passed on together once they have this size
_ENCODERS = 2  # encoders that an encoding actor keeps: at the end of a modality, segments of two alternate
Task = dict[str, Any]  # {"kind": a modality or "statistics", "shard": n}
Result = dict[str, Any]


class JobProcess:
    """The data set, the encoders and their hashes, which every process of an extraction has.

    Attributes:
        heartbeats: folder of the actors' heartbeats and crash guards; None without Ray.
    """

    def __init__(
        self,
        place: str,
        encoders: EncodersConfig,
        text_columns: tuple[str, ...],
        statistics: NumericStatistics | None,
        hashes: dict[str, str],
        heartbeats: Path | None = None,
    ) -> None:
        self.place = place
        self.encoders = encoders
        self.text_columns = text_columns
        self.statistics = statistics
        self.hashes = hashes
        self.heartbeats = heartbeats
        self._dataset: Dataset | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open data set: each process opens it where it runs."""
        return {**vars(self), "_dataset": None}

    @property
    def dataset(self) -> Dataset:
        """The data set, opened at its first use."""
        self._dataset = self._dataset or Dataset.open(self.place, check_shards=False)
        return self._dataset

    def is_complete(self, modality: str, shard: int) -> bool:
        """Return whether the part is there: made by another run, or by this task before its actor died."""
        directory = self.dataset.directory / "features" / modality
        return part_is_complete(directory, shard, self.dataset.entries[shard].sha256, self.hashes[modality])

    def check_hash(self, modality: str, settings: dict[str, Any]) -> None:
        """Raise DataError if this node's files or settings differ from the driver's."""
        found = encoder_hash(modality, settings, self.encoders)
        if found != self.hashes[modality]:
            raise DataError(
                f"encoders.{modality}: this node's weights or settings give hash {found[:12]}, the driver's "
                f"{self.hashes[modality][:12]}; bring the same files to every node"
            )

    def build(self, modality: str) -> Encoder:
        """Return the encoder of a modality, with the driver's hash."""
        vectors = self.dataset.modalities[modality].get("vectors")
        encoder = build_encoder(modality, self.encoders, self.text_columns, self.statistics, vectors=vectors)
        self.check_hash(modality, encoder.settings)
        return encoder

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Compute on `encoders.cpus_per_actor` threads: results of matrix products depend on their number."""
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, int(self.encoders.cpus_per_actor)))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def failed(task: Task, error: MocmeError | torch.OutOfMemoryError) -> Result:
    """Return the result of a task that failed, {"error": kind, "message": text}."""
    if isinstance(error, MocmeError):
        return {**task, "error": type(error).__name__, "message": str(error)}
    message = f"encoders.{task['kind']}: {str(error).splitlines()[0]}; lower encoders.{task['kind']}.batch_size"
    return {**task, "error": ConfigError.__name__, "message": message}


class ShardExtractor(JobProcess):
    """Runs tasks one after another with one encoder at a time, in an actor or in the plain loop."""

    encoder: Encoder | None = None

    def do(self, task: Task, on_rows: Callable[[int], None] | None = None, guard: CrashGuard | None = None) -> Result:
        """Run one task; a `MocmeError` is returned as {"error": kind, "message": text}."""
        try:
            with self.threads():
                if task["kind"] == "statistics":
                    return {**task, **self._statistics(task["shard"])}
                result = self._extract(task["kind"], task["shard"], on_rows, guard)
                self.dataset.publish(*part_files(task["kind"], task["shard"]))
                return {**task, **result}
        except (MocmeError, torch.OutOfMemoryError) as error:
            return failed(task, error)

    def _statistics(self, shard: int) -> Result:
        samples = self.dataset.read_samples(shard, self.encoders.max_member_mb * 2**20, "numeric")
        try:
            return {"numbers": collect_numbers(sample.members for sample in samples)}
        except ShardError as error:
            if self.encoders.on_bad_shard == "error":
                raise
            return {"numbers": {}, "bad_shard": str(error)}

    def _extract(
        self, modality: str, shard: int, on_rows: Callable[[int], None] | None, guard: CrashGuard | None
    ) -> Result:
        if self.is_complete(modality, shard):
            return {**NOTHING, "already": True}
        if guard is not None:
            guard.check()
        encoder = self._encoder_of(modality)
        pinned = self.hashes[modality]
        try:
            return extract_shard(encoder, self.dataset, shard, self.encoders, pinned, on_rows, guard)
        except ShardError as error:
            if self.encoders.on_bad_shard == "error":
                raise
            log.warning("%s: left out: %s", modality, error)
            return leave_out(modality, encoder.width, self.dataset, shard, self.encoders, pinned, str(error))

    def _encoder_of(self, modality: str) -> Encoder:
        if self.encoder is None or self.encoder.modality != modality:
            self.encoder = None  # free the old one first: memory need not hold two
            self.encoder = self.build(modality)
        return self.encoder


# -- the halves


@dataclass
class Segment:
    """A part of a shard on its way through two pools.

    Attributes:
        kind: modality.
        shard: number of the shard.
        index: place within the shard, from 0.
        last: whether it is the shard's last segment.
        tally: counts of decoding, in the last segment.
        already: whether the shard's part is complete; the segment is then empty.
        bad_shard: reason for which the shard is left out; empty if it is not.
        error: kind of the error that ends the job; empty without one.
        message: its text.
        width: F, once encoded.
        seconds: time that its encoding took, and the wait for it.
    """

    kind: str
    shard: int
    index: int = 0
    last: bool = True
    tally: dict[str, Any] | None = None
    already: bool = False
    bad_shard: str = ""
    error: str = ""
    message: str = ""
    width: int = 0
    seconds: float = 0.0


def bytes_of(batch: Any) -> int:
    """Return the size of a collated batch in bytes: of its arrays, and 8 per number outside an array."""
    if isinstance(batch, np.ndarray):
        return batch.nbytes
    if isinstance(batch, (list, tuple)):
        return 8 * len(batch) if batch and isinstance(batch[0], int) else sum(map(bytes_of, batch))
    if isinstance(batch, dict):
        return sum(map(bytes_of, batch.values()))
    return sum(map(bytes_of, vars(batch).values()))


class ShardDecoder(JobProcess):
    """The decoding half: shards to segments. Needs no network and no GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decoders: dict[str, Decoder] = {}

    def segments(self, task: Task, guard: CrashGuard | None = None) -> Iterator[tuple[Segment, list[Chunk]]]:
        """Yield the segments of a shard with their chunks; the last one has the counts.

        A `MocmeError` ends them with a segment that has its kind and text.
        """
        count = 0
        ended = Segment(task["kind"], task["shard"])
        try:
            for segment, chunks in self._segments(task["kind"], task["shard"], guard):
                segment.index = count
                yield segment, chunks
                count += 1
            return
        except MocmeError as error:
            ended.index = count
            if isinstance(error, ShardError) and self.encoders.on_bad_shard != "error":
                log.warning("%s: left out: %s", task["kind"], error)
                ended.bad_shard = str(error)
            else:
                ended.error = type(error).__name__
                ended.message = str(error)
        yield ended, []

    def _segments(self, modality: str, shard: int, guard: CrashGuard | None) -> Iterator[tuple[Segment, list[Chunk]]]:
        if self.is_complete(modality, shard):
            yield Segment(modality, shard, already=True), []
            return
        if guard is not None:
            guard.check()
        tally = Tally()
        chunks: list[Chunk] = []
        size = 0
        for chunk in decode_shard(self._decoder_of(modality), self.dataset, shard, self.encoders, tally, 1, guard):
            chunks.append(chunk)
            size += bytes_of(chunk.batch)
            if size >= SEGMENT_BYTES:
                yield Segment(modality, shard, last=False), chunks
                chunks = []
                size = 0
        yield Segment(modality, shard, tally=tally.to_json()), chunks

    def _decoder_of(self, modality: str) -> Decoder:
        if modality not in self._decoders:
            # hashes the weights as well: a tokenizer of other files would give other tokens without an error
            self.check_hash(modality, encoder_settings(modality, self.encoders, self.text_columns, self.statistics))
            self._decoders[modality] = build_decoder(modality, self.encoders, self.text_columns)
        return self._decoders[modality]


class SegmentEncoder(JobProcess):
    """The encoding half: segments to features. On a GPU if `encoders.gpus_per_actor` gives it one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoders: dict[str, Encoder] = {}
        self._ended: float | None = None

    def encode(self, segment: Segment, chunks: list[Chunk], guard: CrashGuard | None = None) -> list[Encoded]:
        """Return the features of a segment's chunks, and record width, times and errors in the segment."""
        if segment.already or segment.error:
            return []
        try:
            if guard is not None:
                guard.check()
            encoder = self._encoder_of(segment.kind)
            segment.width = encoder.width
            started = time.monotonic() if self._ended is None else self._ended
            with self.threads():
                encoded = list(encode_chunks(encoder, chunks))
            self._ended = time.monotonic()
            segment.seconds = self._ended - started
            return encoded
        except (MocmeError, torch.OutOfMemoryError) as error:
            result = failed({"kind": segment.kind}, error)
            segment.error = result["error"]
            segment.message = result["message"]
            return []

    def _encoder_of(self, modality: str) -> Encoder:
        if modality in self._encoders:
            return self._encoders[modality]
        while len(self._encoders) >= _ENCODERS:  # the oldest modality has ended
            del self._encoders[next(iter(self._encoders))]
        self._encoders[modality] = self.build(modality)
        self._ended = None  # loading weights is not a wait for segments
        return self._encoders[modality]
