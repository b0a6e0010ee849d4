"""Writes the texts, numbers, image, audio and video files of a raw folder into shards.

The tables are in any order and may be larger than memory. One pass over each writes its rows to temporary files, one
per shard and modality; then every shard is built separately. Memory holds a bounded buffer and the rows of one shard.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mocme_dist.data.labels import RELATIONS_TABLE, LabelWriter, add_entities
from mocme_dist.data.progress import Progress
from mocme_dist.data.shards import SUFFIXES, Sample, ShardEntry, shard_name, write_shard
from mocme_dist.data.tsv import MediaFolder, RawFile, Table, decode, find_file
from mocme_dist.data.vectors import Vectors
from mocme_dist.data.vocabulary import visible_text
from mocme_dist.errors import DataError
from mocme_dist.partition import ShardPartition

# Table of each modality, and the columns with which its header begins.
TABLES = {
    "text": ("text.tsv", ("entity",)),
    "numeric": ("numeric.tsv", ("entity", "attribute", "value")),
    "image": ("images.tsv", ("entity", "file")),
    "audio": ("audio.tsv", ("entity", "file")),
    "video": ("video.tsv", ("entity", "file")),
}
MAX_FILE_BYTES = 2 << 30  # of one image, audio or video file
_BUFFER_BYTES = 128 << 20
# Number of undecodable files that are named.
_SHOWN = 20
# Memory of a buffered row beyond its bytes: its object and its place in a list.
_ROW_BYTES = 64


def misnamed(raw: Path) -> dict[str, str]:
    """Return files of a raw folder that are not read, each with the missing file that it was probably meant to be."""
    read = {
        "train.txt",
        "valid.txt",
        "test.txt",
        "entity2id.txt",
        RELATIONS_TABLE,
        *(name for name, _ in TABLES.values()),
    }
    there = {path.name.removesuffix(".gz") for path in raw.iterdir() if path.is_file()} if raw.is_dir() else set()
    near = {
        name: difflib.get_close_matches(name, sorted(read - there), n=1, cutoff=0.8) for name in sorted(there - read)
    }
    return {name: close[0] for name, close in near.items() if close}


class Spill:
    """Rows of every shard in temporary files, one per modality and shard; rows keep their order."""

    def __init__(self, folder: Path, shard_rows: int, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._folder = folder
        self._shard_rows = shard_rows
        self._limit = buffer_bytes
        self._size = 0
        self._rows: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, modality: str, entity: int, row: bytes) -> None:
        """Add a row of an entity; it must not hold a line feed."""
        self._rows[modality, entity // self._shard_rows].append(b"%d\t%b\n" % (entity, row))
        self._size += len(row) + _ROW_BYTES
        if self._size > self._limit:
            self.flush()

    def flush(self) -> None:
        """Append the buffered rows to the files, one open at a time."""
        for (modality, shard), rows in self._rows.items():
            with self._path(modality, shard).open("ab") as file:
                file.writelines(rows)
        self._rows.clear()
        self._size = 0

    def take(self, modality: str, shard: int) -> Iterator[tuple[int, bytes]]:
        """Yield (entity, row) of a shard after `flush`, and remove its file."""
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
    """Results of the passes over the tables."""

    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    # Number of rows of entities outside the graph, and the first such name.
    ignored: Counter[str] = field(default_factory=Counter)
    ignored_name: dict[str, str] = field(default_factory=dict)
    # Number of files in unsupported formats, and the names of the first.
    undecodable: Counter[str] = field(default_factory=Counter)
    undecodable_names: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def collect(raw: Path, ids: Mapping[bytes, int], spill: Spill, aside: Collection[str] = ()) -> Collected:
    """Send the rows of all tables to `spill`; rows of entities outside the graph are counted.

    Args:
        raw: raw folder.
        ids: id of every entity of the graph.
        spill: receives the rows.
        aside: modalities whose tables are skipped.

    Raises:
        DataError: a row is malformed, a value is not a number, or a file is missing.
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
                found.ignored_name.setdefault(modality, fields[0][:80].decode("utf-8", "replace"))
                continue
            if modality == "text":
                row = b"\t".join(fields[1:])
            elif modality == "numeric":
                row = _checked_number(file, number, fields)
            else:
                row = _checked_file(file, number, fields[1], media)
                name = row.decode()
                if _suffix(name) not in SUFFIXES[modality]:
                    found.undecodable[modality] += 1
                    if len(found.undecodable_names[modality]) < _SHOWN:
                        found.undecodable_names[modality].append(name)
                    continue
            found.rows[modality] += 1
            spill.add(modality, entity, row)
    spill.flush()
    return found


def _checked_number(file: RawFile, number: int, fields: list[bytes]) -> bytes:
    attribute = fields[1].strip()
    text = fields[2].strip()
    if not attribute:
        file.fail(number, "the field attribute is empty")
    decode(file, number, attribute, "attribute")
    try:
        # Python accepts 1_000 as a number; other tools do not.
        value = float(text) if b"_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        file.fail(
            number,
            f"the value of {attribute.decode()!r} is {text.decode(errors='replace')!r}; expected a finite number",
        )
    return attribute + b"\t" + text


def _checked_file(file: RawFile, number: int, name: bytes, media: MediaFolder) -> bytes:
    path = decode(file, number, name.strip(), "file")
    if not path:
        file.fail(number, "the field file is empty")
    try:
        stored, size = media.find(path)
    except ValueError as error:
        file.fail(number, str(error))
    if size > MAX_FILE_BYTES:  # files are read whole
        file.fail(
            number, f"file '{path}' has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}: take it out, or cut it"
        )
    return stored.encode()


def _suffix(path: str) -> str:
    return Path(path).suffix[1:].lower()


class ShardBuilder:
    """Builds the shards from spilled rows.

    Attributes:
        entries: records of the shards written so far.
        present: (E,) presence mask per modality.
        attributes: names of the numeric attributes.
        files: number of packed files per modality.
        zero_rows: number of all-zero vectors per modality, which stand for no vector.
        counts: replaced text cells, merged text rows, averaged numbers and repeated files.
    """

    def __init__(
        self,
        raw: Path,
        partition: ShardPartition,
        spill: Spill,
        text_columns: tuple[str, ...],
        vectors: Mapping[str, Vectors] | None = None,
        labels: tuple[LabelWriter, tuple[str | None, ...]] | None = None,
    ) -> None:
        self._raw = raw
        self._partition = partition
        self._spill = spill
        self._text_columns = text_columns
        self._vectors = vectors or {}
        self._labels = labels
        self.entries: list[ShardEntry] = []
        self.present = {modality: np.zeros(partition.num_rows, dtype=bool) for modality in TABLES}
        self.attributes: set[str] = set()
        self.files: Counter[str] = Counter()
        self.zero_rows: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def write(self, directory: Path) -> None:
        """Write every shard into `directory`.

        Raises:
            DataError: a file can no longer be read.
            StorageError: a shard cannot be written.
        """
        with Progress("packing", self._partition.num_rows, "entities") as progress:
            for shard in range(self._partition.num_shards):
                samples = self._samples(shard, progress)
                self.entries.append(write_shard(directory / shard_name(shard), samples))
                progress.raise_to(self._partition.bounds(shard)[1])

    def _samples(self, shard: int, progress: Progress) -> Iterator[Sample]:
        """Yield the samples of a shard in order of id; files are read one entity at a time."""
        texts = self._texts(shard)
        numbers = self._numbers(shard)
        files = {modality: self._files(modality, shard) for modality in SUFFIXES}
        first, last = self._partition.bounds(shard)
        if self._labels is not None:
            add_entities(self._labels[0], first, last, texts, self._labels[1])
        vectors = {modality: set(several.entities(first, last)) for modality, several in self._vectors.items()}
        for entity in sorted({*texts, *numbers}.union(*files.values(), *vectors.values())):
            members: dict[str, bytes] = {}
            for modality, values in (("text", texts), ("numeric", numbers)):
                if entity in values:
                    members[f"{modality}.json"] = json.dumps(
                        values[entity], ensure_ascii=False, allow_nan=False
                    ).encode("utf-8")
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
            progress.raise_to(entity + 1)

    def _vector(self, modality: str, entity: int) -> dict[str, bytes]:
        """Return the member that holds an entity's vector; empty if the vector is all zeros."""
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
        """Return non-empty cells per entity in the order of the columns.

        Of several rows the first non-empty cell counts.
        """
        texts: dict[int, dict[str, str]] = {}
        for entity, row in self._spill.take("text", shard):
            self.counts["merged_text_rows"] += entity in texts
            cells = texts.setdefault(entity, {})
            for column, cell in zip(self._text_columns, row.split(b"\t"), strict=True):
                if column not in cells and (text := self._decoded(cell)):
                    cells[column] = text
        return {
            entity: {name: cells[name] for name in self._text_columns if name in cells}
            for entity, cells in texts.items()
            if cells
        }

    def _decoded(self, cell: bytes) -> str:
        try:
            text = cell.decode("utf-8").strip()
        except UnicodeDecodeError:
            self.counts["replaced_text_cells"] += 1
            text = cell.decode("utf-8", errors="replace").strip()
        return text if text.isascii() or visible_text(text) else ""  # invisible characters alone are no text

    def _numbers(self, shard: int) -> dict[int, dict[str, float]]:
        """Return attributes per entity, sorted by name; several values of one attribute are averaged."""
        values: dict[int, dict[str, list[float]]] = {}
        for entity, row in self._spill.take("numeric", shard):
            attribute, _, value = row.partition(b"\t")
            values.setdefault(entity, {}).setdefault(attribute.decode("utf-8"), []).append(float(value))
        for attributes in values.values():
            self.attributes.update(attributes)
            self.counts["averaged_numbers"] += sum(len(several) > 1 for several in attributes.values())
        # Values are divided before they are added, so that the sum stays finite; fsum does not depend on their order.
        return {
            entity: {
                name: math.fsum(value / len(attributes[name]) for value in attributes[name])
                for name in sorted(attributes)
            }
            for entity, attributes in values.items()
        }

    def _files(self, modality: str, shard: int) -> dict[int, list[str]]:
        """Return names of each entity's files in the order of the table, each once."""
        files: dict[int, dict[str, None]] = {}
        for entity, row in self._spill.take(modality, shard):
            names = files.setdefault(entity, {})
            name = row.decode("utf-8")
            self.counts["repeated_files"] += name in names
            names[name] = None
        return {entity: list(names) for entity, names in files.items()}
