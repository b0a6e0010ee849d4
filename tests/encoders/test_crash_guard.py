"""A file that kills its worker costs itself and not the job; deaths that are nobody's fault cost no file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mocme_dist.data.feature_parts import part_path
from mocme_dist.encoders.build import build_encoder
from mocme_dist.encoders.crash_guard import CrashGuard
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.extractor import ShardExtractor
from mocme_dist.encoders.heartbeat import rows_done
from mocme_dist.encoders.pools import run_on_ray
from mocme_dist.encoders.shard import extract_shard
from mocme_dist.errors import DataError

COLUMNS = ("label", "description")


def die(folder: Path, at: str = "", shard: int = 1) -> CrashGuard:
    """An guard that is begun and never ended."""
    guard = CrashGuard(folder, "text", shard).__enter__()
    guard.at(at)
    return guard


def test_an_attempt_that_ends_leaves_nothing_also_after_an_error(tmp_path: Path):
    with CrashGuard(tmp_path, "text", 1) as guard:
        guard.at("7/text.json")
        assert not guard.isolate and not guard.poisoned
        assert len(list(tmp_path.iterdir())) == 1 and rows_done(tmp_path) == 0
    with pytest.raises(ZeroDivisionError), CrashGuard(tmp_path, "text", 1):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_two_deaths_at_one_file_prove_it_and_one_does_not(tmp_path: Path):
    die(tmp_path)
    die(tmp_path, "7/text.json")
    die(tmp_path, "a name that is long and goes before the short one").at("9/x")
    assert CrashGuard(tmp_path, "text", 1).isolate and not CrashGuard(tmp_path, "text", 1).poisoned
    die(tmp_path, "7/text.json")
    assert CrashGuard(tmp_path, "text", 1).poisoned == {"7/text.json"}
    for other in (CrashGuard(tmp_path, "text", 2), CrashGuard(tmp_path, "image", 1)):
        assert not other.isolate and not other.poisoned


def test_deaths_that_no_file_explains_end_the_job(tmp_path: Path):
    for _ in range(7):
        die(tmp_path)
    for _ in range(3):
        die(tmp_path, "7/text.json")  # proven, so it counts no more
    CrashGuard(tmp_path, "text", 1).check()
    die(tmp_path, "8/text.json")
    with pytest.raises(
        DataError, match="shard 1 of text: 8 workers died over it, at no file in particular; most likely memory"
    ):
        CrashGuard(tmp_path, "text", 1).check()


def test_a_folder_that_is_gone_costs_the_protection_only(tmp_path: Path):
    with CrashGuard(tmp_path / "gone", "text", 1) as guard:
        guard.at("7/text.json")
    assert not guard.isolate


def test_a_careful_attempt_writes_the_same_bytes_and_leaves_deadly_files_out(packed, encoders, tmp_path):
    encoder = build_encoder("text", encoders, COLUMNS, None)
    extract_shard(encoder, packed, 1, encoders, "hash")
    files = [
        part_path(packed.directory / "features" / "text", 1).with_suffix(suffix) for suffix in (".safetensors", ".json")
    ]
    expected = [path.read_bytes() for path in files]
    die(tmp_path)
    with CrashGuard(tmp_path, "text", 1) as guard:
        assert guard.isolate
        extract_shard(encoder, packed, 1, encoders, "hash", guard=guard)
    assert [path.read_bytes() for path in files] == expected
    entity = packed.shards.bounds(1)[0]
    for _ in range(2):
        die(tmp_path, f"{entity}/text.json")
    with CrashGuard(tmp_path, "text", 1) as guard:
        extract_shard(encoder, packed, 1, encoders, "hash", guard=guard)
    stats, before = json.loads(files[1].read_text()), json.loads(expected[1])
    assert (
        stats["failed"] == {**before["failed"], "crashes its worker": 1} and stats["present"] == before["present"] - 1
    )
    assert {
        "id": entity,
        "cause": "crashes its worker",
        "message": "text.json: two workers died while they decoded it",
    } in stats["examples"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_file_that_kills_its_worker_is_counted_and_the_rest_is_done(packed, encoders, ray_session, tmp_path):
    first = packed.shards.bounds(1)[0]

    class Deadly(ShardExtractor):
        def _encoder_of(self, modality):
            encoder = super()._encoder_of(modality)
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
    hashes = {"text": encoder_hash("text", encoder.settings, encoders)}
    extractor = Deadly(packed.place, encoders, COLUMNS, None, hashes)
    extractor.heartbeats = tmp_path
    results = list(
        run_on_ray([{"kind": "text", "shard": shard} for shard in range(packed.shards.num_shards)], extractor)
    )
    assert sorted(result["shard"] for result in results) == list(range(packed.shards.num_shards)) and not any(
        "error" in r for r in results
    )
    stats = [
        json.loads(part_path(packed.directory / "features" / "text", shard).with_suffix(".json").read_text())
        for shard in range(packed.shards.num_shards)
    ]
    assert stats[1]["failed"]["crashes its worker"] == 1
    assert not any("crashes its worker" in part["failed"] for i, part in enumerate(stats) if i != 1)
