"""Imported vectors become feature parts as they are, without the encoder of their modality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from raw_media import write_raw

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.build import VectorEncoder
from mocme_dist.encoders.encoder import Failure
from mocme_dist.encoders.pipeline import extract_features

# no weights of VGG16 are at hand: computing would stop with an error
ENCODERS = EncodersConfig(dtype="float32")


def raw_with_vectors(folder: Path, seed: int = 0) -> tuple[Path, np.ndarray]:
    """Vectors for e0 ... e9; e3 is NaN, e4 infinite in half precision only, e5 zeros."""
    raw = write_raw(folder)
    values = np.random.default_rng(seed).normal(size=(10, 7))
    values[3, 2], values[4, 0], values[5] = np.nan, 1e6, 0.0
    (raw / "features").mkdir()
    for modality in ("image", "numeric"):
        np.save(raw / "features" / f"{modality}.npy", values)
        (raw / "features" / f"{modality}.ids").write_text("".join(f"e{i}\n" for i in range(10)))
    return raw, values


def pack(raw: Path, out: Path):
    return pack_folder(raw, out, DataConfig(shard_rows=8, unseen="keep"))


def test_parts_hold_the_vectors_and_bad_rows_are_counted(tmp_path):
    raw, values = raw_with_vectors(tmp_path / "raw")
    dataset = pack(raw, tmp_path / "out")
    report = extract_features(dataset, ENCODERS, ("label",), ("image", "numeric"), use_ray=False)["modalities"]
    names = dataset.entity_names()
    for modality in ("image", "numeric"):
        store = FeatureStore.open(dataset.directory, modality, 0, dataset.num_entities)
        found, present = store.gather(torch.arange(dataset.num_entities))
        assert {names[i] for i in np.flatnonzero(present)} == {f"e{i}" for i in range(10)} - {"e3", "e5"}
        for i in (0, 1, 2, 4, 6, 7, 8, 9):
            assert np.array_equal(found[names.index(f"e{i}")].numpy(), values[i].astype(np.float32))
        assert report[modality]["failed"] == {"not finite": 1} and report[modality]["width"] == 7
        assert [example["name"] for example in report[modality]["examples"]] == ["e3"]
    half = extract_features(dataset, EncodersConfig(), ("label",), ("image",), use_ray=False)["modalities"]["image"]
    assert half["present"] == 7 and half["failed"] == {"not finite": 2}


def test_a_changed_file_is_imported_again_and_an_unchanged_one_is_not(tmp_path):
    raw, _ = raw_with_vectors(tmp_path / "raw")
    first = pack(raw, tmp_path / "first")
    extract_features(first, ENCODERS, ("label",), ("image", "numeric"), use_ray=False)
    other = np.load(raw / "features" / "image.npy")
    other[0] += 1
    np.save(raw / "features" / "image.npy", other)
    second = pack(raw, tmp_path / "second")
    (first.directory / "features").rename(second.directory / "features")
    report = extract_features(second, ENCODERS, ("label",), ("image", "numeric"), use_ray=False)["modalities"]
    assert report["image"]["parts"]["done"] == 3  # its settings hold the file's hash
    assert report["numeric"]["parts"]["done"] == 1  # the shard of e0 holds another picture vector
    again = extract_features(second, ENCODERS, ("label",), ("image", "numeric"), use_ray=False)["modalities"]
    assert all(row["parts"]["done"] == 0 for row in again.values())
    store = FeatureStore.open(second.directory, "image", 0, second.num_entities)
    assert np.array_equal(
        store.gather(torch.tensor([second.entity_names().index("e0")]))[0][0], other[0].astype(np.float32)
    )


def test_a_member_of_another_length_is_a_failure():
    encoder = VectorEncoder("audio", {"file": "audio.npy", "sha256": "0", "width": 3})
    assert encoder.decode({"audio.f32": bytes(11)}).failures == [Failure("wrong length", "11 bytes, expected 12")]
    assert encoder.decode({}).pieces == [] and encoder.decode({"audio.0.wav": b"x"}).pieces == []
