"""Reads the files of a raw folder: tab-separated lines, by themselves or with a header, gzipped or not.

Fields are split at tabs and nothing else: no quoting, no escapes. A byte order mark and CRLF are accepted, blank lines
are skipped. Lines stay bytes until text is needed. Every error names file and line.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mocme_dist.data.progress import Progress
from mocme_dist.errors import DataError

CHUNK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Text compresses 5 to 30 times. A gzip stream that expands more than this, beyond the allowance, is a bomb: it would be
# read for hours without a row.
MAX_EXPANSION = 200
EXPANSION_ALLOWANCE = 1 << 28


class _Unpacked(io.RawIOBase):
    """Raw stream of the bytes that a gzip file expands to; it refuses a bomb, and closes the file with itself."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        self._packed = packed
        self._file = gzip.GzipFile(fileobj=packed)
        self._path = path
        self._size = path.stat().st_size
        self._read = 0

    def readable(self) -> bool:
        """Return True: `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return the number of bytes; 0 at the end."""
        count = self._file.readinto(buffer)
        self._read += count
        if self._read > MAX_EXPANSION * self._size + EXPANSION_ALLOWANCE:
            raise DataError(
                f"{self._path.absolute()}: {self._size:,} bytes expand to more than {self._read:,}; expected text, "
                f"which gzip makes less than {MAX_EXPANSION} times smaller: unpack the file and look into it"
            )
        return count

    def close(self) -> None:
        """Close the gzip file, too."""
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()


def unpack(packed: BinaryIO, path: Path) -> BinaryIO:
    """Return a file of the bytes that the gzip file `packed`, opened at `path`, expands to.

    Reading from it raises a `DataError` if it expands to more than any text would, and EOFError, OSError or zlib.error
    if the gzip file is cut or damaged.
    """
    return io.BufferedReader(_Unpacked(packed, path), CHUNK_BYTES)


@dataclass(frozen=True)
class RawFile:
    """A text file of a raw folder; `label` is its name in messages."""

    path: Path

    @property
    def label(self) -> str:
        """Return the name of the file, including .gz."""
        return self.path.name

    def fail(self, line: int, message: str) -> NoReturn:
        """Raise a `DataError` at a line."""
        raise DataError(f"{self.label}:{line}: {message}")

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line number from 1, line without its end) for every line that is not blank; memory is one chunk.

        Raises:
            DataError: the file cannot be read, a gzip stream is cut or a bomb, or a line is longer than 256 MiB.
        """
        number = 0
        rest = b""
        for chunk in self._chunks():
            pieces = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
            rest = pieces.pop()
            if len(rest) > MAX_LINE_BYTES:
                self.fail(
                    number + len(pieces) + 1,
                    f"a line of more than {MAX_LINE_BYTES >> 20} MiB; expected tab-separated lines",
                )
            for number, piece in enumerate(pieces, number + 1):  # noqa: B020 - counts on
                line = piece[:-1] if piece.endswith(b"\r") else piece
                if line.strip() or b"\t" in line:
                    yield number, line
        if rest.strip() or b"\t" in rest:
            yield number + 1, rest.removesuffix(b"\r")

    def _chunks(self) -> Iterator[bytes]:
        first = True
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as plain, Progress(f"reading {self.label}", size, "B") as progress:
                packed = self.path.suffix == ".gz"
                file = unpack(plain, self.path) if packed else plain
                place = 0
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk.removeprefix(BYTE_ORDER_MARK) if first else chunk
                    first = False
                    progress.add(plain.tell() - place)
                    place = plain.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path.absolute()}: not a whole gzip file: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path.absolute()}: cannot be read: {error.strerror or error}") from None


def find_file(raw: Path, name: str) -> RawFile | None:
    """Return `name` or `name`.gz in the raw folder, or None if there is neither.

    Raises:
        DataError: both exist.
    """
    found = [path for path in (raw / name, raw / f"{name}.gz") if path.is_file()]
    if len(found) > 1:
        raise DataError(f"{raw.absolute()}: holds both {name} and {name}.gz; delete one")
    return RawFile(found[0]) if found else None


def require_file(raw: Path, name: str) -> RawFile:
    """Return `name` or `name`.gz in the raw folder.

    Raises:
        DataError: the folder or the file is missing; the message has the absolute path, and what lies there instead.
    """
    if not raw.is_dir():
        found = "is a file; expected a raw folder" if raw.is_file() else "raw folder not found"
        raise DataError(f"{raw.absolute()}: {found}{_instead([raw.name]) if raw.is_file() else ''}")
    file = find_file(raw, name)
    if file is None:
        hint = _instead(sorted(path.name for path in raw.iterdir())) or _WITHOUT.get(name, "")
        raise DataError(
            f"{(raw / name).absolute()}: file not found (nor {name}.gz); expected tab-separated lines of head, "
            f"relation, tail{hint}"
        )
    return file


# What to do without a split.
_WITHOUT = {
    "valid.txt": "; without one, data.dev=cut:0.1 holds out a tenth of train",
    "test.txt": (
        "; without one, `mocme split train.txt NEW_DIR` cuts train, valid and test out of one list of facts "
        "(valid alone: data.dev=cut:0.1)"
    ),
}
# Other forms of a graph by the ends of their files' names: what to call them, and what to do with one.
_RDF = "`mocme import rdf {file} NEW_DIR` makes a raw folder of it"
_FORMS: dict[tuple[str, ...], tuple[str, str]] = {
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z"): ("an archive", "unpack it and give the folder"),
    (".nt", ".ttl", ".nq", ".trig", ".nt.gz", ".ttl.gz", ".nq.gz", ".trig.gz"): ("RDF", _RDF),
    (".rdf", ".owl", ".n3", ".jsonld"): (
        "RDF",
        "convert it to N-Triples (.nt); then `mocme import rdf FILE.nt NEW_DIR`",
    ),
    (".parquet",): ("Parquet", "write its columns head, relation and tail as tab-separated lines to a text file"),
    (".csv", ".csv.gz"): ("CSV", "write its columns head, relation and tail as tab-separated lines to a text file"),
    (".tsv", ".txt", ".tsv.gz", ".txt.gz"): (
        "a text file",
        "if its lines are head, relation, tail: `mocme split {file} NEW_DIR` makes a raw folder of it",
    ),
}
_RAW_NAMES = ("train.txt", "valid.txt", "test.txt", "text.tsv", "numeric.tsv", "images.tsv", "audio.tsv", "video.tsv")


def _instead(names: Sequence[str]) -> str:
    """Say what a folder, or a path that is a file, holds instead of a raw folder's files.

    Empty if it is nothing known.
    """
    others = [name for name in names if not name.startswith((*_RAW_NAMES, "entity2id"))]
    for ends, (what, advice) in _FORMS.items():
        found = [name for name in others if name.lower().endswith(ends)]
        if found and (len(names) == len(others) or what != "a text file"):
            more = f" and {len(found) - 1:,} more of its kind" if len(found) > 1 else ""
            return f"; {found[0]}{more} is {what}: {advice.format(file=found[0])}"
    return ""


def decode(file: RawFile, line: int, field: bytes, what: str) -> str:
    """Return a field as text.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return field.decode("utf-8")
    except UnicodeDecodeError as error:
        file.fail(line, f"{what} {field[:40]!r} is not UTF-8 ({error.reason} at byte {error.start})")


class Table:
    """A tab-separated file with a header whose first column is `entity`.

    Attributes:
        file: the file.
        columns: names in the header.
    """

    def __init__(self, file: RawFile, expected: tuple[str, ...]) -> None:
        """Read the header; `expected` are the names that it must begin with.

        Raises:
            DataError: there is no header, it begins otherwise, or it names a column twice.
        """
        self.file = file
        self._lines = file.lines()
        number, header = next(self._lines, (1, b""))
        self.columns = tuple(decode(file, number, field, "column").strip() for field in header.split(b"\t"))
        if self.columns[: len(expected)] != expected:
            got = ", ".join(f"'{name}'" for name in self.columns) if any(self.columns) else "nothing"
            file.fail(number, f"expected a header that begins with {', '.join(expected)}, got {got}")
        doubled = sorted({name or "(empty)" for name in self.columns if self.columns.count(name) > 1 or not name})
        if len(self.columns) < 2:
            file.fail(number, "the header has the column entity alone; expected at least one more")
        if doubled:
            file.fail(
                number, f"the header names {', '.join(doubled)} more than once or not at all; expected different names"
            )

    def rows(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (line number, fields) for every row.

        Raises:
            DataError: the number of fields differs from the header's, or the entity is empty.
        """
        width = len(self.columns)
        for number, line in self._lines:
            fields = line.split(b"\t")
            if len(fields) != width:
                self.file.fail(
                    number, f"expected {width} tab-separated fields ({', '.join(self.columns)}), got {len(fields)}"
                )
            if not fields[0].strip():
                self.file.fail(number, "the field entity is empty")
            yield number, fields


class MediaFolder:
    """Checks that the files a table names are plain files inside the raw folder."""

    def __init__(self, raw: Path) -> None:
        self._root = os.path.realpath(raw)
        self._inside_folder = lru_cache(maxsize=4096)(self._folder_is_inside)

    def find(self, name: str) -> tuple[str, int]:
        """Return the name under which a file is stored, relative to the raw folder, and its size in bytes.

        The stored name differs from `name` where the file system has another Unicode form of it.

        Raises:
            ValueError: it is missing, not a plain file, or outside the raw folder, possibly through a link.
        """
        for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
            with suppress(FileNotFoundError):
                return form, self._size(form)
        raise ValueError(f"file '{name}' not found in the raw folder (No such file or directory)")

    def _size(self, name: str) -> int:
        # realpath costs a system call per folder level; folders repeat, so only links are resolved in full.
        path = os.path.join(self._root, name)  # noqa: PTH118 - a tenth of pathlib's time, for millions of files
        if Path(name).is_absolute() or not self._inside_folder(os.path.dirname(path)):  # noqa: PTH120
            raise ValueError(f"file '{name}' lies outside the raw folder; expected a path relative to it")
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not self._is_inside(os.path.realpath(path)):
                    raise ValueError(
                        f"file '{name}' is a link that leads outside the raw folder; copy the file into it"
                    )
                status = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"file '{name}' not found in the raw folder ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"'{name}' is not a plain file")
        return status.st_size

    def _folder_is_inside(self, folder: str) -> bool:
        return self._is_inside(os.path.realpath(folder))

    def _is_inside(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root.rstrip(os.sep) + os.sep)
