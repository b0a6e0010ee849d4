"""An exported bundle, memory-mapped: what queries are asked of. Opening reads the manifest and compares file sizes.

Everything here runs without torch; encoding an entity that was never seen is in newcomer.py and needs it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import sha256_file
from mocme_dist.data.known import KnownAnswers
from mocme_dist.data.storage import local_folder
from mocme_dist.data.tensors import map_tensors
from mocme_dist.errors import DataError
from mocme_dist.partition import ShardPartition
from mocme_dist.serving.layout import part_name, read_manifest
from mocme_dist.serving.names import Names

if TYPE_CHECKING:
    import pandas


class Bundle:
    """Vectors, relations, names and known facts of a trained graph.

    Attributes:
        directory, manifest: where it lies, and what bundle.json says.
        num_entities, num_relations, width, gamma: sizes, and the score's margin.
        modalities: their order is that of the weights.
        partition: which entities a part holds.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.num_entities, self.num_relations = int(manifest["num_entities"]), int(manifest["num_relations"])
        self.width, self.gamma = int(manifest["width"]), float(manifest["gamma"])
        self.modalities: list[str] = list(manifest["modalities"])
        self.partition = ShardPartition(self.num_entities, int(manifest["part_rows"]))
        self.entities = Names(directory / "entities.parquet", self.num_entities, "entity")
        self.relations = Names(directory / "relations.parquet", self.num_relations, "relation")

    @classmethod
    def open(cls, directory: str | Path) -> Bundle:
        """Open a folder that `export` made, or its copy on this machine where it lies at an fsspec URL.

        Raises:
            DataError: it is no bundle, or a file is missing or has another size.
        """
        directory = local_folder(directory)
        manifest = read_manifest(directory)
        try:
            return cls(directory, manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{directory.absolute()}: bundle.json is damaged ({error}); export again") from None

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            DataError: one differs.
        """
        for name, entry in self.manifest["files"].items():
            if sha256_file(self.directory / name) != entry["sha256"]:
                raise DataError(f"{(self.directory / name).absolute()}: sha256 differs from the manifest's; export again")

    def _map(self, name: str, key: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.directory / name
        try:
            value = map_tensors(path)[key]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path.absolute()}: {key} cannot be read ({error}); export again") from None
        if value.shape != shape:
            raise DataError(f"{path.absolute()}: {key} has shape {value.shape}, expected {shape}; export again")
        return value

    def _parts(self, kind: str, key: str, shape: Any) -> list[NDArray[Any]]:
        sizes = [last - first for first, last in map(self.partition.bounds, range(self.partition.num_shards))]
        return [self._map(part_name(kind, part), key, shape(n)) for part, n in enumerate(sizes)]

    @cached_property
    def vectors(self) -> list[NDArray[Any]]:
        """(n, D) float32 or float16 of each part, mapped."""
        return self._parts("vectors", "vectors", lambda n: (n, self.width))

    @cached_property
    def weights(self) -> list[NDArray[np.float32]]:
        """(n, M) modality weights of each part, mapped; 0 where an entity lacks the modality."""
        return self._parts("modalities", "weights", lambda n: (n, len(self.modalities)))

    @cached_property
    def views(self) -> list[NDArray[np.int8]]:
        """(M, n, D) directions of what each modality says, of each part, mapped; empty where they were not exported."""
        if not self.manifest["views"]:
            return []
        return self._parts("modalities", "views", lambda n: (len(self.modalities), n, self.width))

    @cached_property
    def phase_RC(self) -> NDArray[np.float32]:
        """(R, C) phases of the relations in radians."""
        return np.asarray(self._map("relations.safetensors", "phases", (self.num_relations, self.width // 2)))

    @cached_property
    def known(self) -> KnownAnswers:
        """Every fact of the graph, by query."""
        return KnownAnswers.load(self.directory, "all", self.num_relations)

    def rows(self, parts: list[NDArray[Any]], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of any entities out of mapped parts whose first axis is the entity; float32."""
        ids = np.asarray(ids, np.int64)
        out = np.empty((len(ids), *parts[0].shape[1:]), np.float32)
        part = ids // self.partition.shard_rows
        for number in np.unique(part):
            here = part == number
            out[here] = parts[number][ids[here] - number * self.partition.shard_rows]
        return out

    def predict(
        self, head: str | None = None, relation: str = "", tail: str | None = None, top: int = 10, filter: str = "known"
    ) -> pandas.DataFrame:
        """The best answers to one question, or the place of one fact when both head and tail are given.

        Args:
            head, relation, tail: names; leave out the one that is asked for, head or tail.
            top: how many answers.
            filter: "known" leaves out answers that the graph has already, "none" marks them.

        Returns:
            One row an answer: rank, head, relation, tail, answer (the name asked for), score, probability, known.

        Raises:
            ConfigError: a name is unknown (the message has suggestions), or neither head nor tail is given.
        """
        from mocme_dist.serving.predict import Question, frame, predict

        return frame(predict(self, [Question(head, relation, tail)], top, filter))
