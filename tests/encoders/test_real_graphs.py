"""Small cuts of real graphs with pictures, texts, numbers, sounds and films, through pack and extract."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mocme_dist.config import load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.pipeline import extract_features

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TABLES = ("text", "numeric", "images", "audio", "video")
GRAPHS = {
    "emojikg": {"text": 384, "image": 1280, "numeric": 7 * 12, "video": 2560},
    "stampkg": {"text": 384, "image": 1280, "audio": 256},
    "worldfacts": {"text": 384, "image": 1280, "numeric": None},
}


def lines_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf8").splitlines()]


def cut(source: Path, out: Path, count: int = 8) -> Path:
    """A raw folder of the first entities of every media table, the ends of some valid and test triples, and their
    links.
    """
    splits = {split: lines_of(source / f"{split}.txt") for split in ("train", "valid", "test")}
    tables = {name: lines_of(source / f"{name}.tsv") for name in TABLES if (source / f"{name}.tsv").is_file()}
    chosen = {row[0] for name in tables if name not in ("text", "numeric") for row in tables[name][1 : 1 + count]}
    chosen |= {triple[end] for split in ("valid", "test") for triple in splits[split][:2] for end in (0, 2)}
    for entity in sorted(chosen):
        triple = next((triple for triple in splits["train"] if entity in (triple[0], triple[2])), None)
        chosen |= {triple[0], triple[2]} if triple else set()
    out.mkdir()
    for split, triples in splits.items():
        kept = ["\t".join(triple) + "\n" for triple in triples if triple[0] in chosen and triple[2] in chosen]
        (out / f"{split}.txt").write_text("".join(kept), encoding="utf8")
    for name, (header, *rows) in tables.items():
        kept = [row for row in rows if row[0] in chosen]
        (out / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [header, *kept]), encoding="utf8")
        for row in kept if name not in ("text", "numeric") else ():
            (out / row[1]).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / row[1], out / row[1])
    return out


def features(dataset: Dataset, modality: str) -> tuple[np.ndarray, list[str]]:
    """Values of those present, and who they are."""
    store = FeatureStore.open(dataset.directory, modality, 0, dataset.num_entities)
    values, present = store.gather(torch.arange(dataset.num_entities))
    names = dataset.entity_names()
    return values[present].numpy(), [names[i] for i in np.flatnonzero(present)]


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_real_graphs_pack_and_extract_with_real_encoders(shared_data, tmp_path, name):
    config = load_config([CONFIGS / f"{name}.yaml"], ["data.shard_rows=16", "data.unseen=keep"])
    raw = cut(shared_data(name), tmp_path / "raw")
    dataset = pack_folder(raw, tmp_path / "dataset", config.data)
    assert 15 < dataset.num_entities < 90 and dataset.shards.num_shards > 1
    wanted = [modality for modality in config.modalities if modality != "structure"]
    assert wanted == list(GRAPHS[name]) and set(wanted) == set(dataset.modalities)
    report = extract_features(dataset, config.encoders, config.data.text_columns, wanted, use_ray=False)["modalities"]
    for modality, width in GRAPHS[name].items():
        assert (
            report[modality]["failed"] == {}
            and report[modality]["present"] == dataset.modalities[modality]["entities"] >= 5
        )
        values, _ = features(dataset, modality)
        assert values.shape[1] == (width or values.shape[1]) and np.isfinite(values).all()
        different = np.unique(values, axis=0)
        # two entities may share a number or a name, but hardly a picture, a sound or a film
        assert len(different) > (0.9 if modality in ("image", "audio", "video") else 0.3) * len(values), modality
    first = {path: path.read_bytes() for path in sorted((dataset.directory / "features").rglob("part-*"))}
    for path in first:
        path.unlink()
    extract_features(dataset, config.encoders, config.data.text_columns, wanted, use_ray=False)
    assert {path: path.read_bytes() for path in first} == first
