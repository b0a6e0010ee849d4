"""Tar shards of entities: written with webdataset, read strictly.

A shard holds the samples of one id range. A member is KEY.SUFFIX: KEY is the entity's id in 12 digits, SUFFIX one of a
short list. Writing is deterministic byte for byte. Reading trusts nothing: a truncated file, a foreign member or a link
is a `ShardError` that names the shard and the byte, a member above the limit is not read, and nothing is unpacked to
disk. The reader is our own because webdataset's loads each member whole, whatever size its header claims, and accepts
shards that are cut at a member's edge. A new modality needs a line in SUFFIXES; the format stays.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mocme_dist.data.files import atomic_path, sha256_file
from mocme_dist.errors import DataError, ShardError

BLOCK = 512
_ADVICE = "restore it or pack it again, or leave its entities out with --on-bad-shard=skip"
_PIECE = 1 << 20  # bytes per read of skipped content
# Modalities whose member is one JSON object, and modalities of numbered files with the suffixes of their formats.
# Any of them may be a vector computed elsewhere: MODALITY.f32, little-endian float32.
JSON_MODALITIES = ("text", "numeric")
SUFFIXES = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp"),
    "audio": ("wav", "flac", "ogg", "oga", "opus", "mp3"),
    "video": ("webp", "gif", "png", "apng", "mp4", "m4v", "mov", "webm", "mkv"),
}
_MEMBER = re.compile(
    r"(\d{12})\.("
    + "|".join(
        [rf"{name}\.json" for name in JSON_MODALITIES]
        + [rf"{name}\.f32" for name in (*JSON_MODALITIES, *SUFFIXES)]
        + [rf"{name}\.\d+\.(?:{'|'.join(ends)})" for name, ends in SUFFIXES.items()]
    )
    + r")",
    re.ASCII,
)


@dataclass
class Sample:
    """Raw bytes of one entity.

    `members` by name ("text.json", "image.0.png", "audio.f32"), sizes of `oversized` ones.
    """

    id: int
    members: dict[str, bytes] = field(default_factory=dict)
    oversized: dict[str, int] = field(default_factory=dict)

    def files(self, modality: str) -> list[bytes]:
        """Return the contents of the numbered members of `modality`, in the order of their numbers."""
        return [
            content
            for name, content in self.members.items()
            if name.startswith(modality + ".") and name.count(".") == 2
        ]


@dataclass(frozen=True)
class Member:
    """One file of an entity, such as "image.0.png"; without content if it is above the reader's limit."""

    id: int
    name: str
    size: int
    content: bytes | None


@dataclass(frozen=True)
class ShardEntry:
    """The manifest's record of a shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"entities-{shard:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardEntry:
    """Write samples, in ascending order of id, as one tar file; equal samples give equal bytes.

    Raises:
        DataError: ids do not ascend, or `read_shard` would not accept a member's name.
        StorageError: the file cannot be written.
    """
    import webdataset

    count = 0
    last = -1
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            if sample.id <= last:
                raise DataError(f"{path.name}: sample {sample.id} after {last}; expected ascending ids")
            key = f"{sample.id:012d}"
            count = count + 1
            last = sample.id
            for member in sample.members:
                if not _MEMBER.fullmatch(f"{key}.{member}"):
                    raise DataError(f"{path.name}: member '{key}.{member}' is not of a known kind; {_expected()}")
            writer.write({"__key__": key, **sample.members})
    return ShardEntry(path.name, count, path.stat().st_size, sha256_file(path))


def read_members(
    path: Path, entry: ShardEntry | None, max_member_bytes: int, modality: str | None = None
) -> Iterator[Member]:
    """Yield the members of a shard in the order of the file, one in memory at a time.

    One pass reads, checks and hashes.

    The content is verified only when the iterator has ended, because the hash is known then.

    Args:
        path: a plain file.
        entry: the manifest's record; its size is compared first, count and SHA-256 after the last member.
            None accepts any shard with at least one sample.
        max_member_bytes: a larger member is yielded without its content.
        modality: restrict to the members of this modality.

    Raises:
        ShardError: the file is missing, truncated, not a tar, differs from `entry`, or holds a foreign member.
    """
    if not path.is_file():
        raise ShardError(f"{path.absolute()}: shard not found; {_ADVICE}")
    walk = _Walk(path, max_member_bytes, modality, hashing=entry is not None)
    try:
        if entry is not None and path.stat().st_size != entry.bytes:
            walk = _Walk(path, max_member_bytes, "", hashing=False)
            for _ in walk.members():
                pass  # the message says how far it can be read
            raise ShardError(f"{path.name}: readable to its end")
        yield from walk.members()
        if walk.samples != (entry.samples if entry else max(walk.samples, 1)):
            raise ShardError(
                f"{path.name}: {walk.samples} samples, {'another count' if entry else 'expected at least one'}"
            )
        if entry is not None and walk.sha256 != entry.sha256:
            raise ShardError(f"{path.name}: another content")
    except ShardError as error:
        raise (ShardError(_damage(path, entry, walk, error)) if entry is not None else error) from None
    except OSError as error:
        raise ShardError(f"{path.absolute()}: cannot be read: {error.strerror or error}; {_ADVICE}") from None


def read_shard(
    path: Path, entry: ShardEntry | None, max_member_bytes: int, modality: str | None = None
) -> Iterator[Sample]:
    """Yield the members of `read_members` grouped by sample, one sample in memory at a time, in ascending order of id.

    A sample is yielded if one of its members is of `modality`; members above the limit are in `oversized`.
    """
    sample: Sample | None = None
    for member in read_members(path, entry, max_member_bytes, modality):
        if sample is None or member.id != sample.id:
            if sample is not None:
                yield _ordered(sample)
            sample = Sample(member.id)
        if member.content is None:
            sample.oversized[member.name] = member.size
        else:
            sample.members[member.name] = member.content
    if sample is not None:
        yield _ordered(sample)


def damage(path: Path, entry: ShardEntry) -> str | None:
    """Return the message of `read_members` about a shard of the wrong size; None if it has the manifest's size."""
    if path.is_file() and path.stat().st_size == entry.bytes:
        return None
    try:
        list(read_members(path, entry, 0, ""))
    except ShardError as error:
        return str(error)
    return None


def _damage(path: Path, entry: ShardEntry, walk: _Walk, reason: ShardError) -> str:
    """Return a message: the first error, then found and expected size, samples and hash."""
    return (
        f"{reason!s}; {path.stat().st_size:,} bytes, the manifest says {entry.bytes:,}; {walk.samples:,} whole "
        f"samples, the manifest says {entry.samples:,}; sha256 {sha256_file(path)[:12]}..., the manifest says "
        f"{entry.sha256[:12]}...; {_ADVICE}"
    )


def _ordered(sample: Sample) -> Sample:
    """Sort members by kind and number: a tar sorted by name has image.10 before image.2."""

    def place(item: tuple[str, bytes]) -> tuple[str, int, str]:
        modality, number, *_ = item[0].split(".")
        return modality, int(number) if number.isdigit() else -1, number

    sample.members = dict(sorted(sample.members.items(), key=place))
    return sample


class _Walk:
    """One pass over the blocks of a tar file.

    Python's tarfile ends silently at a truncated header or a missing end mark.

    Attributes:
        samples: number of complete samples: the next one began, or the end mark was reached.
        sha256: hash of the whole file, after `members` has ended.
    """

    def __init__(self, path: Path, max_member_bytes: int, modality: str | None, hashing: bool) -> None:
        self.name = path.name
        self.path = path
        self.limit = max_member_bytes
        self.prefix = None if modality is None else modality + "."
        self.samples = 0
        self.sha256 = ""
        self._digest = hashlib.sha256() if hashing else None
        self._position = 0

    def members(self) -> Iterator[Member]:
        """Yield every member of the modality; raises ShardError if the file is not a valid shard."""
        first_seen: dict[int, int] = {}
        names: set[str] = set()
        last: int | None = None
        for offset, key, suffix, size, content in self._blocks():
            if key != last:
                if key in first_seen:
                    raise ShardError(
                        f"{self.name}: byte {offset}: key {key:012d} comes back, it began at byte {first_seen[key]}; "
                        "samples must be contiguous"
                    )
                if last is not None and key < last:
                    raise ShardError(
                        f"{self.name}: byte {offset}: key {key:012d} after {last:012d}; expected ascending keys"
                    )
                self.samples += last is not None
                first_seen[key] = offset
                last = key
                names = set()
            if suffix in names:
                raise ShardError(
                    f"{self.name}: byte {offset}: '{key:012d}.{suffix}' is there twice; its sample begins at byte "
                    f"{first_seen[key]}"
                )
            names.add(suffix)
            if self._wants(suffix):
                yield Member(key, suffix, size, content)
        self.samples += last is not None

    def _wants(self, suffix: str) -> bool:
        return self.prefix is None or suffix.startswith(self.prefix)

    def _blocks(self) -> Iterator[tuple[int, int, str, int, bytes | None]]:
        """Yield (byte offset, key, suffix, size, content) of every member.

        Content only if it is wanted and not too large.
        """
        size = self.path.stat().st_size
        if size == 0:
            raise ShardError(f"{self.name}: the shard is empty (0 bytes)")
        with self.path.open("rb") as file:
            while True:
                offset = self._position
                header = self._read(file, BLOCK)
                if len(header) < BLOCK:
                    raise ShardError(
                        f"{self.name}: byte {offset}: ends after {len(header)} of {BLOCK} header bytes without tar's "
                        "end mark; the shard is cut"
                    )
                if not any(header):
                    if not self._only_zeros(file) or size < offset + 2 * BLOCK:
                        raise ShardError(
                            f"{self.name}: byte {offset}: a block of zeros is not followed by zeros up to the end; the "
                            "shard is cut or damaged"
                        )
                    self.sha256 = self._digest.hexdigest() if self._digest else ""
                    return
                key, suffix, length = _checked_header(header, f"{self.name}: byte {offset}")
                padded = -(-length // BLOCK) * BLOCK
                if offset + BLOCK + padded > size:
                    raise ShardError(
                        f"{self.name}: byte {offset}: '{key:012d}.{suffix}' has {length:,} bytes, the file ends "
                        "before; the shard is cut"
                    )
                content = None
                if length <= self.limit and self._wants(suffix):
                    content = self._read(file, length)
                    padded -= length
                self._pass_over(file, padded)
                yield offset, key, suffix, length, content

    def _read(self, file: BinaryIO, count: int) -> bytes:
        content = file.read(count)
        self._position += len(content)
        if self._digest is not None:
            self._digest.update(content)
        return content

    def _pass_over(self, file: BinaryIO, count: int) -> None:
        """Skip `count` bytes: read them in bounded pieces if the file is hashed, otherwise seek."""
        if self._digest is None:
            self._position = file.seek(count, 1)
        while self._digest is not None and count > 0:
            count -= len(self._read(file, min(count, _PIECE)))

    def _only_zeros(self, file: BinaryIO) -> bool:
        while piece := self._read(file, _PIECE):
            if any(piece):
                return False
        return True


def _checked_header(header: bytes, where: str) -> tuple[int, str, int]:
    """Return key, suffix and size of a member, after checking that it belongs in a shard."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ShardError(f"{where}: not a tar header ({error}); the shard is damaged") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ShardError(
            f"{where}: member {info.name!r} is not a plain file (tar type {info.type!r}); shards hold plain files only"
        )
    match = _MEMBER.fullmatch(info.name)
    if match is None:
        raise ShardError(f"{where}: member {info.name!r} does not belong in a shard; {_expected()}")
    if info.size < 0:
        raise ShardError(f"{where}: member {info.name!r} claims {info.size} bytes; the shard is damaged")
    return int(match[1]), match[2], info.size


def _expected() -> str:
    numbered = [f"{name}.N.{{{','.join(ends)}}}" for name, ends in SUFFIXES.items()]
    return "expected a 12-digit key and one of " + ", ".join(
        [f"{name}.json" for name in JSON_MODALITIES] + numbered + ["MODALITY.f32"]
    )
