"""Checkpoints: any number of ranks reads what any other wrote; a torn one is passed over with its reason, never guessed at."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mocme_dist.errors import CheckpointError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.training import checkpoint
from mocme_dist.training.checkpoint import Saver

ROWS, WIDTH = 11, 4


class Loner(Comm):
    """One rank without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


LONER = Loner(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def make_table(rank: int, world: int, rows: int = ROWS, optimizer: str = "adam", seed: int = 0, updates: int = 3) -> EntityTable:
    """A table whose rows have moved, a function of the global row alone; rows of "adagrad" are bfloat16 here."""
    dtype = torch.bfloat16 if optimizer == "adagrad" else torch.float32
    table = EntityTable(RowPartition(rows, world), rank, WIDTH, optimizer=optimizer, learning_rate=0.1, seed=seed, dtype=dtype)
    for step in range(updates):
        full_ED = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))
        local = torch.arange(table.last - table.first)
        table.update(local, full_ED[table.first : table.last])
    return table


def dense_state(seed: int = 1) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {"value/a": torch.randn(3, 5, generator=gen), "exp_avg/a": torch.randn(3, 5, generator=gen), "buffer/n": torch.tensor(2.0)}


def save(directory: Path, step: int, metric: float | None = None, seed: int = 0, keep: int = 2, comm: Comm = LONER) -> Path:
    manifest = {"metric": metric, "identity": {"width": WIDTH, "seed": seed}}
    return checkpoint.save(directory, step, make_table(comm.rank, comm.world_size, seed=seed), dense_state(step), manifest, comm, keep)


def steps(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(directory.glob("step_*"))]


def write_ranks(comm: Comm, directory: Path, optimizer: str, rows: int) -> None:
    table = make_table(comm.rank, comm.world_size, rows, optimizer)
    path = checkpoint.save(directory, 7, table, dense_state(), {"metric": None, "identity": {}}, comm, 2)
    assert path == directory / "step_0000000007" and not list(directory.glob(".tmp-*"))


def read_ranks(comm: Comm, directory: Path, optimizer: str, rows: int) -> None:
    saved = checkpoint.agree(directory, "auto", comm)
    assert saved is not None and saved.step == 7
    table = make_table(comm.rank, comm.world_size, rows, optimizer, seed=5, updates=0)
    checkpoint.load_rows(saved, table)
    expected = make_table(comm.rank, comm.world_size, rows, optimizer)
    assert torch.equal(table.rows_rD, expected.rows_rD) and table.num_updates == expected.num_updates == 3
    assert table.rows_rD.dtype == expected.rows_rD.dtype and table.state.keys() == expected.state.keys()
    assert all(torch.equal(table.state[name], expected.state[name]) for name in table.state)
    dense = checkpoint.load_dense(saved)
    assert dense.keys() == dense_state().keys() and all(torch.equal(dense[name], value) for name, value in dense_state().items())


@pytest.mark.parametrize("optimizer, rows", [("adam", ROWS), ("adagrad", 2)])
@pytest.mark.parametrize("writers, readers", [(1, 3), (2, 1), (2, 3), (3, 2)])
def test_rows_moments_and_dense_state_are_read_by_any_number_of_ranks(run_ranks, tmp_path, writers, readers, optimizer, rows):
    run_ranks(writers, write_ranks, tmp_path, optimizer, rows)
    run_ranks(readers, read_ranks, tmp_path, optimizer, rows)


def truncate(path: Path) -> None:
    file = path / "rows-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray((path / "dense.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "dense.safetensors").write_bytes(bytes(data))


TEARS = {
    "truncated": (truncate, r"rows-00000.safetensors has size \d+, manifest says \d+"),
    "file missing": (lambda path: (path / "dense.safetensors").unlink(), r"dense.safetensors is missing"),
    "bit flipped": (flip, r"dense.safetensors: sha256 differs"),
    "manifest empty": (lambda path: (path / "MANIFEST.json").write_bytes(b""), r"MANIFEST.json is missing or torn"),
    "manifest of nothing": (lambda path: (path / "MANIFEST.json").write_text("{}"), r"MANIFEST.json is missing or torn"),
    "manifest missing": (lambda path: (path / "MANIFEST.json").unlink(), r"MANIFEST.json is missing or torn"),
}


@pytest.mark.parametrize("tear, reason", TEARS.values(), ids=TEARS)
def test_a_torn_newest_checkpoint_is_passed_over_with_its_reason(tmp_path, caplog, tear, reason):
    save(tmp_path, 10)
    tear(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        saved = checkpoint.find(tmp_path, "auto")
    assert saved is not None and saved.step == 10
    assert "step_0000000020" in caplog.text and re.search(reason, caplog.text)
    with pytest.raises(CheckpointError, match=reason):  # a step that is named has no stand-in
        checkpoint.find(tmp_path, "20")


def test_no_valid_checkpoint_is_an_error_that_lists_each(tmp_path):
    truncate(save(tmp_path, 10))
    flip(save(tmp_path, 20))
    with pytest.raises(CheckpointError, match=r"step_0000000020: dense.*; step_0000000010: rows.*--resume none"):
        checkpoint.find(tmp_path, "auto")
    assert checkpoint.find(tmp_path, "none") is None
    with pytest.raises(CheckpointError, match=r"step_0000000030: MANIFEST.json is missing"):
        checkpoint.find(tmp_path, "30")
    assert checkpoint.find(tmp_path / "none", "auto") is None


def test_the_best_is_the_highest_metric_and_of_equal_ones_the_newest(tmp_path):
    for step, metric in ((10, 0.3), (20, 0.3), (30, 0.2), (40, None)):
        save(tmp_path, step, metric, keep=9)
    best, newest = checkpoint.find(tmp_path, "auto", best=True), checkpoint.find(tmp_path, "auto")
    assert best is not None and newest is not None and (best.step, newest.step) == (20, 40)


def test_purging_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    save(tmp_path, 10, 0.9)
    for step in (20, 30, 40):
        save(tmp_path, step, 0.1)
    assert steps(tmp_path) == [10, 30, 40]
    truncate(tmp_path / "step_0000000040")
    (tmp_path / "step_0000000030" / "MANIFEST.json").unlink()
    save(tmp_path, 50, 0.2)
    # The torn ones are not counted, and left for the user to look at.
    assert steps(tmp_path) == [10, 30, 40, 50]
    save(tmp_path, 60, 0.2)
    save(tmp_path, 70, 0.2)
    assert steps(tmp_path) == [10, 30, 40, 60, 70]


def test_what_a_killed_save_or_purge_left_is_swept(tmp_path):
    for name in (".tmp-20-deadbeef", ".tmp-aa-step_0000000005"):
        shutil.copytree(save(tmp_path, 10), tmp_path / name)
    assert checkpoint.find(tmp_path, "auto").step == 10  # type: ignore[union-attr]
    Saver(tmp_path, 2, LONER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000000010"]


def test_a_step_that_is_there_already_is_replaced_whole(tmp_path):
    truncate(save(tmp_path, 10, seed=1))
    save(tmp_path, 10, seed=2)
    saved = checkpoint.find(tmp_path, "10")
    assert saved is not None and saved.manifest["identity"]["seed"] == 2 and steps(tmp_path) == [10]


def test_another_identity_is_refused_field_by_field(tmp_path):
    save(tmp_path, 10)
    saved = checkpoint.find(tmp_path, "auto")
    assert saved is not None
    checkpoint.check_identity(saved, {"width": WIDTH, "seed": 0})
    with pytest.raises(
        CheckpointError,
        match=r"other settings; use another run.dir or the settings of then\n"
        r"  setting     checkpoint  now\n  width       4           8\n  modalities  nothing     \['text'\]$",
    ):
        checkpoint.check_identity(saved, {"width": 8, "seed": 0, "modalities": ["text"]})


def test_parts_that_do_not_cover_the_rows_are_refused(tmp_path):
    path = save(tmp_path, 10)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["rows-00000.safetensors"]["last"] -= 1
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"parts cover 10 of rows \[0, 11\)"):
        checkpoint.load_rows(checkpoint.find(tmp_path, "auto"), make_table(0, 1))  # type: ignore[arg-type]


def test_going_back_sets_the_newer_ones_aside_and_deletes_nothing(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, 1 / step, keep=9)
    truncate(tmp_path / "step_0000000010")
    with pytest.raises(CheckpointError, match="step_0000000010"):
        checkpoint.rewind(tmp_path, "10")
    assert steps(tmp_path) == [10, 20, 30]
    checkpoint.rewind(tmp_path, "20")
    assert steps(tmp_path) == [10, 20] and steps(tmp_path / "superseded") == [30]
    save(tmp_path, 30, keep=9)
    checkpoint.rewind(tmp_path, "none")
    assert steps(tmp_path) == [] and steps(tmp_path / "superseded") == [10, 20, 30]
    # A new start is not purged in favour of what lies aside.
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3] and checkpoint.find(tmp_path, "auto", best=True).step == 3  # type: ignore[union-attr]


class Full:
    """A disk that says how much is free."""

    free = 100


def test_a_full_disk_leaves_earlier_checkpoints_and_stops_the_run_at_the_third_time(tmp_path, monkeypatch, caplog):
    save(tmp_path, 10)
    saver = Saver(tmp_path, 2, LONER)
    arguments = (make_table(0, 1), dense_state(), {"metric": None, "identity": {}})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full())
    with caplog.at_level(logging.WARNING):
        assert not saver.save(20, *arguments) and not saver.save(30, *arguments)
    assert "needs 0.0 MB, 0.0 MB free" in caplog.text and "1 of 3 failures" in caplog.text
    with pytest.raises(StorageError, match="checkpoint of step 40 could not be written"):
        saver.save(40, *arguments)
    assert steps(tmp_path) == [10] and checkpoint.find(tmp_path, "auto").step == 10  # type: ignore[union-attr]
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.undo()
    assert saver.save(50, *arguments) and saver.failures == 0


def one_rank_fails(comm: Comm, directory: Path, where: str) -> None:
    """Rank 1 cannot write its rows, or rank 0 cannot commit: every rank learns it, and the next save works."""
    saver = Saver(directory, 2, comm)
    table, manifest = make_table(comm.rank, comm.world_size), {"metric": None, "identity": {}}
    assert saver.save(1, table, dense_state(), manifest)
    original = checkpoint.save_file, checkpoint.write_json

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fail_json(path: Path, value: Any) -> None:
        raise StorageError(f"{path}: cannot be written: No space left on device")

    if where == "rows" and comm.rank == 1:
        checkpoint.save_file = fail  # type: ignore[attr-defined]
    if where == "manifest" and comm.rank == 0:
        checkpoint.write_json = fail_json  # type: ignore[attr-defined]
    assert not saver.save(2, table, dense_state(), manifest)
    checkpoint.save_file, checkpoint.write_json = original  # type: ignore[attr-defined]
    comm.barrier()
    assert steps(directory) == [1] and not list(directory.glob(".tmp-*"))
    assert saver.save(3, table, dense_state(), manifest) and steps(directory) == [1, 3]


@pytest.mark.parametrize("where", ["rows", "manifest"])
def test_a_save_that_one_rank_fails_is_failed_by_all(run_ranks, tmp_path, where):
    run_ranks(2, one_rank_fails, tmp_path, where)


class Lost(Loner):
    """A rank whose peer has died."""

    def gather(self, value: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer")


def test_a_lost_peer_does_not_pass_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="Connection closed"):
        Saver(tmp_path, 2, Lost(0, 1, torch.device("cpu"), None)).save(1, make_table(0, 1), dense_state(), {})  # type: ignore[arg-type]


class Apart(Loner):
    """A rank that is told of a file on a disk that it does not see."""

    def gather(self, value: Any) -> list[Any]:
        return [value, {"rows-00001.safetensors": {"bytes": 9, "sha256": ""}}] if isinstance(value, dict) else [value]


def test_a_run_directory_that_not_all_nodes_see_fails_the_first_save(tmp_path):
    with pytest.raises(
        StorageError, match=r"rows-00001.safetensors is not visible to rank 0: run.dir must be on storage that all nodes see"
    ):
        save(tmp_path, 1, comm=Apart(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
