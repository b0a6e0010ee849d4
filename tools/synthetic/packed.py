"""Writes a planted graph as a packed data set with its features, without raw text on the way.

What pack and extract would leave: graph, shards (empty ones: no entity has raw content), feature parts and manifests.
Memory is the triples as integers, and the names.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.data.dataset import FORMAT, MANIFEST, Dataset
from mocme_dist.data.feature_parts import write_part
from mocme_dist.data.files import file_entry, write_json
from mocme_dist.data.graph import fingerprint, write_graph
from mocme_dist.data.shards import ShardEntry, shard_name, write_shard
from mocme_dist.data.triples import KeySpace, distinct
from mocme_dist.encoders.report import finish_modality
from mocme_dist.partition import ShardPartition
from tools.synthetic.planted import SPLITS, Integers, Modality, Planted
from tools.synthetic.truth import write_truth

ENCODER = "planted"


def write_packed(folder: Path, graph: Planted, shard_rows: int) -> Dataset:
    """The data set, and truth/ with the factors by id."""
    # A contiguous range of ids is a random sample, as pack makes it.
    entity_of_id = np.random.default_rng([graph.seed, 3]).permutation(graph.num_entities)
    names = (
        [b"e%d" % entity for entity in entity_of_id.tolist()],
        [b"r%d" % relation for relation in range(graph.num_relations)],
    )
    sizes = _write_triples(folder / "graph", graph, entity_of_id, names)
    partition = ShardPartition(graph.num_entities, shard_rows)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    entries = [write_shard(folder / "shards" / shard_name(shard), []) for shard in range(partition.num_shards)]
    counts = {
        m.name: _write_parts(folder / "features" / m.name, graph, m, entity_of_id, partition, entries)
        for m in graph.modalities
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "num_entities": graph.num_entities,
        "num_relations": graph.num_relations,
        "shard_rows": shard_rows,
        "seed": graph.seed,
        "dev": "file",
        "splits": sizes,
        "modalities": {name: {"entities": count} for name, count in counts.items()},
        "shards": [asdict(entry) for entry in entries],
        "graph": {path.name: file_entry(path) for path in sorted((folder / "graph").iterdir())},
        "report": {"made_by": "tools.make_synthetic"},
        "fingerprint": fingerprint(folder / "graph", names, [entry.sha256 for entry in entries]),
    }
    write_json(folder / MANIFEST, manifest)
    dataset = Dataset.open(folder)
    for modality in graph.modalities:
        settings = {"encoder": ENCODER, "shows": modality.factor, "noise": modality.noise}
        finish_modality(dataset, modality.name, settings, ENCODER, EncodersConfig())
    write_truth(folder / "truth", graph, entity_of_id)
    return dataset


def _write_triples(
    folder: Path, graph: Planted, entity_of_id: Integers, names: tuple[list[bytes], list[bytes]]
) -> dict[str, int]:
    """Each split as ids, freed of repetitions; how many there are."""
    id_of_entity = np.empty_like(entity_of_id)
    id_of_entity[entity_of_id] = np.arange(len(entity_of_id))
    pieces: dict[str, list[Integers]] = {split: [] for split in SPLITS}
    for triples_T3, split_T in graph.chunks():
        triples_T3[:, 0], triples_T3[:, 2] = id_of_entity[triples_T3[:, 0]], id_of_entity[triples_T3[:, 2]]
        for number, split in enumerate(SPLITS):
            pieces[split].append(triples_T3[split_T == number])
    keys = KeySpace(graph.num_entities, graph.num_relations)
    splits = {split: distinct(np.concatenate(pieces.pop(split)), keys) for split in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(folder, splits, np.concatenate(list(splits.values())), *names)
    return {split: len(triples) for split, triples in splits.items()}


def _write_parts(
    directory: Path,
    graph: Planted,
    modality: Modality,
    entity_of_id: Integers,
    partition: ShardPartition,
    entries: list[ShardEntry],
) -> int:
    """A modality's parts; how many entities have it."""
    total = 0
    for shard, entry in enumerate(entries):
        first, last = partition.bounds(shard)
        entity = entity_of_id[first:last]
        present = graph.present(modality, entity)
        stats = {"failed": {}, "examples": [], "input_sha256": entry.sha256, "encoder_hash": ENCODER}
        write_part(directory, shard, graph.features(modality, entity[present], shard), present, stats)
        total += int(present.sum())
    return total
