"""Decoding and encoding in two pools of actors: the bytes of one process, bounded work in between, and errors."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from test_pipeline import files_of

from mocme_dist.data.dataset import Dataset
from mocme_dist.encoders import extractor as halves
from mocme_dist.encoders.build import NETWORKS, build_decoder, build_encoder
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.extractor import SegmentEncoder, ShardDecoder, ShardExtractor
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.encoders.pools import write_parts
from mocme_dist.errors import DataError

COLUMNS = ("label", "description")
MODALITIES = ("text", "image", "numeric")


@pytest.fixture
def float32(encoders):
    return encoders.model_copy(update={"dtype": "float32"})


def job_of(packed: Dataset, encoders, modality: str):
    encoder = build_encoder(modality, encoders, COLUMNS, None)
    return packed.place, encoders, COLUMNS, None, {modality: encoder_hash(modality, encoder.settings, encoders)}


def through_halves(packed: Dataset, encoders, modality: str, shuffled: bool = True):
    """Both halves and the driver's part of two pools, in this process; segments arrive in any order."""
    job = job_of(packed, encoders, modality)
    decoder = ShardDecoder(*job)
    encoder = SegmentEncoder(*job)
    segments = [
        (segment, encoder.encode(segment, chunks))
        for shard in range(packed.shards.num_shards)
        for segment, chunks in decoder.segments({"kind": modality, "shard": shard})
    ]
    if shuffled:
        random.Random(0).shuffle(segments)
    rows: list[int] = []
    results = list(write_parts(segments, ShardExtractor(*job), rows.append))
    return segments, results, rows


@pytest.mark.parametrize("modality", ["text", "image"])
def test_segments_in_any_order_give_the_bytes_of_whole_shards(packed, float32, modality, monkeypatch):
    report = extract_features(packed, float32, COLUMNS, (modality,), use_ray=False)["modalities"][modality]
    folder = packed.directory / "features" / modality
    expected = {name: content for name, content in files_of(folder).items() if name.startswith("part-")}
    folder.rename(packed.directory / "plain")
    monkeypatch.setattr(halves, "SEGMENT_BYTES", 1)  # every chunk travels by itself
    segments, results, rows = through_halves(packed, float32, modality)
    assert files_of(folder) == expected
    assert sum(rows) == packed.num_entities
    assert sum(result["samples"] for result in results) == report["samples"]
    if modality == "image":  # 4 images of chunks of 2 are more segments than shards
        assert len(segments) > packed.shards.num_shards
    again, results, _ = through_halves(packed, float32, modality)
    assert all(result["already"] for result in results) and all(not features for _, features in again)


def test_decoders_need_no_network_and_give_the_batches_of_encoders(packed, encoders):
    members = {
        name: content
        for sample in packed.read_samples(0, 2**20)
        for name, content in sample.members.items()
        if name.startswith(("text.", "image."))
    }
    for modality in NETWORKS:
        encoder = build_encoder(modality, encoders, COLUMNS, None)
        decoder = build_decoder(modality, encoders, COLUMNS)
        assert (decoder.modality, decoder.chunk) == (encoder.modality, encoder.chunk)
        assert not hasattr(decoder, "encode")
        own = {name: content for name, content in members.items() if name.startswith(f"{modality}.")}
        if own:
            pieces = [made.decode(own).pieces for made in (decoder, encoder)]
            assert np.array_equal(
                *(made.collate(list(found)) for made, found in zip((decoder, encoder), pieces, strict=True))
            )


def test_a_bad_shard_is_left_out_or_ends_the_job(packed, encoders):
    path = packed.shard_path(1)
    path.write_bytes(path.read_bytes()[:-700])
    _, results, _ = through_halves(packed, encoders, "text", shuffled=False)
    assert results[-1]["error"] == "ShardError" and "entities-000001.tar" in results[-1]["message"]
    skip = encoders.model_copy(update={"on_bad_shard": "skip"})
    _, results, _ = through_halves(packed, skip, "text")
    assert sorted(result["shard"] for result in results) == [0, 1, 2]
    records = [
        json.loads((packed.directory / "features" / "text" / f"part-{shard:06d}.json").read_text())
        for shard in range(3)
    ]
    assert ["bad_shard" in record for record in records] == [False, True, False] and records[1]["present"] == 0


def test_strict_and_other_files_on_a_node_end_the_job(packed, encoders):
    strict = encoders.model_copy(update={"strict": True})
    _, results, _ = through_halves(packed, strict, "image")
    assert results[-1]["error"] == "DataError" and "encoders.strict=false" in results[-1]["message"]
    decoder = ShardDecoder(packed.place, encoders, COLUMNS, None, {"text": "0" * 64})
    ((segment, _),) = decoder.segments({"kind": "text", "shard": 0})
    assert segment.error == "DataError" and "bring the same files to every node" in segment.message


@pytest.mark.parametrize(("given", "gpus", "count"), [(None, 0, 0), (None, 0.5, 8), (0, 1, 0), (3, 0, 3)])
def test_two_pools_are_the_default_with_gpus_only(encoders, given, gpus, count):
    made = encoders.model_copy(update={"decode_actors": given, "gpus_per_actor": gpus})
    assert made.num_decode_actors() == count


@pytest.mark.ray
@pytest.mark.slow
def test_two_pools_write_the_bytes_of_the_plain_loop(packed, float32, ray_session):
    extract_features(packed, float32, COLUMNS, MODALITIES, use_ray=False)
    folder = packed.directory / "features"
    expected = files_of(folder)
    folder.rename(packed.directory / "plain")
    pools = float32.model_copy(update={"actors": 1, "decode_actors": 1})
    report = extract_features(packed, pools, COLUMNS, MODALITIES, use_ray=True)
    assert files_of(folder) == expected
    assert all(row["parts"] == {"done": 3, "skipped": 0} for row in report["modalities"].values())
    strict = pools.model_copy(update={"strict": True, "max_pixels": 1000})
    with pytest.raises(DataError, match=r"entity \d+: image: (too large|not an image): .*encoders\.strict=false"):
        extract_features(packed, strict, COLUMNS, ("image",), use_ray=True)
