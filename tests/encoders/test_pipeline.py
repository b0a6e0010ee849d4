"""Extraction of a whole data set: against a plain loop, twice, after changes, with bad files, and on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.encoders import pipeline
from mocme_dist.encoders.build import build_encoder
from mocme_dist.encoders.extractor import ShardExtractor
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.encoders.report import report_table
from mocme_dist.errors import ConfigError, DataError

COLUMNS = ("label", "description")
ALL = ("text", "image", "numeric")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plain_features(dataset: Dataset, modality: str, encoders, statistics) -> dict[int, np.ndarray]:
    """Every entity by itself: decode, encode one file at a time, average."""
    encoder = build_encoder(modality, encoders, COLUMNS, statistics)
    found = {}
    for shard in range(dataset.shards.num_shards):
        for sample in dataset.read_samples(shard, 2**20):
            members = {name: content for name, content in sample.members.items() if name.startswith(modality)}
            pieces = encoder.decode(members).pieces
            if pieces:
                found[sample.id] = np.mean([encoder.encode(encoder.collate([piece]))[0] for piece in pieces], axis=0)
    return found


def test_features_equal_a_plain_loop_over_entities(packed, encoders):
    encoders = encoders.model_copy(update={"dtype": "float32"})
    report = extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    stored = json.loads((packed.directory / "features" / "numeric" / "statistics.json").read_text())
    statistics = pipeline.NumericStatistics.from_json(stored)
    for modality in ALL:
        expected = plain_features(packed, modality, encoders, statistics)
        store = FeatureStore.open(packed.directory, modality, 0, packed.num_entities)
        assert set(np.flatnonzero(store.present().numpy())) == set(expected)
        values = store._values.numpy()
        assert np.allclose(values, [expected[i] for i in sorted(expected)], atol=2e-5)
        assert report["modalities"][modality]["present"] == len(expected)
    names = packed.entity_names()
    image = FeatureStore.open(packed.directory, "image", 0, packed.num_entities)
    assert {names[i] for i in np.flatnonzero(image.present().numpy())} == {"e0", "e1", "e2", "e3"}


def test_a_second_run_touches_nothing_and_reports_the_same(packed, encoders):
    first = extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    parts = sorted((packed.directory / "features").rglob("part-*"))
    times = [path.stat().st_mtime_ns for path in parts]
    second = extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    assert [path.stat().st_mtime_ns for path in parts] == times and len(parts) == 3 * 3 * 2
    for modality in ALL:
        assert second["modalities"][modality]["parts"] == {"done": 0, "skipped": 3}
        for key in ("width", "present", "failed", "examples", "bytes", "encoder_hash"):
            assert second["modalities"][modality][key] == first["modalities"][modality][key]


def test_only_missing_and_torn_parts_are_made_again_and_come_out_equal(packed, encoders):
    extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    folder = packed.directory / "features" / "text"
    before = files_of(folder)
    untouched = (folder / "part-000001.safetensors").stat().st_mtime_ns
    (folder / "part-000000.json").unlink()  # killed before it was done
    torn = folder / "part-000002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    report = extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    assert report["modalities"]["text"]["parts"] == {"done": 2, "skipped": 1}
    assert files_of(folder) == before and (folder / "part-000001.safetensors").stat().st_mtime_ns == untouched


def test_other_settings_make_all_parts_again(packed, encoders):
    extract_features(packed, encoders, COLUMNS, ("text", "numeric"), use_ray=False)
    cls = encoders.model_copy(update={"text": encoders.text.model_copy(update={"pooling": "cls"})})
    report = extract_features(packed, cls, COLUMNS, ("text", "numeric"), use_ray=False)
    assert report["modalities"]["text"]["parts"] == {"done": 3, "skipped": 0}
    assert report["modalities"]["numeric"]["parts"] == {"done": 0, "skipped": 3}
    one = encoders.model_copy(update={"numeric": encoders.numeric.model_copy(update={"max_attributes": 1})})
    assert extract_features(packed, one, COLUMNS, ("numeric",), use_ray=False)["modalities"]["numeric"]["width"] == 12
    plain = encoders.model_copy(update={"numeric": one.numeric.model_copy(update={"fourier": 0})})
    report = extract_features(packed, plain, COLUMNS, ("numeric",), use_ray=False)["modalities"]["numeric"]
    assert report["width"] == 2 and report["parts"] == {"done": 3, "skipped": 0}


def test_bad_files_are_counted_listed_and_absent(packed, encoders):
    report = extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)
    image = report["modalities"]["image"]
    assert image["failed"] == {"not an image": 1, "truncated": 1}
    assert {(example["name"], example["cause"]) for example in image["examples"]} == {
        ("e4", "truncated"),
        ("e5", "not an image"),
    }
    assert image["present"] == 4 and image["samples"] == 6
    assert json.loads((packed.directory / "extract_report.json").read_text()) == report
    assert "truncated 1" in report_table(report)


def test_strict_stops_at_a_bad_file_found_now_or_before(packed, encoders):
    strict = encoders.model_copy(update={"strict": True})
    for _ in range(2):
        with pytest.raises(DataError, match=r"encoders\.strict=false counts it as absent"):
            extract_features(packed, strict, COLUMNS, ("image",), use_ray=False)
        extract_features(packed, encoders, COLUMNS, ("image",), use_ray=False)


def test_features_beyond_float16_are_absent_with_a_cause(packed, encoders, monkeypatch):
    monkeypatch.setattr(
        "mocme_dist.encoders.text.TextEncoder.launch",
        lambda self, batch: lambda: np.full((len(batch), self.width), 1e6, np.float32),
    )
    text = extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)["modalities"]["text"]
    assert text["present"] == 0 and text["failed"] == {"not finite": text["samples"]}


def test_a_shard_with_no_sample_of_the_modality_gives_an_empty_part(packed, encoders):
    extract_features(packed, encoders, ("note",), ("text",), use_ray=False)
    for shard, rows in enumerate((8, 8, 7)):
        part = load_file(packed.directory / "features" / "text" / f"part-{shard:06d}.safetensors")
        assert part["values"].shape == (0, 32) and part["present"].tolist() == [0] * rows


def test_a_changed_shard_stops_with_its_name(packed, encoders):
    path = packed.shard_path(1)
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"entities-000001.tar.*pack it again"):
        extract_features(packed, encoders, COLUMNS, ("text",), use_ray=False)
    assert not (packed.directory / "features" / "text" / "manifest.json").exists()


def test_an_unknown_modality_names_what_there_is(packed, encoders):
    with pytest.raises(ConfigError, match="it has text, image, numeric"):
        extract_features(packed, encoders, COLUMNS, ("audio",), use_ray=False)


def test_a_part_made_on_a_node_with_other_weights_is_refused(packed, encoders):
    extractor = ShardExtractor(packed.directory, encoders, COLUMNS, None, {"text": "0" * 64})
    result = extractor.do({"kind": "text", "shard": 0})
    assert result["error"] == "DataError" and "bring the same files to every node" in result["message"]


@pytest.mark.ray
@pytest.mark.slow
def test_actors_write_the_bytes_of_the_plain_loop(packed, encoders, ray_session, monkeypatch):
    extract_features(packed, encoders, COLUMNS, ALL, use_ray=False)
    folder = packed.directory / "features"
    expected = files_of(folder)
    folder.rename(packed.directory / "plain")
    monkeypatch.setattr(pipeline, "READ_HERE_BYTES", 0)  # statistics on actors as well
    report = extract_features(packed, encoders, COLUMNS, ALL, use_ray=True)
    assert files_of(folder) == expected
    assert all(row["parts"] == {"done": 3, "skipped": 0} for row in report["modalities"].values())
    strict = encoders.model_copy(update={"strict": True, "max_pixels": 1000})
    # several shards hold bad pictures; whichever actor is first stops the job
    with pytest.raises(DataError, match=r"entity \d+: image: (too large|not an image): .*encoders\.strict=false"):
        extract_features(packed, strict, COLUMNS, ("image",), use_ray=True)


def test_statistics_do_not_depend_on_which_shard_is_ready_first(packed, encoders, monkeypatch):
    monkeypatch.setattr("mocme_dist.encoders.numeric.SAMPLE", 3)  # the first values count, so the order matters
    expected = pipeline._numeric_statistics(packed, encoders, COLUMNS, use_ray=False)
    (packed.directory / "features" / "numeric" / "statistics.json").unlink()
    run, order = pipeline.run_tasks, []

    def last_first(*arguments):
        results = sorted(run(*arguments), key=lambda result: -result["shard"])
        order.extend(result["shard"] for result in results)
        return iter(results)

    monkeypatch.setattr(pipeline, "run_tasks", last_first)
    assert pipeline._numeric_statistics(packed, encoders, COLUMNS, use_ray=False) == expected
    assert order == sorted(order, reverse=True) and len(order) > 1
