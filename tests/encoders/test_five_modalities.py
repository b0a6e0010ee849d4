"""Sounds and films through pack and extract: every bad file is counted by its cause and absent, and the job goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from raw_media import SOUNDS, animation, film, picture, png_header, sound, write_raw
from safetensors.numpy import load_file

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.build import build_encoder, encoder_settings
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import DataError

GREYS = [10 * i for i in range(12)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Entities e0 ...: good sounds of every kind and films, e10 to e17 bad ones, e1 two sounds and two films."""
    folder = tmp_path_factory.mktemp("media")
    raw = write_raw(folder / "raw")
    wav = sound("wav")
    audio = {f"e{i}": [(kind, sound(kind, 200.0 * (i + 1)))] for i, kind in enumerate(SOUNDS)}
    audio["e1"] += [("wav", sound("wav", 900.0))]
    audio |= {
        "e10": [("wav", b"")],
        "e11": [("ogg", sound("ogg")[:-50])],
        "e12": [("mp3", b"<html>404</html>")],
        "e13": [("flac", wav)],  # a wrong suffix is no harm
        "e14": [("wav", sound("wav", seconds=4.0))],  # too long
        "e15": [("mp3", b"ID3" + bytes(400))],
        "e16": [("wav", wav[: len(wav) // 2]), ("wav", wav)],  # one of two is good
    }
    video = {
        "e0": [("mp4", film("mp4", GREYS))],
        "e1": [("webp", animation("WEBP", GREYS)), ("gif", animation("GIF", GREYS[:2]))],
    }
    video |= {
        "e10": [("mp4", b"")],
        "e11": [("mp4", film("mp4", GREYS)[:-9])],
        "e12": [("webm", b"garbage" * 99)],
        "e13": [("mp4", animation("WEBP", GREYS))],
        "e14": [("gif", animation("GIF", list(range(60))))],  # too long
        "e15": [("png", png_header(50_000, 50_000))],
        "e16": [("mkv", film("mkv", GREYS))],
        "e17": [("webp", picture(0, kind="WEBP"))],
    }
    for modality, files in (("audio", audio), ("video", video)):
        rows = ["entity\tfile\n"]
        for entity, several in files.items():
            for number, (suffix, content) in enumerate(several):
                (raw / f"{modality}_{entity}_{number}.{suffix}").write_bytes(content)
                rows.append(f"{entity}\t{modality}_{entity}_{number}.{suffix}\n")
        (raw / f"{modality}.tsv").write_text("".join(rows))
    return pack_folder(raw, folder / "dataset", DataConfig(shard_rows=8, unseen="keep"))


@pytest.fixture
def small(encoders):
    """Encoders of the tests with limits that some of the files break, and float32 on disk."""
    audio, video = (
        encoders.audio.model_copy(update={"max_seconds": 3.0}),
        encoders.video.model_copy(update={"max_frames": 50, "frames": 4}),
    )
    return encoders.model_copy(update={"audio": audio, "video": video, "max_pixels": 100_000, "dtype": "float32"})


def test_bad_sounds_and_films_are_counted_absent_and_never_stop_the_job(dataset, small):
    report = extract_features(dataset, small, ("label",), ("audio", "video"), use_ray=False)["modalities"]
    assert report["audio"]["failed"] == {
        "empty file": 1,
        "not audio": 1,
        "too long": 1,
        "truncated": 2,
        "undecodable": 1,
    }
    assert report["video"]["failed"] == {
        "empty file": 1,
        "not a video": 1,
        "too large": 1,
        "too long": 1,
        "truncated": 1,
    }
    names = dataset.entity_names()
    present = {}
    for modality in ("audio", "video"):
        store = FeatureStore.open(dataset.directory, modality, 0, dataset.num_entities)
        present[modality] = {names[i] for i in np.flatnonzero(store.present().numpy())}
        found = {example["name"]: example["cause"] for example in report[modality]["examples"]}
        assert {name for name in found if found[name] != "truncated"} & present[modality] == set()
        encoder = build_encoder(modality, small, ("label",), None)
        assert encoder.settings == encoder_settings(modality, small, ("label",), None)
        # the plain twin: every entity by itself, one file at a time
        for shard in range(dataset.shards.num_shards):
            for sample in dataset.read_samples(shard, 2**20):
                members = {name: content for name, content in sample.members.items() if name.startswith(modality)}
                pieces = encoder.decode(members).pieces
                assert bool(pieces) == (names[sample.id] in present[modality])
                if pieces:
                    expected = np.mean([encoder.encode(encoder.collate([piece]))[0] for piece in pieces], axis=0)
                    row = store.gather(torch.tensor([sample.id]))[0][0].numpy()
                    assert np.allclose(row, expected, atol=1e-4)
    assert present["audio"] == {"e0", "e1", "e2", "e3", "e4", "e13", "e16"}
    assert present["video"] == {"e0", "e1", "e13", "e16", "e17"}


def test_a_rerun_changes_no_byte_and_other_frames_change_films_only(dataset, small):
    extract_features(dataset, small, ("label",), ("audio", "video"), use_ray=False)
    parts = sorted((dataset.directory / "features").rglob("part-*"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts}
    again = extract_features(dataset, small, ("label",), ("audio", "video"), use_ray=False)["modalities"]
    assert all(row["parts"] == {"done": 0, "skipped": 3} for row in again.values())
    for path in parts:
        path.unlink()
    extract_features(dataset, small, ("label",), ("audio", "video"), use_ray=False)
    assert {path: path.read_bytes() for path in parts} == {path: content for path, (content, _) in before.items()}
    fewer = small.model_copy(update={"video": small.video.model_copy(update={"frames": 2})})
    other = extract_features(dataset, fewer, ("label",), ("audio", "video"), use_ray=False)["modalities"]
    assert other["audio"]["parts"]["done"] == 0 and other["video"]["parts"]["done"] == 3
    assert load_file(parts[-1])["values"].shape[1] == 2 * 512


def test_strict_names_the_entity_and_the_cause(dataset, small):
    strict = small.model_copy(update={"strict": True})
    with pytest.raises(DataError, match=r"entity \d+: video: .*encoders\.strict=false"):
        extract_features(dataset, strict, ("label",), ("video",), use_ray=False)
