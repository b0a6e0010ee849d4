"""The files of a bundle, memory-mapped. Opening verifies every file, once per copy; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import check_files, verify_once
from mocme_dist.data.known import KnownAnswers
from mocme_dist.data.labels import ENTITY_LABELS, RELATION_LABELS
from mocme_dist.data.tensors import map_tensors
from mocme_dist.errors import DataError
from mocme_dist.evidence.facts import Facts
from mocme_dist.partition import ShardPartition
from mocme_dist.serving.bundle_format import KNOWN, MANIFEST, folder_of, part_files, part_name, read_manifest
from mocme_dist.serving.evidence import ServedEvidence
from mocme_dist.serving.names import Names

_TRIES = 3
_AGAIN = "export again"


class MappedBundle:
    """Vectors, relations, names and known facts of a trained graph, all mapped when it is opened, so that they agree.

    Attributes:
        directory, manifest: the folder, and the content of bundle.json.
        num_entities, num_relations, width, gamma: sizes, and the margin of the score.
        view_width: width of one modality's own vector.
        modalities: names, in the order of the weights.
        partition: the entities of each part.
        entities, relations: names.
        vector_parts: (n, D) float32 or float16 of each part.
        weight_parts: (n, M) float32 modality weights of each part; 0 where an entity lacks the modality.
        view_parts: (M, n, view_width) int8 directions of the modalities' own vectors; empty with one modality.
        phase_RC: (R, C) float32 phases of the relations in radians.
        known: every fact of the graph, by query.
        known_in: the facts of "train", "valid" and "test", by query.
        dense: weights that encode an unseen entity, by name.
        structure_imputer: matrix of structure_imputer.py, or None.
        evidence_means: (F,) mean features of each space of evidence that centres them.
        evidence: evidence of neighbours with the blend, or None if the model alone answers.

    Raises:
        DataError: a file is missing or does not fit the manifest.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.num_entities = int(manifest["num_entities"])
        self.num_relations = int(manifest["num_relations"])
        self.width = int(manifest["width"])
        self.gamma = float(manifest["gamma"])
        self.view_width = self.width // int(manifest.get("blocks", 1))
        self.modalities: list[str] = list(manifest["modalities"])
        self.partition = ShardPartition(self.num_entities, int(manifest["part_rows"]))
        self.entities = self._names("entities.parquet", ENTITY_LABELS, self.num_entities, "entity")
        self.relations = self._names("relations.parquet", RELATION_LABELS, self.num_relations, "relation")
        self.vector_parts: list[NDArray[Any]] = []
        self.weight_parts: list[NDArray[np.float32]] = []
        self.view_parts: list[NDArray[np.int8]] = []
        self._map_parts()
        [self.phase_RC] = self.map("relations.safetensors", {"phases": (self.num_relations, self.width // 2)})
        self.known = KnownAnswers.load(directory, "all", self.num_relations)
        self.known_in = {
            split: KnownAnswers.load(directory, split, self.num_relations) for split in KNOWN if split != "all"
        }
        self.dense = self._map_if_there("dense.safetensors")
        self.structure_imputer = self._map_if_there("structure_imputer.safetensors").get("matrix")
        self.evidence_means = self._map_if_there("evidence_means.safetensors")
        about = manifest.get("evidence")
        self.evidence = ServedEvidence(self, about) if about else None

    def _names(self, ids: str, labels: str, count: int, kind: str) -> Names:
        labelled = self._has(labels)
        return Names(self.directory / ids, count, kind, self.directory / labels if labelled else None)

    def _has(self, name: str) -> bool:
        """Return whether the manifest lists an optional file; one that it does not list is not part of the bundle."""
        return (self.directory / name).is_file() and name in self.manifest.get("files", (name,))

    def _map_parts(self) -> None:
        M = len(self.modalities)
        for part in range(self.partition.num_shards):
            first, last = self.partition.bounds(part)
            n = last - first
            self.vector_parts += self.map(part_name("vectors", part), {"vectors": (n, self.width)})
            shapes: dict[str, tuple[int, ...]] = {"weights": (n, M)}
            if self.manifest["views"]:
                shapes["views"] = (M, n, self.view_width)
            weights, *views = self.map(part_name("modalities", part), shapes)
            self.weight_parts.append(weights)
            self.view_parts += views

    @classmethod
    def open(cls, place: str | Path, verify: bool = False) -> Self:
        """Open a folder that `export` wrote; one at an fsspec URL is copied to this machine first.

        Args:
            place: folder or URL.
            verify: compare every file with its hash even if this copy has been verified before.

        Raises:
            DataError: it is not a bundle, a file is missing, damaged or of another bundle, or an id is out of range.
        """
        for left in reversed(range(_TRIES)):
            directory = folder_of(place)
            manifest = read_manifest(directory)
            try:
                bundle = cls._open(directory, manifest, verify)
            except DataError:
                if not left or not _was_replaced(place, directory, manifest):
                    raise
            else:
                if not _was_replaced(place, directory, manifest):
                    return bundle
        raise DataError(f"{place}: it was replaced {_TRIES} times while it was opened; try again")

    @classmethod
    def _open(cls, directory: Path, manifest: dict[str, Any], verify: bool) -> Self:
        opened: list[Self] = []

        def check() -> None:
            from mocme_dist.data.manifests import checked
            from mocme_dist.serving.manifest import BundleManifest

            checked(BundleManifest, manifest, directory / MANIFEST, _AGAIN)
            parts = ShardPartition(manifest["num_entities"], manifest["part_rows"]).num_shards
            expected = part_files(min(parts, len(manifest["files"])))  # a manifest may claim any number of entities
            if missing := [name for name in expected if name not in manifest["files"]]:
                raise DataError(f"{(directory / MANIFEST).absolute()}: files: lacks {missing[0]}; {_AGAIN}")
            check_files(directory, manifest["files"], _AGAIN)
            opened.append(cls(directory, manifest))
            for known in (opened[0].known, *opened[0].known_in.values()):
                known.check(opened[0].num_entities, directory, _AGAIN)

        files = manifest.get("files")
        verify_once(directory, [MANIFEST, *(files if isinstance(files, dict) else ())], check, again=verify)
        return opened[0] if opened else cls(directory, manifest)

    def map(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[NDArray[Any]]:
        """Return tensors of a file after checking their shapes."""
        path = self.directory / name
        try:
            tensors = map_tensors(path)
            found = [tensors[key] for key in shapes]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({error}); {_AGAIN}") from None
        for (key, shape), value in zip(shapes.items(), found, strict=True):
            if value.shape != shape:
                raise DataError(f"{path.absolute()}: {key} has shape {value.shape}, expected {shape}; {_AGAIN}")
        return found

    def _map_if_there(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the tensors of an optional file."""
        path = self.directory / name
        try:
            return map_tensors(path) if self._has(name) else {}
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({error}); {_AGAIN}") from None

    def rows(self, parts: list[NDArray[Any]], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of any entities from mapped parts whose first axis is the entity, as float32."""
        ids = np.asarray(ids, np.int64)
        out = np.empty((len(ids), *parts[0].shape[1:]), np.float32)
        part = ids // self.partition.shard_rows
        for number in np.unique(part):
            here = part == number
            out[here] = parts[number][ids[here] - number * self.partition.shard_rows]
        return out

    @cached_property
    def unknown(self) -> NDArray[np.int64]:
        """Rows of the entities without any modality, ascending; the model knows nothing of them, so they rank last."""
        empty = [np.flatnonzero(~weight_nM.any(1)) for weight_nM in self.weight_parts]
        first = [self.partition.bounds(part)[0] for part in range(len(empty))]
        return np.concatenate([rows + start for rows, start in zip(empty, first, strict=True)])

    @cached_property
    def facts_of_train(self) -> Facts:
        """The facts of train by place; indexed on first use, in about 0.1 s per million facts."""
        return Facts(self.known_in["train"], self.num_entities)


def _was_replaced(place: str | Path, directory: Path, manifest: dict[str, Any]) -> bool:
    """Return whether `place` has another export by now, so that parts of both may have been opened."""
    try:
        now = folder_of(place)
        return now != directory or read_manifest(now) != manifest
    except DataError:
        return False
