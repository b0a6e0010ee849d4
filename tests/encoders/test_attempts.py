"""A file that kills its worker costs itself and not the job; deaths that are nobody's fault cost no file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mocme_dist.data.features import part_path
from mocme_dist.encoders import pipeline
from mocme_dist.encoders.attempts import Attempt
from mocme_dist.encoders.build import build_encoder
from mocme_dist.encoders.heartbeat import rows_done
from mocme_dist.encoders.shard import extract_shard
from mocme_dist.errors import DataError

COLUMNS = ("label", "description")


def die(folder: Path, at: str = "", shard: int = 1) -> Attempt:
    """An attempt that is begun and never ended."""
    attempt = Attempt(folder, "text", shard).__enter__()
    attempt.at(at)
    return attempt


def test_an_attempt_that_ends_leaves_nothing_also_after_an_error(tmp_path: Path):
    with Attempt(tmp_path, "text", 1) as attempt:
        attempt.at("7/text.json")
        assert not attempt.careful and not attempt.deadly
        assert len(list(tmp_path.iterdir())) == 1 and rows_done(tmp_path) == 0
    with pytest.raises(ZeroDivisionError), Attempt(tmp_path, "text", 1):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_two_deaths_at_one_file_prove_it_and_one_does_not(tmp_path: Path):
    die(tmp_path)
    die(tmp_path, "7/text.json")
    die(tmp_path, "a name that is long and goes before the short one").at("9/x")
    assert Attempt(tmp_path, "text", 1).careful and not Attempt(tmp_path, "text", 1).deadly
    die(tmp_path, "7/text.json")
    assert Attempt(tmp_path, "text", 1).deadly == {"7/text.json"}
    for other in (Attempt(tmp_path, "text", 2), Attempt(tmp_path, "image", 1)):
        assert not other.careful and not other.deadly


def test_deaths_that_no_file_explains_end_the_job(tmp_path: Path):
    for _ in range(7):
        die(tmp_path)
    for _ in range(3):
        die(tmp_path, "7/text.json")  # proven, so it counts no more
    Attempt(tmp_path, "text", 1).check()
    die(tmp_path, "8/text.json")
    with pytest.raises(DataError, match="shard 1 of text: 8 workers died over it, at no file in particular; most likely memory"):
        Attempt(tmp_path, "text", 1).check()


def test_a_folder_that_is_gone_costs_the_protection_only(tmp_path: Path):
    with Attempt(tmp_path / "gone", "text", 1) as attempt:
        attempt.at("7/text.json")
    assert not attempt.careful


def test_a_careful_attempt_writes_the_same_bytes_and_leaves_deadly_files_out(packed, encoders, tmp_path):
    encoder = build_encoder("text", encoders, COLUMNS, None)
    extract_shard(encoder, packed, 1, encoders, "hash")
    files = [part_path(packed.directory / "features" / "text", 1).with_suffix(suffix) for suffix in (".safetensors", ".json")]
    expected = [path.read_bytes() for path in files]
    die(tmp_path)
    with Attempt(tmp_path, "text", 1) as attempt:
        assert attempt.careful
        extract_shard(encoder, packed, 1, encoders, "hash", attempt=attempt)
    assert [path.read_bytes() for path in files] == expected
    entity = packed.shards.bounds(1)[0]
    for _ in range(2):
        die(tmp_path, f"{entity}/text.json")
    with Attempt(tmp_path, "text", 1) as attempt:
        extract_shard(encoder, packed, 1, encoders, "hash", attempt=attempt)
    stats, before = json.loads(files[1].read_text()), json.loads(expected[1])
    assert stats["failed"] == {**before["failed"], "kills its worker": 1} and stats["present"] == before["present"] - 1
    assert {"id": entity, "cause": "kills its worker", "message": "text.json: two workers died while they decoded it"} in stats["examples"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_file_that_kills_its_worker_is_counted_and_the_rest_is_done(packed, encoders, ray_session, tmp_path):
    first = packed.shards.bounds(1)[0]

    class Deadly(pipeline.Workshop):
        def _encoder_of(self, dataset, modality):
            encoder = super()._encoder_of(dataset, modality)
            decode = type(encoder).decode

            def kills(members):
                piece = decode(encoder, members)
                if piece.pieces == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                return piece

            encoder.decode = kills
            return encoder

    encoder = build_encoder("text", encoders, COLUMNS, None)
    (member,) = [member for member in packed.read_members(1, 1 << 20, "text") if member.id == first]
    victim = encoder.decode({member.name: member.content}).pieces
    assert victim
    hashes = {"text": pipeline.encoder_hash("text", encoder.settings, encoders)}
    workshop = Deadly(packed.place, encoders, COLUMNS, None, hashes)
    workshop.heartbeats = tmp_path
    results = list(pipeline._run_ray([{"kind": "text", "shard": shard} for shard in range(packed.shards.num_shards)], workshop))
    assert sorted(result["shard"] for result in results) == list(range(packed.shards.num_shards)) and not any("error" in r for r in results)
    stats = [
        json.loads(part_path(packed.directory / "features" / "text", shard).with_suffix(".json").read_text())
        for shard in range(packed.shards.num_shards)
    ]
    assert stats[1]["failed"]["kills its worker"] == 1
    assert not any("kills its worker" in part["failed"] for i, part in enumerate(stats) if i != 1)
