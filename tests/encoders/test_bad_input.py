"""Bad shards, files that are too large and entities without features: counted, listed, judged.

Good parts come out as ever.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import part_path
from mocme_dist.encoders import extractor, pipeline
from mocme_dist.encoders.image import ImageEncoder
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import ConfigError, DataError, ShardError

COLUMNS = ("label", "description")
ALL = ("text", "image", "numeric")
CHEAP = ("text", "numeric")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def update(encoders, **values):
    return encoders.model_copy(update=values)


def test_a_missing_shard_is_left_out_as_well(packed, encoders):
    packed.shard_path(2).unlink()
    with pytest.raises(ShardError, match="shard not found"):
        extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    report = extract_features(packed, update(encoders, on_bad_shard="skip"), COLUMNS, ("text",), use_ray=False)
    assert report["n_skipped"] == 1 and "not found" in report["modalities"]["text"]["skipped_shards"][0]["reason"]


def test_files_above_the_limit_are_unread_counted_and_absent(packed, encoders, monkeypatch):
    full = extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    before = files_of(packed.directory / "features" / "text")
    # a limit of whole MiB is above all that a small test holds: count in units of 2 KiB instead
    real = Dataset.read_members
    monkeypatch.setattr(
        Dataset, "read_members", lambda self, shard, limit, modality: real(self, shard, limit // 512, modality)
    )
    report = extract_features(packed, update(encoders, max_member_mb=1), COLUMNS, ALL, use_ray=False)
    image = report["modalities"]["image"]
    assert image["failed"]["too large"] >= 2 and image["present"] < full["modalities"]["image"]["present"]
    assert any("bytes, the limit is encoders.max_member_mb" in example["message"] for example in image["examples"])
    text = {
        name: content
        for name, content in files_of(packed.directory / "features" / "text").items()
        if name.endswith("tensors")
    }
    assert text == {name: content for name, content in before.items() if name.endswith("tensors")}
    strict = update(encoders, max_member_mb=1, strict=True)
    with pytest.raises(DataError, match="too large"):
        extract_features(packed, strict, COLUMNS, ("image",), use_ray=False)


def test_an_error_that_no_decoder_foresaw_costs_one_file_and_not_the_job(packed, encoders, monkeypatch):
    real = ImageEncoder.decode

    def decode(self, members):
        if members == odd:
            raise ValueError("\ud800 in <object at 0x7f00>")
        return real(self, members)

    shard, member = next((shard, m) for shard in range(3) for m in packed.read_members(shard, 2**20, "image"))
    odd, record = {member.name: member.content}, packed.directory / "features" / "image" / f"part-{shard:06d}.json"
    before = extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)["modalities"]["image"]
    record.unlink()
    monkeypatch.setattr(ImageEncoder, "decode", decode)
    image = extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)["modalities"]["image"]
    assert sum(image["failed"].values()) >= sum(before["failed"].values()) and image["failed"]["undecodable"] == 1
    (example,) = [example for example in image["examples"] if example["cause"] == "undecodable"]
    assert "ValueError: " in example["message"] and "0x7f00" not in example["message"] and "ud800" in example["message"]
    record.unlink()
    with pytest.raises(DataError, match="ValueError"):
        extract_features(packed, update(encoders, strict=True), COLUMNS, ("image",), use_ray=False)


def test_a_run_of_some_modalities_keeps_and_counts_the_others(packed, encoders):
    whole = extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    again = extract_features(
        packed, encoders, COLUMNS, ("image",), False, max_missing=whole["missing"]["share"] + 0.001
    )
    assert again["missing"] == whole["missing"] and list(again["modalities"]) == list(whole["modalities"])
    assert again["modalities"]["text"] == whole["modalities"]["text"]
    assert again["modalities"]["image"]["parts"] == {"done": 0, "skipped": 3}
    assert again == json.loads((packed.directory / "extract_report.json").read_text())
    (packed.directory / "features" / "text" / "manifest.json").unlink()  # text is no longer finished
    less = extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)
    assert (
        list(less["modalities"]) == ["image", "numeric"] and less["missing"]["entities"] > whole["missing"]["entities"]
    )


def test_text_columns_that_are_not_there(packed, encoders, caplog):
    with pytest.raises(ConfigError, match=r"data.text_columns: .*'none'.*'label', 'description', 'note'"):
        extract_features(packed, encoders, ("none",), ("text",), use_ray=False)
    with caplog.at_level(logging.WARNING):
        extract_features(packed, encoders, ("label", "none"), ("text",), use_ray=False)
    assert "no column 'none'" in caplog.text


def test_unset_text_columns_are_all_there_are_a_label_first(packed, encoders):
    assert packed.text_columns() == ("label", "description", "note")
    packed.modalities["text"]["columns"] = ["note", "description", "label"]
    assert packed.text_columns() == ("label", "note", "description") and packed.text_columns(["note"]) == ("note",)
    extract_features(packed, encoders, ("label", "note", "description"), ("text",), use_ray=False)
    again = extract_features(packed, encoders, None, ("text",), use_ray=False)
    assert again["modalities"]["text"]["parts"]["done"] == 0


def test_a_modality_that_nobody_has_is_a_warning(packed, encoders, caplog):
    with caplog.at_level(logging.WARNING):
        extract_features(packed, encoders, ("note",), ("text",), use_ray=False)
    assert "text: not one entity has features" in caplog.text


def test_decoding_on_several_threads_gives_the_same_bytes(packed, encoders, monkeypatch):
    extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)
    folder = packed.directory / "features" / "image"
    expected = files_of(folder)
    folder.rename(packed.directory / "one thread")
    # the sums of a product depend on its threads; decoding must not
    monkeypatch.setattr(extractor.JobProcess, "threads", lambda self: nullcontext())
    found = extract_features(packed, update(encoders, cpus_per_actor=3), COLUMNS, ("image",), use_ray=False)
    assert files_of(folder) == expected and found["modalities"]["image"]["failed"] == {
        "not an image": 1,
        "truncated": 1,
    }


def test_a_part_finished_meanwhile_is_not_made_again(packed, encoders, monkeypatch):
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    before = files_of(packed.directory / "features")
    monkeypatch.setattr(
        pipeline, "_pending", lambda dataset, modality, pinned: [0, 1, 2]
    )  # what a run that began before believes
    report = extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    assert (
        report["modalities"]["text"]["parts"] == {"done": 0, "skipped": 3}
        and files_of(packed.directory / "features") == before
    )


def test_writing_a_finished_part_again_never_takes_its_record_away(packed, encoders, monkeypatch):
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    folder = packed.directory / "features" / "text"
    real, seen = Path.unlink, []
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok=False: (seen.append(path.name), real(path, missing_ok))[1]
    )
    for module in (pipeline, extractor):  # two actors on one shard at once
        monkeypatch.setattr(module, "part_is_complete", lambda *_: False)
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    assert not [name for name in seen if name.startswith("part-")]
    other = update(encoders, text=encoders.text.model_copy(update={"pooling": "cls"}))
    extract_features(packed, other, COLUMNS, ("text",), use_ray=False)
    assert "part-000000.json" in seen and part_path(folder, 0).is_file()


def test_memory_that_does_not_suffice_names_the_setting(packed, encoders, monkeypatch):
    def fails(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    monkeypatch.setattr("mocme_dist.encoders.text.TextEncoder.launch", fails)
    with pytest.raises(pipeline.ConfigError, match=r"CUDA out of memory.; lower encoders.text.batch_size"):
        extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
