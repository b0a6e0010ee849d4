"""A packed data set: the folder that `pack` writes and every later stage opens.

Opening checks the manifest and the sizes of the shards, and verifies the graph against its hashes, once per copy.
Arrays are memory-mapped on first use. Every machine keeps a mirror of a data set at a URL: the graph is fetched on
opening, shards and feature parts on first use.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocme_dist.data.files import check_files, read_json, sweep, verify_once
from mocme_dist.data.graph import fingerprint
from mocme_dist.data.known import ARRAYS, KnownAnswers, check_range, load_integers
from mocme_dist.data.labels import ENTITY_LABELS, RELATION_LABELS
from mocme_dist.data.manifests import DatasetManifest, checked
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.data.shards import Member, Sample, ShardEntry, damage, read_members, read_shard, shard_name
from mocme_dist.data.storage import is_url
from mocme_dist.errors import DataError, ShardError, one_line
from mocme_dist.partition import ShardPartition

FORMAT = 1
SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
_GRAPH = (
    "entities.parquet",
    "relations.parquet",
    *(f"{split}.npy" for split in SPLITS),
    *(f"known_{name}_{array}.npy" for name in ("train", "all") for array in ARRAYS),
)
_AGAIN = "pack the data set again"


class Dataset:
    """Graph, names and shards of a packed folder.

    Attributes:
        directory: the folder, or the mirror of a URL.
        place: absolute path or URL that it was opened with; the same on every machine.
        manifest: content of manifest.json.
        num_entities, num_relations: sizes; ids run from 0.
        shards: which ids each shard holds.
        entries: one record per shard, in order.
        modalities: counts of each modality that at least one entity has.
        fingerprint: SHA-256 over graph and shards, independent of the location.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], mirror: RemoteStorage | None = None) -> None:
        self.directory = directory
        self.mirror = mirror
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
            place: path or fsspec URL of a packed data set.
            check_shards: verify shard sizes on open. Pass False if the caller reads, and so verifies, every shard, or
                none.

        Raises:
            DataError: it does not exist or is unfinished, its graph is damaged, or a shard is missing or has another
                size.
        """
        mirror = RemoteStorage(str(place)) if is_url(place) else None
        if mirror is not None:
            mirror.pull(MANIFEST, "graph/*")
            if MANIFEST not in mirror.list(MANIFEST):  # the mirror holds a copy of an earlier data set
                (mirror.path / MANIFEST).unlink(missing_ok=True)
        directory = mirror.path if mirror else Path(place)
        path = directory / MANIFEST
        where = mirror.url if mirror else directory.absolute()
        if not path.is_file():
            raise DataError(
                f"{where}: no {MANIFEST}; not a packed data set, or unfinished: run python -m mocme_dist.pack"
            )
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{path.absolute()}: expected a data set of format {FORMAT}; {_AGAIN}")
        checked(DatasetManifest, manifest, path, _AGAIN)
        dataset = cls(directory, manifest, mirror)
        dataset._check_names()
        graph = [f"graph/{name}" for name in manifest.get("graph", _GRAPH)]
        try:
            verify_once(directory, [MANIFEST, *graph], dataset._check_graph)
        except DataError:
            if mirror is None:
                raise
            shutil.rmtree(directory / "graph")  # fetch a damaged local copy again
            mirror.pull("graph/*")
            verify_once(directory, [MANIFEST, *graph], dataset._check_graph)
        if check_shards and mirror is None:  # remote shards are checked after they were fetched
            for shard, entry in enumerate(dataset.entries):
                if (wrong := damage(dataset.shard_path(shard), entry)) is not None:
                    raise ShardError(wrong)
        return dataset

    def _check_names(self) -> None:
        # The count first: a manifest may claim 10^15 entities.
        if len(self.entries) != self.shards.num_shards or any(
            entry.name != shard_name(shard) for shard, entry in enumerate(self.entries)
        ):
            raise DataError(
                f"{self.directory.absolute()}: the manifest lists {len(self.entries)} shards, expected "
                f"{self.shards.num_shards} by number"
            )

    def _check_graph(self) -> None:
        """Verify the files of graph/ against the manifest, and every id in them against its range."""
        for table, count in (("entities", self.num_entities), ("relations", self.num_relations)):
            self._check_count(table, count)
        graph = self.directory / "graph"
        names = self.manifest.get("graph")
        if names is None:
            self._check_fingerprint()
        elif missing := [name for name in _GRAPH if name not in names]:
            raise DataError(f"{(self.directory / MANIFEST).absolute()}: graph: lacks {', '.join(missing)}; {_AGAIN}")
        else:
            check_files(graph, names, _AGAIN)
        for split in SPLITS:
            triples = self.triples(split)
            for column, limit in enumerate((self.num_entities, self.num_relations, self.num_entities)):
                what = f"{('head', 'relation', 'tail')[column]} of a triple"
                check_range(triples[:, column], limit, graph / f"{split}.npy", what, _AGAIN)
        for name in ("train", "all"):
            self.known(name).check(self.num_entities, graph / f"known_{name}_*.npy", _AGAIN)

    def _check_fingerprint(self) -> None:
        """Verify the graph of a data set by an earlier version, whose manifest has one hash over everything."""
        names = [name.encode() for name in self.entity_names()], [name.encode() for name in self.relation_names()]
        found = fingerprint(self.directory / "graph", names, [entry.sha256 for entry in self.entries])
        if found != self.fingerprint:
            raise DataError(
                f"{(self.directory / 'graph').absolute()}: fingerprint {found[:12]}, the manifest says "
                f"{self.fingerprint[:12]}: a file is damaged or not its own; {_AGAIN}"
            )

    def shard_path(self, shard: int) -> Path:
        """Return the path of a shard's tar file, after fetching it if the data set is remote."""
        self.bring(f"shards/{shard_name(shard)}")
        return self.directory / "shards" / shard_name(shard)

    def bring(self, *patterns: str) -> None:
        """Fetch new or changed files of a remote data set; do nothing for a local one."""
        if self.mirror is not None and patterns:
            self.mirror.pull(*patterns)

    def bring_features(self, modality: str, first: int, last: int) -> None:
        """Fetch the feature parts that hold ids [first, last), with the modality's manifest and statistics."""
        parts = [f"part-{shard:06d}.*" for shard, _, _ in self.shards.overlapping(first, last)]
        self.bring(*(f"features/{modality}/{name}" for name in ("manifest.json", "statistics.json", *parts)))

    def remote_part_sizes(self, modality: str) -> dict[int, int] | None:
        """Return sizes in bytes of the finished feature parts at the URL, by shard; None for a local data set."""
        if self.mirror is None:
            return None
        found = self.mirror.list(f"features/{modality}/part-*")
        parts = {name: version for name, version in found.items() if name.endswith(".safetensors")}
        return {
            int(name[-18:-12]): int(version.split()[0])
            for name, version in parts.items()
            if name.removesuffix(".safetensors") + ".json" in found
        }

    def publish(self, *names: str) -> None:
        """Upload files of a remote data set in this order; do nothing for a local one."""
        if self.mirror is not None:
            self.mirror.push(names)

    def publish_missing(self, name: str) -> None:
        """Upload a file that a killed process wrote but did not upload."""
        if self.mirror is not None and name not in self.mirror.list(name):
            self.mirror.push([name])

    def withdraw(self, name: str) -> None:
        """Delete a file locally and remotely."""
        (self.directory / name).unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.remove(name)

    def sweep(self) -> None:
        """Remove unfinished files of killed extractions."""
        for folder in (self.directory, *(self.directory / "features").glob("*")):
            sweep(folder)
        if self.mirror is not None:
            self.mirror.sweep()

    def read_samples(self, shard: int, max_member_bytes: int, modality: str | None = None) -> Iterator[Sample]:
        """Yield the verified samples of a shard, ascending by id; entities without any modality have none.

        Raises:
            ShardError: see `read_shard`; also a key outside the shard's id range, so no entity is in two shards.
        """
        for sample in read_shard(self.shard_path(shard), self.entries[shard], max_member_bytes, modality):
            self._check_id(shard, sample.id)
            yield sample

    def read_members(self, shard: int, max_member_bytes: int, modality: str) -> Iterator[Member]:
        """Yield the verified files of one modality in a shard, one file in memory at a time."""
        for member in read_members(self.shard_path(shard), self.entries[shard], max_member_bytes, modality):
            self._check_id(shard, member.id)
            yield member

    def _check_id(self, shard: int, entity: int) -> None:
        first, last = self.shards.bounds(shard)
        if not first <= entity < last:
            raise ShardError(
                f"{shard_name(shard)}: key {entity:012d} lies outside the shard's ids [{first}, {last}); pack the data "
                "set again"
            )

    def triples(self, split: str) -> NDArray[np.int64]:
        """Return (n, 3) head, relation, tail of "train", "valid" or "test", memory-mapped.

        Raises:
            DataError: the file is missing or truncated, or its length differs from the manifest's.
        """
        path = self.directory / "graph" / f"{split}.npy"
        if split not in SPLITS:
            raise DataError(f"{path.absolute()}: no split {split!r}; expected one of {', '.join(SPLITS)}")
        triples = load_integers(path)
        if triples.shape != (self.manifest["splits"][split], 3):
            raise DataError(
                f"{path.absolute()}: shape {triples.shape}, the manifest says {self.manifest['splits'][split]} "
                "triples; pack it again"
            )
        return triples

    def known(self, name: str) -> KnownAnswers:
        """Return known answers of "train" alone, or of "all" files of the raw folder."""
        return KnownAnswers.load(self.directory / "graph", name, self.num_relations)

    def text_columns(self, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the columns of an entity's text: the wanted ones, or all columns of text.tsv, label first."""
        if wanted is not None:
            return tuple(wanted)
        there = self.modalities.get("text", {}).get("columns", ())
        return (*(name for name in there if name == "label"), *(name for name in there if name != "label"))

    def reflexive(self) -> list[int]:
        """Return relations that have a self loop in train.

        For all others a source is not a candidate of its own query.
        """
        triples = self.triples("train")
        return np.unique(triples[triples[:, 0] == triples[:, 2], 1]).tolist()

    def seen(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each entity occurs in train.

        Other entities have no structure in training, ranking and export.
        """
        return self.known("train").has_source(ids)

    def entity_names(self) -> list[str]:
        """Return the names of all entities, by id."""
        return self._names("entities", self.num_entities)

    def entity_names_of(self, first: int, count: int) -> list[str]:
        """Return the names of the entities [first, first + count); reads only the row groups that hold them."""
        return self._slice("entities.parquet", "name", first, count)

    def entity_labels_of(self, first: int, count: int) -> list[str]:
        """Labels of the entities [first, first + count); the name of an entity that has no label."""
        names = self.entity_names_of(first, count)
        if not (self.directory / "graph" / ENTITY_LABELS).is_file():
            return names
        labels = self._slice(ENTITY_LABELS, "label", first, count)
        return [label or name for label, name in zip(labels, names, strict=True)]

    def relation_labels(self) -> list[str]:
        """Labels of all relations; the name of a relation that has no label."""
        names = self.relation_names()
        if not (self.directory / "graph" / RELATION_LABELS).is_file():
            return names
        labels = self._slice(RELATION_LABELS, "label", 0, self.num_relations)
        return [label or name for label, name in zip(labels, names, strict=True)]

    def _slice(self, table: str, column: str, first: int, count: int) -> list[Any]:
        """Rows [first, first + count) of one column of a table; only the parts of the file that hold them are read."""
        import pyarrow
        import pyarrow.parquet

        path = self.directory / "graph" / table
        names = list[Any]()
        start = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    low = max(first - start, 0)
                    high = min(first + count - start, rows)
                    if low < high:
                        found = file.read_row_group(group, columns=[column])[column]
                        names += found.slice(low, high - low).to_pylist()
                    start += rows
        except (OSError, KeyError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); pack the data set again") from None
        if len(names) != count:
            raise DataError(
                f"{path.absolute()}: {start} names, expected {first + count} or more; pack the data set again"
            )
        return names

    def _check_count(self, table: str, count: int) -> None:
        """Verify the number of names in a table against the manifest; reads the file's footer only."""
        import pyarrow
        import pyarrow.parquet

        path = self.directory / "graph" / f"{table}.parquet"
        try:
            found = pyarrow.parquet.read_metadata(path).num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); {_AGAIN}") from None
        if found != count:
            raise DataError(f"{path.absolute()}: {found} names, the manifest says {count}; {_AGAIN}")

    def relation_names(self) -> list[str]:
        """Return the names of all relations, by id."""
        return self._names("relations", self.num_relations)

    def _names(self, table: str, count: int) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        path = self.directory / "graph" / f"{table}.parquet"
        try:
            names: list[str] = pyarrow.parquet.read_table(path, columns=["name"])["name"].to_pylist()
        except (OSError, KeyError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); pack the data set again") from None
        if len(names) != count:
            raise DataError(
                f"{path.absolute()}: {len(names)} names, the manifest says {count}; pack the data set again"
            )
        return names
