"""Tar shards of entities: written with webdataset, read strictly.

A shard holds the samples of one id range. A member is KEY.SUFFIX: KEY is the entity's id in 12 digits, SUFFIX one of
a short list. Writing is deterministic byte for byte. Reading trusts nothing: a cut file, a foreign member, a link or
a member above the limit is a `DataError` that names the shard and the byte, and nothing is ever unpacked to disk.
Another modality joins by a line in SUFFIXES; the format stays.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mocme_dist.data.files import atomic_path, sha256_file
from mocme_dist.errors import DataError

BLOCK = 512
# Modalities whose members are one JSON object, and those that are numbered files with the suffixes of their formats.
JSON_MODALITIES = ("text", "numeric")
SUFFIXES = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp"),
    "audio": ("wav", "flac", "ogg", "oga", "opus", "mp3"),
    "video": ("webp", "gif", "png", "apng", "mp4", "m4v", "mov", "webm", "mkv"),
}
_MEMBER = re.compile(
    r"(\d{12})\.("
    + "|".join([rf"{name}\.json" for name in JSON_MODALITIES] + [rf"{name}\.\d+\.(?:{'|'.join(ends)})" for name, ends in SUFFIXES.items()])
    + r")",
    re.ASCII,
)


@dataclass
class Sample:
    """Raw bytes of one entity; `members` maps "text.json", "numeric.json", "image.0.png", "audio.0.ogg" ... to content."""

    id: int
    members: dict[str, bytes] = field(default_factory=dict)

    def files(self, modality: str) -> list[bytes]:
        """Contents of the numbered members of `modality`, in the order of their numbers."""
        return [content for name, content in self.members.items() if name.startswith(modality + ".") and not name.endswith(".json")]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of a shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"entities-{shard:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardEntry:
    """Write samples, in ascending order of id, as one tar file; equal samples give equal bytes.

    Raises:
        DataError: ids do not ascend, or a member's name is not one that `read_shard` accepts.
        StorageError: the file cannot be written.
    """
    import webdataset

    count, last = 0, -1
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            if sample.id <= last:
                raise DataError(f"{path.name}: sample {sample.id} after {last}; expected ascending ids")
            key, count, last = f"{sample.id:012d}", count + 1, sample.id
            for member in sample.members:
                if not _MEMBER.fullmatch(f"{key}.{member}"):
                    raise DataError(f"{path.name}: member '{key}.{member}' is not of a known kind; {_expected()}")
            writer.write({"__key__": key, **sample.members})
    return ShardEntry(path.name, count, path.stat().st_size, sha256_file(path))


def read_shard(path: Path, entry: ShardEntry | None, max_member_bytes: int) -> Iterator[Sample]:
    """The samples of a shard, one in memory at a time, in ascending order of id.

    Args:
        path: a plain file.
        entry: the manifest's record; size and SHA-256 are compared before the first sample, the count after the last.
            None reads what is there, which must be at least one sample.
        max_member_bytes: a larger member is refused unread.

    Raises:
        DataError: the file is missing, cut, not a tar, differs from `entry`, or holds a member that does not belong.
    """
    if not path.is_file():
        raise DataError(f"{path.absolute()}: shard not found")
    if entry is not None:
        verify_shard(path, entry)
    count = 0
    with path.open("rb") as file:
        for sample in _samples(_members(file, path, max_member_bytes), path.name):
            count += 1
            yield sample
    if count != (entry.samples if entry else max(count, 1)):
        raise DataError(f"{path.name}: {count} samples, {f'the manifest says {entry.samples}' if entry else 'expected at least one'}")


def verify_shard(path: Path, entry: ShardEntry) -> None:
    """Compare a shard's size and SHA-256 with the manifest's.

    Raises:
        DataError: they differ.
    """
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(
            f"{path.name}: {size:,} bytes, the manifest says {entry.bytes:,} with {entry.samples} samples; the shard is torn, pack it again"
        )
    found = sha256_file(path)
    if found != entry.sha256:
        raise DataError(
            f"{path.name}: sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}...; the shard was changed, pack it again"
        )


def _samples(members: Iterator[tuple[int, int, str, bytes]], name: str) -> Iterator[Sample]:
    """Group members into samples; a key that comes back, or goes down, is an error."""
    first_seen: dict[int, int] = {}
    sample: Sample | None = None
    for offset, key, suffix, content in members:
        if sample is None or key != sample.id:
            if key in first_seen:
                raise DataError(
                    f"{name}: byte {offset}: key {key:012d} comes back, it began at byte {first_seen[key]}; samples must be contiguous"
                )
            if sample is not None:
                if key < sample.id:
                    raise DataError(f"{name}: byte {offset}: key {key:012d} after {sample.id:012d}; expected ascending keys")
                yield _ordered(sample)
            first_seen[key], sample = offset, Sample(key)
        if suffix in sample.members:
            raise DataError(f"{name}: byte {offset}: '{key:012d}.{suffix}' is there twice; its sample begins at byte {first_seen[key]}")
        sample.members[suffix] = content
    if sample is not None:
        yield _ordered(sample)


def _ordered(sample: Sample) -> Sample:
    """Members by kind and number: a tar sorted by name has image.10 before image.2."""
    sample.members = dict(sorted(sample.members.items(), key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")[:2]]))
    return sample


def _members(file: BinaryIO, path: Path, max_member_bytes: int) -> Iterator[tuple[int, int, str, bytes]]:
    """(byte offset, key, suffix, content) of every member.

    Python's tarfile ends silently at a cut header or a missing end mark, so the blocks are walked here.
    """
    name, size = path.name, path.stat().st_size
    if size == 0:
        raise DataError(f"{name}: the shard is empty (0 bytes)")
    while True:
        offset = file.tell()
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise DataError(
                f"{name}: byte {offset}: ends after {len(header)} of {BLOCK} header bytes without tar's end mark; the shard is cut"
            )
        if not any(header):
            if any(file.read()) or size < offset + 2 * BLOCK:
                raise DataError(
                    f"{name}: byte {offset}: a block of zeros is not followed by zeros up to the end; the shard is cut or damaged"
                )
            return
        key, suffix, length = _checked_header(header, f"{name}: byte {offset}", max_member_bytes)
        padded = -(-length // BLOCK) * BLOCK
        if offset + BLOCK + padded > size:
            raise DataError(f"{name}: byte {offset}: '{key:012d}.{suffix}' has {length:,} bytes, the file ends before; the shard is cut")
        content = file.read(padded)
        yield offset, key, suffix, content[:length]


def _checked_header(header: bytes, where: str, max_member_bytes: int) -> tuple[int, str, int]:
    """Key, suffix and size of a member that may be read."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise DataError(f"{where}: not a tar header ({error}); the shard is damaged") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise DataError(f"{where}: member {info.name!r} is not a plain file (tar type {info.type!r}); shards hold plain files only")
    match = _MEMBER.fullmatch(info.name)
    if match is None:
        raise DataError(f"{where}: member {info.name!r} does not belong in a shard; {_expected()}")
    if not 0 <= info.size <= max_member_bytes:
        raise DataError(
            f"{where}: member {info.name!r} claims {info.size:,} bytes, above the limit of {max_member_bytes:,} (encoders.max_member_mb)"
        )
    return int(match[1]), match[2], info.size


def _expected() -> str:
    numbered = [f"{name}.N.{{{','.join(ends)}}}" for name, ends in SUFFIXES.items()]
    return "expected a 12-digit key and one of " + ", ".join([f"{name}.json" for name in JSON_MODALITIES] + numbered)
