"""What the importers share: a raw folder that is whole or absent, its files written as they stream, and clear errors.

An importer reads a release of another project and writes the raw folder that `mocme_dist.pack` takes. Everything is
written into a temporary folder beside OUT and renamed at the end, so a killed import leaves nothing that looks done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mocme_dist.commands import run_command
from mocme_dist.errors import ConfigError, DataError, StorageError

MARK = "IMPORT.json"
SPLITS = ("train", "valid", "test")


def require(source: Path, *names: str, what: str) -> Path:
    """The first of `names` (each also as .gz) that is a file in `source`.

    Args:
        what: what holds it, for the message: "a LibKGE folder has train.del, ...".

    Raises:
        DataError: the folder or every candidate is missing; all of them are named.
    """
    found = optional(source, *names)
    if found is None:
        if not source.is_dir():
            raise DataError(f"{source.absolute()}: folder not found; {what}")
        raise DataError(f"{source.absolute()}: no {' nor '.join(names)} (nor .gz); {what}")
    return found


def optional(source: Path, *names: str) -> Path | None:
    """The first of `names`, each also as .gz, that is a file in `source`."""
    candidates = (path for name in names for path in (source / name, source / f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def open_text(path: Path, newline: str) -> TextIO:
    """A text file to read, gzip or not, a byte order mark dropped."""
    opener: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of every line that is not blank, gzip or not, a byte order mark dropped.

    Raises:
        DataError: the file is not UTF-8 or not a whole gzip stream.
    """
    try:
        with open_text(path, newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{path.absolute()}: cannot be read as UTF-8 lines: {error}") from None


def rows(path: Path, width: int, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of lines that must have `width` fields; None splits at any white space.

    Raises:
        DataError: a line has another number of fields.
    """
    for number, line in lines(path):
        fields = line.split(separator)
        if len(fields) != width:
            raise DataError(f"{path.absolute()}:{number}: expected {width} fields, got {len(fields)}: {line[:80]!r}")
        yield number, fields


def number_map(path: Path, name_first: bool = True) -> list[str]:
    """Names by their number, from lines of a name and a number (or the other way round), with or without a first line of their count.

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
            raise DataError(f"{path.absolute()}:{number}: number {identity} stands twice")
        names[identity] = fields[not name_first].strip()
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path.absolute()}: {len(names)} names whose numbers are not 0 to {len(names) - 1}")
    return [names[identity] for identity in range(len(names))]


def named(names: Sequence[str], field: str, path: Path, number: int) -> str:
    """The name of a number.

    Raises:
        DataError: it is no number, or no name has it.
    """
    if not field.isdecimal() or int(field) >= len(names):
        raise DataError(f"{path.absolute()}:{number}: {field!r} is no number below {len(names):,}")
    return names[int(field)]


class RawWriter:
    """Writes a raw folder; as a context manager it becomes `out` when the block ends well.

    Args:
        out: absent, empty, or what an importer wrote before (then replaced); of a link what it leads to.

    Raises:
        ConfigError: `out` holds something else, or something more.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path, source: Path, form: str) -> None:
        self.out, self.source, self.form = out.resolve(), source.absolute(), form
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out}: is a file; give a folder to write")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MARK).is_file():
                raise ConfigError(f"{self.out}: not empty and not written by an importer; give a new folder")
            if added := sorted(_files(self.out) - _listed(self.out / MARK)):
                raise ConfigError(
                    f"{self.out}: holds {added[0]} and perhaps more that no import wrote; give a new folder or move them away"
                )
        self.work = self.out.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{self.out.name}")
        self.counts: dict[str, int] = {}

    def __enter__(self) -> RawWriter:
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be written: {error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            if isinstance(error, OSError):  # sources that cannot be read are a DataError already
                raise StorageError(f"{self.out}: cannot be written: {error}") from error
            return
        record = {"form": self.form, "source": str(self.source), "counts": self.counts, "files": sorted(_files(self.work))}
        try:
            (self.work / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
            if self.out.exists():
                shutil.rmtree(self.out)
            self.work.rename(self.out)
        except OSError as failure:
            shutil.rmtree(self.work, ignore_errors=True)
            raise StorageError(f"{self.out}: cannot be written: {failure}") from failure

    def table(self, name: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> int:
        """Write tab-separated rows as they come; how many there were.

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
                    raise DataError(f"{self.source}: a name or a value for {name} holds a tab or a line end: {line[:80]!r}")
                file.write(line + "\n")
                count += 1
        self.counts[name] = count
        return count

    def triples(self, split: str, triples: Iterable[tuple[str, str, str]]) -> None:
        """Write a split; see `table`."""
        self.table(f"{split}.txt", triples)

    def entity_ids(self, names: Sequence[str]) -> None:
        """Write entity2id.txt: which names exist, in the order of their published numbers."""
        self.table("entity2id.txt", ((name, str(number)) for number, name in enumerate(names)))

    def feature_file(self, modality: str, path: Path, names: Iterable[str]) -> None:
        """Take a file of vectors as features/MODALITY, unread: a hard link where the disk allows, else a copy.

        Args:
            path: .npy, .safetensors, .pt or .pth, a row for each of `names`.
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
    """Every file in a folder, by its path in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _listed(mark: Path) -> set[str]:
    """The files that an import wrote, by its mark; a mark without such a list has at least those that it counted."""
    try:
        record = json.loads(mark.read_text(encoding="utf8"))
        return {MARK, *record.get("files", record["counts"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {MARK}


def one_line(value: str) -> str:
    """A text with every run of white space, tabs and line ends among it, as one space."""
    return " ".join(value.split())


def run_importer(description: str, add_arguments: Callable[[argparse.ArgumentParser], None], run: Callable[..., dict[str, Any]]) -> None:
    """Parse SOURCE, OUT and what `add_arguments` adds, import, print the counts as one JSON line."""

    def main() -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the release")
        parser.add_argument("out", type=Path, metavar="OUT", help="raw folder to write; then: python -m mocme_dist.pack OUT DATASET")
        add_arguments(parser)
        arguments = vars(parser.parse_args())
        print(json.dumps(run(arguments.pop("source"), arguments.pop("out"), **arguments)))

    run_command(main)


def nothing_more(parser: argparse.ArgumentParser) -> None:
    """The `add_arguments` of an importer without options."""
