"""Writes the graph folder of a packed data set: names, triples and known answers, and the data set's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mocme_dist.data.files import atomic_path, sha256_file
from mocme_dist.data.known import KnownAnswers
from mocme_dist.data.triples import Integers
from mocme_dist.data.vocabulary import write_names


def write_graph(
    graph: Path,
    splits: Mapping[str, Integers],
    everything_T3: Integers,
    entity_names: list[bytes],
    relation_names: list[bytes],
) -> None:
    """Write names, each split, and the answers known from train alone and from `everything_T3`.

    Args:
        graph: the folder.
        splits: (n, 3) distinct triples of train, valid and test as ids.
        everything_T3: triples of all splits, for filtered ranking.
        entity_names, relation_names: UTF-8, by id.
    """
    write_names(graph / "entities.parquet", entity_names)
    write_names(graph / "relations.parquet", relation_names)
    for split, triples in splits.items():
        with atomic_path(graph / f"{split}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, triples, allow_pickle=False)
    KnownAnswers.build(splits["train"], len(relation_names)).save(graph, "train")
    KnownAnswers.build(everything_T3, len(relation_names)).save(graph, "all")


def fingerprint(graph: Path, names: tuple[list[bytes], list[bytes]], shard_hashes: list[str]) -> str:
    """Return the SHA-256 over names, arrays and shards.

    Names as bytes, because Parquet differs between library versions.
    """
    content = {path.name: sha256_file(path) for path in sorted(graph.glob("*.npy"))}
    for kind, several in zip(("entities", "relations"), names, strict=True):
        digest = hashlib.sha256()
        for name in several:
            digest.update(name + b"\n")
        content[kind] = digest.hexdigest()
    return hashlib.sha256(json.dumps([content, shard_hashes], sort_keys=True).encode()).hexdigest()
