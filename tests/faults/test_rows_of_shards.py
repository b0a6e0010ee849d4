"""Rows 24 to 28, 30, 42 and 44 of the fault matrix: shards, pictures and features that are damaged,
malicious or stale.
"""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kill_points import tree
from raw_edits import pack
from tars import LIMIT, read, write_tar

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.shards import write_shard
from mocme_dist.encoders import pipeline
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.encoders.report import report_table
from mocme_dist.errors import DataError, ShardError

COLUMNS = ("label", "description")
CHEAP = ("text", "numeric")


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[600] ^= 1
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "inside a member": lambda c: c[:700],
    "inside a header": lambda c: c[:300],
    "at a boundary": lambda c: c[:1024],
    "zero bytes": lambda c: b"",
    "garbage": lambda c: b"garbage!" * (len(c) // 8),
    "one bit": flip,
}


def update(encoders, **values):
    return encoders.model_copy(update=values)


@pytest.mark.parametrize("damage", DAMAGES)
def test_row_24_a_bad_shard_stops_the_job_or_is_left_out_and_tried_again(packed, encoders, damage, caplog):
    extract_features(packed, encoders, COLUMNS, CHEAP, use_ray=False)
    features = packed.directory / "features"
    expected = tree(features)
    for path in features.rglob("*"):
        if path.is_file():
            path.unlink()
    shard = packed.shard_path(1)
    content = shard.read_bytes()
    shard.write_bytes(DAMAGES[damage](content))
    sizes = rf"{len(DAMAGES[damage](content)):,} bytes, the manifest says {len(content):,}"
    with pytest.raises(
        ShardError,
        match=rf"entities-000001.tar: .*{sizes}; \d whole samples, the manifest says 7; sha256 .*bad-shard=skip",
    ):
        extract_features(packed, encoders, COLUMNS, CHEAP, use_ray=False)
    assert ShardError.exit_code == 3 and not list(features.rglob("manifest.json"))

    with caplog.at_level(logging.WARNING):
        report = extract_features(packed, update(encoders, on_bad_shard="skip"), COLUMNS, CHEAP, use_ray=False)
    assert report["n_skipped"] == 1 and report == json.loads((packed.directory / "extract_report.json").read_text())
    for modality in CHEAP:
        (entry,) = report["modalities"][modality]["skipped_shards"]
        assert (entry["shard"], entry["file"]) == (1, "entities-000001.tar") and "sha256" in entry["reason"]
        present = FeatureStore.open(packed.directory, modality, 0, packed.num_entities).present().numpy()
        assert not present[8:16].any() and present[:8].any()
    assert "left out: entities-000001.tar" in report_table(report) and "left out" in caplog.text
    assert "shard 1 could not be read" in caplog.text  # the store says so as well

    shard.write_bytes(content)
    mended = extract_features(packed, encoders, COLUMNS, CHEAP, use_ray=False)
    assert tree(features) == expected and mended["n_skipped"] == 0
    assert mended["modalities"]["text"]["parts"] == {"done": 1, "skipped": 2}


def test_row_30_entities_without_features_are_reported_and_limited(packed, encoders):
    present = np.zeros(packed.num_entities, dtype=bool)
    report = extract_features(packed, encoders, COLUMNS, ("image", "numeric"), use_ray=False)
    for modality in ("image", "numeric"):
        present |= FeatureStore.open(packed.directory, modality, 0, packed.num_entities).present().numpy()
    missing = int((~present).sum())
    assert report["missing"] == {"entities": missing, "of": 23, "share": round(missing / 23, 6)} and missing > 0
    assert f"{missing} of 23 entities have no features" in report_table(report)
    extract_features(packed, encoders, COLUMNS, ("image", "numeric"), False, max_missing=missing / 23)
    with pytest.raises(
        DataError, match=rf"{missing} of 23 entities have no features \(.* %\); expected at most 1 %.*--max-missing"
    ):
        extract_features(packed, encoders, COLUMNS, ("image", "numeric"), False, max_missing=0.01)


def test_row_42_two_runs_with_other_settings_do_not_mix(packed, encoders, monkeypatch):
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    other = update(encoders, text=encoders.text.model_copy(update={"pooling": "cls"}))
    monkeypatch.setattr(
        pipeline, "_pending", lambda dataset, modality, pinned: [0]
    )  # the other run overwrote the rest meanwhile
    with pytest.raises(DataError, match=r"encoder_hash [0-9a-f]{12}, this run's is [0-9a-f]{12}; another run"):
        extract_features(packed, other, COLUMNS, ("text",), use_ray=False)


def test_row_26_a_large_member_is_left_unread(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("000000000001.text.json", b"x" * 2000)])
    (sample,) = read(path, limit=1999)
    assert sample.members == {} and sample.oversized == {"text.json": 2000}
    assert read(path, limit=2000)[0].members == {"text.json": b"x" * 2000}
    # A header may claim anything; nothing of that size is there.
    info = tarfile.TarInfo("000000000001.text.json")
    info.size = 1 << 30
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"x" * 1024)
    for limit in (LIMIT, 1 << 31):
        with pytest.raises(ShardError, match=r"has 1,073,741,824 bytes, the file ends before; the shard is cut"):
            read(path, limit=limit)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["000000000001.text.json", "000000000002.text.json", "000000000001.numeric.json"],
            r"byte 2048: key 000000000001 comes back, it began at byte 0",
        ),
        (["000000000001.text.json", "000000000001.text.json"], r"byte 1024: '000000000001.text.json' is there twice"),
        (["000000000002.text.json", "000000000001.text.json"], r"expected ascending keys"),
    ],
)
def test_row_27_keys_that_come_twice_are_named_with_both_places(tmp_path, names, message):
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(DataError, match=message):
        read(path)


def test_row_27_a_key_of_another_shard_is_refused(packed):
    """Although the manifest vouches for the file: no entity lies in two shards."""
    packed.entries[1] = write_shard(packed.shard_path(1), list(packed.read_samples(0, LIMIT)))
    with pytest.raises(ShardError, match=r"entities-000001.tar: key 0{11}\d lies outside the shard's ids \[8, 16\)"):
        list(packed.read_samples(1, LIMIT))


@pytest.mark.parametrize(
    "name",
    [
        "../../000000000001.text.json",
        "/etc/passwd",
        "000000000001.text.pkl",
        "000000000001.image.0.pyd",
        "000000000001.image.0.PNG",
        "1.text.json",
        "m.027rn.jpg",
        "000000000001.text.json\n",
    ],
)
def test_row_28_members_of_other_names_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [(name, b"x")])
    with pytest.raises(DataError, match=r"does not belong in a shard"):
        read(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_row_28_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [("000000000001.text.json", b"")], kind, "/etc/passwd")
    with pytest.raises(DataError, match="not a plain file"):
        read(path)


def test_row_28_a_pipe_is_a_file_name_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="shard not found"):
        read(Path("pipe:touch sentinel"))
    assert not (tmp_path / "sentinel").exists()


def test_row_42_a_changed_shard_is_made_again_and_the_others_are_not(raw_copy, tiny_dataset, tmp_path, encoders):
    old = Dataset.open(Path(shutil.copytree(tiny_dataset, tmp_path / "old")))
    extract_features(old, encoders, ("label",), CHEAP, use_ray=False)
    text = (raw_copy / "text.tsv").read_text().replace("label of item 07", "another label")
    (raw_copy / "text.tsv").write_text(text)
    new = pack(raw_copy, tmp_path / "new")
    changed = [shard for shard, entry in enumerate(new.entries) if entry.sha256 != old.entries[shard].sha256]
    assert len(changed) == 1
    undisturbed = extract_features(new, encoders, ("label",), CHEAP, use_ray=False)
    expected = tree(new.directory / "features")
    shutil.rmtree(new.directory / "features")
    shutil.copytree(old.directory / "features", new.directory / "features")
    report = extract_features(new, encoders, ("label",), CHEAP, use_ray=False)
    shards = len(new.entries)
    assert all(report["modalities"][name]["parts"] == {"done": 1, "skipped": shards - 1} for name in CHEAP)
    assert tree(new.directory / "features") == expected and undisturbed["missing"] == report["missing"]


def test_row_42_a_part_of_another_encoder_is_refused_with_both_hashes(packed, encoders):
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    folder = packed.directory / "features" / "text"
    mine = tree(folder)
    other = update(encoders, text=encoders.text.model_copy(update={"pooling": "cls"}))
    extract_features(packed, other, COLUMNS, ("text",), use_ray=False)
    for name, content in mine.items():
        if "000001" in name:
            (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"part-000001.*[0-9a-f]{12}.*[0-9a-f]{12}"):
        FeatureStore.open(packed.directory, "text", 0, packed.num_entities)
    report = extract_features(packed, other, COLUMNS, ("text",), use_ray=False)
    assert report["modalities"]["text"]["parts"] == {"done": 1, "skipped": 2}
