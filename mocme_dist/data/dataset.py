"""A packed data set: the folder that `pack` writes and every later stage opens.

Opening reads the manifest and compares file sizes; arrays are memory-mapped when asked for. Of a data set at a URL every
machine holds a mirror: the graph from the start, shards and feature parts when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import read_json
from mocme_dist.data.known import KnownAnswers, load_integers
from mocme_dist.data.shards import Member, Sample, ShardEntry, damage, read_members, read_shard, shard_name
from mocme_dist.data.storage import Mirror, is_url
from mocme_dist.errors import DataError, ShardError
from mocme_dist.partition import ShardPartition

FORMAT = 1
SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
_KEYS = ("num_entities", "num_relations", "shard_rows", "seed", "dev", "splits", "modalities", "shards", "report", "fingerprint")


class Dataset:
    """Graph, names and shards of a packed folder.

    Attributes:
        directory: the folder, of a URL its mirror.
        place: what it was opened by, the same on every machine: an absolute path or the URL.
        manifest: all that manifest.json says.
        num_entities, num_relations: sizes; ids run from 0.
        shards: which ids each shard holds.
        entries: one record a shard, in order.
        modalities: per modality that at least one entity has, its counts.
        fingerprint: SHA-256 over graph and shards; equal data sets have equal ones wherever they lie.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], mirror: Mirror | None = None) -> None:
        self.directory, self.mirror = directory, mirror
        self.place = mirror.url if mirror else str(directory.absolute())
        self.manifest = manifest
        self.num_entities: int = manifest["num_entities"]
        self.num_relations: int = manifest["num_relations"]
        self.shards = ShardPartition(self.num_entities, manifest["shard_rows"])
        self.entries = [ShardEntry(**entry) for entry in manifest["shards"]]
        self.modalities: dict[str, Any] = manifest["modalities"]
        self.fingerprint: str = manifest["fingerprint"]

    @classmethod
    def open(cls, place: str | Path, check_shards: bool = True) -> Dataset:
        """Open a packed folder.

        Args:
            place: what `pack` wrote, a path or an fsspec URL.
            check_shards: compare the shards' sizes; who reads every shard anyway, or none, does without.

        Raises:
            DataError: it is not there, was not finished, or a shard is missing or has another size.
        """
        mirror = Mirror(str(place)) if is_url(place) else None
        if mirror is not None:
            mirror.pull(MANIFEST, "graph/*")
        directory = mirror.path if mirror else Path(place)
        path, where = directory / MANIFEST, mirror.url if mirror else directory.absolute()
        if not path.is_file():
            raise DataError(f"{where}: no {MANIFEST}; not a packed data set, or unfinished: run python -m mocme_dist.pack")
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{path.absolute()}: expected a data set of format {FORMAT}; pack it again")
        missing = [key for key in _KEYS if key not in manifest]
        if missing:
            raise DataError(f"{path.absolute()}: lacks {', '.join(missing)}; pack the data set again")
        try:
            dataset = cls(directory, manifest, mirror)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path.absolute()}: damaged ({error}); pack the data set again") from None
        dataset._check_names()
        if check_shards and mirror is None:  # what is not here yet is checked when it has come
            for shard, entry in enumerate(dataset.entries):
                if (wrong := damage(dataset.shard_path(shard), entry)) is not None:
                    raise ShardError(wrong)
        return dataset

    def _check_names(self) -> None:
        if [entry.name for entry in self.entries] != [shard_name(shard) for shard in range(self.shards.num_shards)]:
            raise DataError(
                f"{self.directory.absolute()}: the manifest lists {len(self.entries)} shards, expected {self.shards.num_shards} by number"
            )

    def shard_path(self, shard: int) -> Path:
        """Where a shard's tar file lies; it is fetched first where the data set is remote."""
        self.bring(f"shards/{shard_name(shard)}")
        return self.directory / "shards" / shard_name(shard)

    def bring(self, *patterns: str) -> None:
        """Fetch files of a remote data set that are new or have changed; nothing for one on this disk."""
        if self.mirror is not None and patterns:
            self.mirror.pull(*patterns)

    def bring_features(self, modality: str, first: int, last: int) -> None:
        """Fetch the feature parts that hold ids [first, last), with the modality's manifest."""
        parts = [f"part-{shard:06d}.*" for shard, _, _ in self.shards.overlapping(first, last)]
        self.bring(*(f"features/{modality}/{name}" for name in ("manifest.json", *parts)))

    def remote_part_sizes(self, modality: str) -> dict[int, int] | None:
        """Bytes of the feature parts that lie at the URL, by shard; None for a data set on this disk."""
        if self.mirror is None:
            return None
        found = self.mirror.listing(f"features/{modality}/part-*.safetensors")
        return {int(name[-18:-12]): int(version.split()[0]) for name, version in found.items()}

    def publish(self, *names: str) -> None:
        """Send files, in this order, to where a remote data set lies; nothing for one on this disk."""
        if self.mirror is not None:
            self.mirror.push(names)

    def withdraw(self, name: str) -> None:
        """Delete a file here and there."""
        (self.directory / name).unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.remove(name)

    def read_samples(self, shard: int, max_member_bytes: int, modality: str | None = None) -> Iterator[Sample]:
        """Verified samples of a shard, ascending by id; entities without any modality have none.

        Raises:
            ShardError: see `read_shard`; also a key outside the shard's id range, so no entity is in two shards.
        """
        for sample in read_shard(self.shard_path(shard), self.entries[shard], max_member_bytes, modality):
            self._check_id(shard, sample.id)
            yield sample

    def read_members(self, shard: int, max_member_bytes: int, modality: str) -> Iterator[Member]:
        """The same file by file, of one modality: memory is that of one file, however many an entity has."""
        for member in read_members(self.shard_path(shard), self.entries[shard], max_member_bytes, modality):
            self._check_id(shard, member.id)
            yield member

    def _check_id(self, shard: int, entity: int) -> None:
        first, last = self.shards.bounds(shard)
        if not first <= entity < last:
            raise ShardError(
                f"{shard_name(shard)}: key {entity:012d} lies outside the shard's ids [{first}, {last}); pack the data set again"
            )

    def triples(self, split: str) -> NDArray[np.int64]:
        """(n, 3) head, relation, tail of "train", "valid" or "test", memory-mapped.

        Raises:
            DataError: the file is missing, torn or has another length than the manifest says.
        """
        path = self.directory / "graph" / f"{split}.npy"
        if split not in SPLITS:
            raise DataError(f"{path.absolute()}: no split {split!r}; expected one of {', '.join(SPLITS)}")
        triples = load_integers(path)
        if triples.shape != (self.manifest["splits"][split], 3):
            raise DataError(
                f"{path.absolute()}: shape {triples.shape}, the manifest says {self.manifest['splits'][split]} triples; pack it again"
            )
        return triples

    def known(self, name: str) -> KnownAnswers:
        """Known answers from "train" alone, or from "all" the files of the raw folder."""
        return KnownAnswers.load(self.directory / "graph", name, self.num_relations)

    def entity_names(self) -> list[str]:
        """Name of every entity; the position is the id."""
        return self._names("entities", self.num_entities)

    def entity_names_of(self, first: int, count: int) -> list[str]:
        """Names of the entities [first, first + count); only the parts of the file that hold them are read."""
        import pyarrow
        import pyarrow.parquet

        path, names, start = self.directory / "graph" / "entities.parquet", list[str](), 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    low, high = max(first - start, 0), min(first + count - start, rows)
                    if low < high:
                        names += file.read_row_group(group, columns=["name"])["name"].slice(low, high - low).to_pylist()
                    start += rows
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({error}); pack the data set again") from None
        if len(names) != count:
            raise DataError(f"{path.absolute()}: {start} names, expected {first + count} or more; pack the data set again")
        return names

    def relation_names(self) -> list[str]:
        """Name of every relation; the position is the id."""
        return self._names("relations", self.num_relations)

    def _names(self, table: str, count: int) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        path = self.directory / "graph" / f"{table}.parquet"
        try:
            names: list[str] = pyarrow.parquet.read_table(path, columns=["name"])["name"].to_pylist()
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({error}); pack the data set again") from None
        if len(names) != count:
            raise DataError(f"{path.absolute()}: {len(names)} names, the manifest says {count}; pack the data set again")
        return names
