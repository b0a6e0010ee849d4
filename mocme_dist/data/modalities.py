"""Texts, numbers, pictures, sounds and films of a raw folder on their way into shards.

The tables come in any order and may be larger than memory. One pass over each sends its rows to temporary files, one a
shard and modality; then every shard is built by itself. Memory is a bounded buffer and the rows of one shard.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mocme_dist.data.layouts import MediaFolder, RawFile, Table, decode, find_file
from mocme_dist.data.progress import Progress
from mocme_dist.data.shards import SUFFIXES, Sample, ShardEntry, shard_name, write_shard
from mocme_dist.data.vectors import Vectors
from mocme_dist.errors import DataError
from mocme_dist.partition import ShardPartition

# Modality: its table, and the columns its header begins with.
TABLES = {
    "text": ("text.tsv", ("entity",)),
    "numeric": ("numeric.tsv", ("entity", "attribute", "value")),
    "image": ("images.tsv", ("entity", "file")),
    "audio": ("audio.tsv", ("entity", "file")),
    "video": ("video.tsv", ("entity", "file")),
}
MAX_FILE_BYTES = 2 << 30  # of one picture, sound or film
_BUFFER_BYTES = 128 << 20
# What a buffered row costs besides its bytes: its object and its place in a list.
_ROW_BYTES = 64


class Spill:
    """Rows of every shard in temporary files, one a modality and shard; rows keep the order in which they came."""

    def __init__(self, folder: Path, shard_rows: int, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._folder = folder
        self._shard_rows = shard_rows
        self._limit = buffer_bytes
        self._size = 0
        self._rows: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, modality: str, entity: int, row: bytes) -> None:
        """Keep a row of an entity; it must not hold a line feed."""
        self._rows[modality, entity // self._shard_rows].append(b"%d\t%b\n" % (entity, row))
        self._size += len(row) + _ROW_BYTES
        if self._size > self._limit:
            self.flush()

    def flush(self) -> None:
        """Append what is buffered to the files, one open at a time."""
        for (modality, shard), rows in self._rows.items():
            with self._path(modality, shard).open("ab") as file:
                file.writelines(rows)
        self._rows.clear()
        self._size = 0

    def take(self, modality: str, shard: int) -> Iterator[tuple[int, bytes]]:
        """(entity, row) of a shard after `flush`; its file is removed."""
        path = self._path(modality, shard)
        if path.is_file():
            for line in path.read_bytes().split(b"\n")[:-1]:
                entity, _, row = line.partition(b"\t")
                yield int(entity), row
            path.unlink()

    def _path(self, modality: str, shard: int) -> Path:
        return self._folder / f"{modality}-{shard:06d}"


@dataclass
class Collected:
    """What the passes over the tables found."""

    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)


def collect(raw: Path, ids: Mapping[bytes, int], spill: Spill, aside: Collection[str] = ()) -> Collected:
    """Send the rows of every table that exists to `spill`; rows of entities outside the graph are counted.

    Args:
        raw: raw folder.
        ids: id of every entity of the graph.
        spill: takes the rows.
        aside: modalities whose tables are left alone.

    Raises:
        DataError: a row is malformed, a number is none, a file is missing or not of a known kind.
    """
    found = Collected()
    media = MediaFolder(raw)
    for modality, (name, expected) in TABLES.items():
        file = find_file(raw, name)
        if file is None or modality in aside:
            continue
        table = Table(file, expected)
        found.columns[modality] = table.columns[1:]
        for number, fields in table.rows():
            entity = ids.get(fields[0])
            if entity is None:
                found.ignored[modality] += 1
                continue
            found.rows[modality] += 1
            if modality == "text":
                row = b"\t".join(fields[1:])
            elif modality == "numeric":
                row = _checked_number(file, number, fields)
            else:
                row = _checked_file(file, number, fields[1], modality, media)
            spill.add(modality, entity, row)
    spill.flush()
    return found


def _checked_number(file: RawFile, number: int, fields: list[bytes]) -> bytes:
    attribute, text = fields[1].strip(), fields[2].strip()
    if not attribute:
        file.fail(number, "the field attribute is empty")
    decode(file, number, attribute, "attribute")
    try:
        # Python reads 1_000 as a number; other tools do not.
        value = float(text) if b"_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        file.fail(number, f"the value of {attribute.decode()!r} is {text.decode(errors='replace')!r}; expected a finite number")
    return attribute + b"\t" + text


def _checked_file(file: RawFile, number: int, name: bytes, modality: str, media: MediaFolder) -> bytes:
    path = decode(file, number, name.strip(), "file")
    if not path:
        file.fail(number, "the field file is empty")
    if _suffix(path) not in SUFFIXES[modality]:
        file.fail(number, f"file '{path}' is of an unknown kind; expected one of {', '.join(SUFFIXES[modality])}")
    try:
        size = media.size(path)
    except ValueError as error:
        file.fail(number, str(error))
    if size > MAX_FILE_BYTES:  # it would be read whole
        file.fail(number, f"file '{path}' has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}: take it out, or cut it")
    return name.strip()


def _suffix(path: str) -> str:
    return Path(path).suffix[1:].lower()


class ShardBuilder:
    """Makes the shards from spilled rows, and keeps count.

    Attributes:
        entries: records of the shards written so far.
        present: (E,) bool per modality, who has it.
        attributes: names of numbers that occur.
        files: how many pictures, sounds and films were packed, by modality.
        zero_rows: vectors of zeros, by modality; they stand for no vector.
        counts: replaced text cells, merged text rows, averaged numbers and repeated files.
    """

    def __init__(
        self,
        raw: Path,
        partition: ShardPartition,
        spill: Spill,
        text_columns: tuple[str, ...],
        vectors: Mapping[str, Vectors] | None = None,
    ) -> None:
        self._raw = raw
        self._partition = partition
        self._spill = spill
        self._text_columns = text_columns
        self._vectors = vectors or {}
        self.entries: list[ShardEntry] = []
        self.present = {modality: np.zeros(partition.num_rows, dtype=bool) for modality in TABLES}
        self.attributes: set[str] = set()
        self.files: Counter[str] = Counter()
        self.zero_rows: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def write(self, directory: Path) -> None:
        """Write every shard into `directory`.

        Raises:
            DataError: a file cannot be read any more.
            StorageError: a shard cannot be written.
        """
        with Progress("packing entities", self._partition.num_shards, "shards") as progress:
            for shard in range(self._partition.num_shards):
                self.entries.append(write_shard(directory / shard_name(shard), self._samples(shard)))
                progress.add()

    def _samples(self, shard: int) -> Iterator[Sample]:
        """Samples of a shard in order of id; files are read one entity at a time."""
        texts, numbers = self._texts(shard), self._numbers(shard)
        files = {modality: self._files(modality, shard) for modality in SUFFIXES}
        first, last = self._partition.bounds(shard)
        vectors = {modality: set(several.entities(first, last)) for modality, several in self._vectors.items()}
        for entity in sorted({*texts, *numbers}.union(*files.values(), *vectors.values())):
            members: dict[str, bytes] = {}
            for modality, values in (("text", texts), ("numeric", numbers)):
                if entity in values:
                    members[f"{modality}.json"] = json.dumps(values[entity], ensure_ascii=False, allow_nan=False).encode("utf-8")
                    self.present[modality][entity] = modality not in vectors
            for modality in vectors:
                if entity in vectors[modality]:
                    members.update(self._vector(modality, entity))
            for modality, names in files.items():
                for number, name in enumerate(names.get(entity, ())):
                    members[f"{modality}.{number}.{_suffix(name)}"] = self._read(name)
                    self.present[modality][entity] = True
                    self.files[modality] += 1
            if members:
                yield Sample(entity, members)

    def _vector(self, modality: str, entity: int) -> dict[str, bytes]:
        """The member that holds an entity's vector, none when it is one of zeros."""
        vector = self._vectors[modality].read(entity)
        if vector is None:
            self.zero_rows[modality] += 1
            return {}
        self.present[modality][entity] = True
        return {f"{modality}.f32": vector.tobytes()}

    def _read(self, name: str) -> bytes:
        path = self._raw / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path.absolute()}: cannot be read: {error.strerror}") from None

    def _texts(self, shard: int) -> dict[int, dict[str, str]]:
        """Non-empty cells per entity in the order of the columns; of several rows the first non-empty cell counts."""
        texts: dict[int, dict[str, str]] = {}
        for entity, row in self._spill.take("text", shard):
            self.counts["merged_text_rows"] += entity in texts
            cells = texts.setdefault(entity, {})
            for column, cell in zip(self._text_columns, row.split(b"\t"), strict=True):
                if column not in cells and (text := self._decoded(cell)):
                    cells[column] = text
        return {entity: {name: cells[name] for name in self._text_columns if name in cells} for entity, cells in texts.items() if cells}

    def _decoded(self, cell: bytes) -> str:
        try:
            return cell.decode("utf-8").strip()
        except UnicodeDecodeError:
            self.counts["replaced_text_cells"] += 1
            return cell.decode("utf-8", errors="replace").strip()

    def _numbers(self, shard: int) -> dict[int, dict[str, float]]:
        """Attributes per entity, sorted by name; several values of one attribute are averaged."""
        values: dict[int, dict[str, list[float]]] = {}
        for entity, row in self._spill.take("numeric", shard):
            attribute, _, value = row.partition(b"\t")
            values.setdefault(entity, {}).setdefault(attribute.decode("utf-8"), []).append(float(value))
        for attributes in values.values():
            self.attributes.update(attributes)
            self.counts["averaged_numbers"] += sum(len(several) > 1 for several in attributes.values())
        # Divided before they are added, so that a sum of large numbers stays finite; fsum does not depend on the order.
        return {
            entity: {name: math.fsum(value / len(attributes[name]) for value in attributes[name]) for name in sorted(attributes)}
            for entity, attributes in values.items()
        }

    def _files(self, modality: str, shard: int) -> dict[int, list[str]]:
        """Names of an entity's files in the order of the table, each once."""
        files: dict[int, dict[str, None]] = {}
        for entity, row in self._spill.take(modality, shard):
            names = files.setdefault(entity, {})
            name = row.decode("utf-8")
            self.counts["repeated_files"] += name in names
            names[name] = None
        return {entity: list(names) for entity, names in files.items()}
