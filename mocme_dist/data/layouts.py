"""Reads the files of a raw folder: tab-separated lines, by themselves or with a header, gzipped or not.

Fields are split at tabs and nothing else: no quoting, no escapes. A byte order mark and CRLF are accepted, blank lines
are skipped. Lines stay bytes until somebody needs text. Every error names file and line.
"""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from mocme_dist.data.progress import Progress
from mocme_dist.errors import DataError

CHUNK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawFile:
    """A text file of a raw folder; `label` is its name in messages."""

    path: Path

    @property
    def label(self) -> str:
        """Name of the file, with .gz where it has it."""
        return self.path.name

    def fail(self, line: int, message: str) -> NoReturn:
        """Raise a `DataError` at a line."""
        raise DataError(f"{self.label}:{line}: {message}")

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line without its end) of every line that is not blank; memory is one chunk.

        Raises:
            DataError: the file cannot be read, a gzip stream is cut, or a line is longer than 256 MiB.
        """
        number, rest = 0, b""
        for chunk in self._chunks():
            pieces = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
            rest = pieces.pop()
            if len(rest) > MAX_LINE_BYTES:
                self.fail(number + len(pieces) + 1, f"a line of more than {MAX_LINE_BYTES >> 20} MiB; expected tab-separated lines")
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
                file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if packed else plain
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
    """`name` or `name`.gz in the raw folder, if there is one.

    Raises:
        DataError: both are there.
    """
    found = [path for path in (raw / name, raw / f"{name}.gz") if path.is_file()]
    if len(found) > 1:
        raise DataError(f"{raw.absolute()}: holds both {name} and {name}.gz; delete one")
    return RawFile(found[0]) if found else None


def require_file(raw: Path, name: str) -> RawFile:
    """`name` or `name`.gz in the raw folder.

    Raises:
        DataError: the folder or the file is missing; the message has the absolute path.
    """
    if not raw.is_dir():
        raise DataError(f"{raw.absolute()}: raw folder not found")
    file = find_file(raw, name)
    if file is None:
        raise DataError(
            f"{(raw / name).absolute()}: file not found (nor {name}.gz); expected lines of head, relation, tail with tabs between"
        )
    return file


def decode(file: RawFile, line: int, field: bytes, what: str) -> str:
    """A field as text.

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
            file.fail(number, f"expected a header that begins with {', '.join(expected)}, got {', '.join(self.columns) or 'nothing'}")
        doubled = sorted({name or "(empty)" for name in self.columns if self.columns.count(name) > 1 or not name})
        if doubled:
            file.fail(number, f"the header names {', '.join(doubled)} more than once or not at all; expected different names")

    def rows(self) -> Iterator[tuple[int, list[bytes]]]:
        """(line number, fields) of every row.

        Raises:
            DataError: a row has not as many fields as the header, or no entity.
        """
        width = len(self.columns)
        for number, line in self._lines:
            fields = line.split(b"\t")
            if len(fields) != width:
                self.file.fail(number, f"expected {width} tab-separated fields ({', '.join(self.columns)}), got {len(fields)}")
            if not fields[0].strip():
                self.file.fail(number, "the field entity is empty")
            yield number, fields


class MediaFolder:
    """Checks that the files a table names are plain files inside the raw folder."""

    def __init__(self, raw: Path) -> None:
        self._root = os.path.realpath(raw)
        self._inside_folder = lru_cache(maxsize=4096)(self._folder_is_inside)

    def size(self, name: str) -> int:
        """Bytes of the file `name`, relative to the raw folder.

        Raises:
            ValueError: it is missing, no plain file, or lies outside the raw folder, also by way of a link.
        """
        # realpath costs a system call per folder level; folders repeat, so only links are resolved in full.
        path = os.path.join(self._root, name)  # noqa: PTH118 - a tenth of pathlib's time, for millions of files
        if Path(name).is_absolute() or not self._inside_folder(os.path.dirname(path)):  # noqa: PTH120
            raise ValueError(f"file '{name}' lies outside the raw folder; expected a path relative to it")
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not self._is_inside(os.path.realpath(path)):
                    raise ValueError(f"file '{name}' is a link that leads outside the raw folder; copy the file into it")
                status = os.stat(path)  # noqa: PTH116
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                raise ValueError(f"file '{name}' not found in the raw folder ({error.strerror})") from None
            raise
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"'{name}' is not a plain file")
        return status.st_size

    def _folder_is_inside(self, folder: str) -> bool:
        return self._is_inside(os.path.realpath(folder))

    def _is_inside(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root.rstrip(os.sep) + os.sep)
