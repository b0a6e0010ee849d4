"""Reading of source files and writing of raw folders, for all importers.

An importer reads a release of another project and writes a raw folder for `mocme_dist.pack`. Everything is written into
a temporary folder next to OUT, which is renamed at the end, so a killed import leaves nothing that looks complete.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TextIO

from mocme_dist.data.tsv import unpack
from mocme_dist.errors import ConfigError, DataError, StorageError

MARK = "IMPORT.json"
SPLITS = ("train", "valid", "test")


def require(source: Path, *names: str, what: str) -> Path:
    """Return the first of `names` (each also as .gz) that is a file in `source`.

    Args:
        what: description of the source, for the message: "a LibKGE folder has train.del, ...".

    Raises:
        DataError: the folder or every candidate is missing.
    """
    found = optional(source, *names)
    if found is None:
        if not source.is_dir():
            raise DataError(f"{source.absolute()}: folder not found; {what}")
        raise DataError(f"{source.absolute()}: no {' nor '.join(names)} (nor .gz); {what}")
    return found


def optional(source: Path, *names: str) -> Path | None:
    """Return the first of `names` (each also as .gz) that is a file in `source`, or None."""
    candidates = (path for name in names for path in (source / name, source / f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def open_text(path: Path, newline: str) -> TextIO:
    """Open a text file, gzipped or not, without its byte order mark."""
    file: BinaryIO = path.open("rb")
    return io.TextIOWrapper(unpack(file, path) if path.suffix == ".gz" else file, encoding="utf-8-sig", newline=newline)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) for every line that is not blank.

    Raises:
        DataError: the file is not UTF-8 or not a whole gzip stream.
    """
    try:
        with open_text(path, newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path.absolute()}: cannot be read as UTF-8 lines: {error}") from None


def rows(path: Path, width: int, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of lines with `width` fields; a separator of None splits at any white space.

    Raises:
        DataError: a line has another number of fields.
    """
    for number, line in lines(path):
        fields = line.split(separator)
        if len(fields) != width:
            raise DataError(f"{path.absolute()}:{number}: expected {width} fields, got {len(fields)}: {line[:80]!r}")
        yield number, fields


def number_map(path: Path, name_first: bool = True) -> list[str]:
    """Return names by number, from lines of name and number (or the reverse), optionally after a line with their count.

    Raises:
        DataError: a line is malformed, or the numbers are not 0 ... n-1, each once.
    """
    names: dict[int, str] = {}
    for number, line in lines(path):
        fields = line.rsplit(maxsplit=1) if name_first else line.split(maxsplit=1)
        if number == 1 and len(fields) == 1 and fields[0].isdecimal():
            continue  # OpenKE writes how many there are
        if len(fields) != 2 or not fields[name_first].isdecimal():
            raise DataError(f"{path.absolute()}:{number}: expected a name and its number, got {line[:80]!r}")
        identity = int(fields[name_first])
        if identity in names:
            raise DataError(f"{path.absolute()}:{number}: number {identity} occurs twice")
        names[identity] = fields[not name_first].strip()
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path.absolute()}: {len(names)} names whose numbers are not 0 to {len(names) - 1}")
    return [names[identity] for identity in range(len(names))]


def named(names: Sequence[str], field: str, path: Path, number: int) -> str:
    """Return the name of a number.

    Raises:
        DataError: it is not a number, or no name has it.
    """
    if not field.isdecimal() or int(field) >= len(names):
        raise DataError(f"{path.absolute()}:{number}: {field!r} is no number below {len(names):,}")
    return names[int(field)]


class RawWriter:
    """Writes a raw folder, which becomes `out` when the context ends without an error.

    Args:
        out: absent, empty, or written by an importer before (then replaced); links are followed.

    Raises:
        ConfigError: `out` holds other files.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path, source: Path, form: str) -> None:
        self.out = out.resolve()
        self.source = source.absolute()
        self.form = form
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out}: is a file; give a folder to write")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MARK).is_file():
                raise ConfigError(f"{self.out}: not empty and not written by an importer; give a new folder")
            if added := sorted(_files(self.out) - _listed(self.out / MARK)):
                raise ConfigError(
                    f"{self.out}: holds {added[0]} and perhaps more that no import wrote; give a new folder or move "
                    "them away"
                )
        self.work = self.out.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{self.out.name}")
        self.counts: dict[str, int] = {}

    def __enter__(self) -> RawWriter:
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be written: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            if isinstance(error, OSError):  # sources that cannot be read are a DataError already
                raise StorageError(f"{self.out}: cannot be written: {error}") from error
            return
        record = {
            "form": self.form,
            "source": str(self.source),
            "counts": self.counts,
            "files": sorted(_files(self.work)),
        }
        try:
            (self.work / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
            if self.out.exists():
                shutil.rmtree(self.out)
            self.work.rename(self.out)
        except OSError as failure:
            shutil.rmtree(self.work, ignore_errors=True)
            raise StorageError(f"{self.out}: cannot be written: {failure}") from failure

    def table(self, name: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> int:
        """Write tab-separated rows as they come; return their number.

        Raises:
            DataError: a field holds a tab or a line end, which the raw format cannot express.
        """
        count = 0
        with (self.work / name).open("w", encoding="utf8", newline="\n") as file:
            if header:
                file.write("\t".join(header) + "\n")
            for fields in rows:
                line = "\t".join(fields)
                if line.count("\t") != len(fields) - 1 or "\n" in line or "\r" in line:
                    raise DataError(
                        f"{self.source}: a name or a value for {name} holds a tab or a line end: {line[:80]!r}"
                    )
                file.write(line + "\n")
                count += 1
        self.counts[name] = count
        return count

    def triples(self, split: str, triples: Iterable[tuple[str, str, str]]) -> None:
        """Write a split; see `table`."""
        self.table(f"{split}.txt", triples)

    def entity_ids(self, names: Sequence[str]) -> None:
        """Write entity2id.txt: all names in the order of their published numbers."""
        self.table("entity2id.txt", ((name, str(number)) for number, name in enumerate(names)))

    def feature_file(self, modality: str, path: Path, names: Iterable[str]) -> None:
        """Add a file of vectors as features/MODALITY without reading it: a hard link if possible, else a copy.

        Args:
            path: .npy, .safetensors, .pt or .pth, with a row per name.
        """
        folder = self.work / "features"
        folder.mkdir(exist_ok=True)
        target = folder / f"{modality}{'.pt' if path.suffix == '.pth' else path.suffix}"
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)
        self.table(f"features/{modality}.ids", ([name] for name in names))


def _files(folder: Path) -> set[str]:
    """Return the relative paths of all files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _listed(mark: Path) -> set[str]:
    """Return the files that an import wrote, from its mark; older marks list only files with counts."""
    try:
        record = json.loads(mark.read_text(encoding="utf8"))
        return {MARK, *record.get("files", record["counts"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {MARK}


def one_line(value: str) -> str:
    """Return a text with every run of white space, including tabs and line ends, as one space."""
    return " ".join(value.split())
