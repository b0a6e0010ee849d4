"""Checkpoints: any number of ranks reads what any other wrote.

A torn one is passed over with its reason, never guessed at.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import (
    ROWS,
    TEARS,
    WIDTH,
    dense_state,
    find,
    flip,
    make_table,
    nothing_is_left_over,
    save,
    steps,
    truncate,
)

from mocme_dist.errors import CheckpointError, StorageError
from mocme_dist.parallel.comm import Comm, single
from mocme_dist.runs import saver as saving
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.saver import Saver
from mocme_dist.training import checkpoint


def write_ranks(comm: Comm, directory: Path, optimizer: str, rows: int) -> None:
    table = make_table(comm.rank, comm.world_size, rows, optimizer)
    saver = Saver(Checkpoints(directory), 2, comm)
    place = saver.save(7, table, dense_state(), {"metric": None, "identity": {}})
    assert place == str(directory / "checkpoints" / "step_0000000007")
    comm.barrier()
    assert nothing_is_left_over(directory)


def read_ranks(comm: Comm, directory: Path, optimizer: str, rows: int) -> None:
    table = make_table(comm.rank, comm.world_size, rows, optimizer, seed=5, updates=0)
    saved = Checkpoints(directory).find("auto", rows=(table.first, table.last), comm=comm)
    assert saved is not None and saved.step == 7
    checkpoint.load_rows(saved, table)
    expected = make_table(comm.rank, comm.world_size, rows, optimizer)
    assert torch.equal(table.rows_rD, expected.rows_rD) and table.num_updates == expected.num_updates == 3
    assert table.rows_rD.dtype == expected.rows_rD.dtype and table.state.keys() == expected.state.keys()
    assert all(torch.equal(table.state[name], expected.state[name]) for name in table.state)
    dense = checkpoint.load_dense(saved)
    assert dense.keys() == dense_state().keys() and all(
        torch.equal(dense[name], value) for name, value in dense_state().items()
    )


@pytest.mark.parametrize("optimizer, rows", [("adam", ROWS), ("adagrad", 2)])
@pytest.mark.parametrize("writers, readers", [(1, 3), (2, 1), (2, 3), (3, 2)])
def test_rows_moments_and_dense_state_are_read_by_any_number_of_ranks(
    run_ranks, tmp_path, writers, readers, optimizer, rows
):
    run_ranks(writers, write_ranks, tmp_path, optimizer, rows)
    run_ranks(readers, read_ranks, tmp_path, optimizer, rows)


@pytest.mark.parametrize("tear, reason", TEARS.values(), ids=TEARS)
def test_a_torn_newest_checkpoint_is_passed_over_with_its_reason(tmp_path, caplog, tear, reason):
    save(tmp_path, 10)
    tear(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        saved = find(tmp_path, "auto")
    assert saved is not None and saved.step == 10
    assert "step_0000000020" in caplog.text and re.search(reason, caplog.text)
    with pytest.raises(CheckpointError, match=reason):  # a step that is named has no stand-in
        find(tmp_path, "20")


def test_no_valid_checkpoint_is_an_error_that_lists_each(tmp_path):
    truncate(save(tmp_path, 10))
    flip(save(tmp_path, 20))
    with pytest.raises(CheckpointError, match=r"step_0000000020: dense.*; step_0000000010: rows.*--resume none"):
        find(tmp_path, "auto")
    assert Checkpoints(tmp_path).find("none") is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 30; it has 20"):
        find(tmp_path, "30")
    assert Checkpoints(tmp_path / "none").find() is None


def test_the_best_is_the_highest_metric_and_of_equal_ones_the_newest(tmp_path):
    for step, metric in ((10, 0.3), (20, 0.3), (30, 0.2), (40, None)):
        save(tmp_path, step, metric, keep=9)
    best, newest = find(tmp_path, "auto", best=True), find(tmp_path, "auto")
    assert best is not None and newest is not None and (best.step, newest.step) == (20, 40)


def test_purging_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    save(tmp_path, 10, 0.9)
    for step in (20, 30, 40):
        save(tmp_path, step, 0.1)
    assert steps(tmp_path) == [10, 30, 40]
    truncate(tmp_path / "checkpoints" / "step_0000000040")
    (tmp_path / "checkpoints" / "step_0000000030" / "MANIFEST.json").unlink()
    save(tmp_path, 50, 0.2)
    # The torn ones are not counted, and left for the user to look at.
    assert steps(tmp_path) == [10, 30, 40, 50]
    save(tmp_path, 60, 0.2)
    save(tmp_path, 70, 0.2)
    assert steps(tmp_path) == [10, 30, 40, 60, 70]


def test_what_a_killed_save_or_purge_left_is_swept(tmp_path):
    for name in (".tmp-20-deadbeef", ".tmp-aa-step_0000000005"):
        shutil.copytree(save(tmp_path, 10), tmp_path / "checkpoints" / name)
    # Killed between its parts and its manifest, and before its parts.
    for step in (20, 30):
        shutil.copytree(tmp_path / "checkpoints" / "step_0000000010", tmp_path / "unsent" / f"step_{step:010d}")
    shutil.copytree(tmp_path / "checkpoints" / "step_0000000010", tmp_path / "checkpoints" / "step_0000000020")
    (tmp_path / "checkpoints" / "step_0000000020" / "MANIFEST.json").unlink()
    assert find(tmp_path, "auto").step == 10
    Saver(Checkpoints(tmp_path), 2, single())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000000010", "superseded"]
    assert nothing_is_left_over(tmp_path)


def test_a_step_that_is_there_already_is_replaced_whole(tmp_path):
    truncate(save(tmp_path, 10, seed=1))
    save(tmp_path, 10, seed=2)
    saved = find(tmp_path, "10")
    assert saved is not None and saved.manifest["identity"]["seed"] == 2 and steps(tmp_path) == [10]


def test_another_identity_is_refused_field_by_field(tmp_path):
    save(tmp_path, 10)
    saved = find(tmp_path, "auto")
    assert saved is not None
    checkpoint.check_compatible(saved, {"width": WIDTH, "seed": 0})
    with pytest.raises(
        CheckpointError,
        match=r"other settings, which may not change; use another run.dir or the settings it was made with\n"
        r"  experts.width 4 -> 8\n  modalities nothing -> \[\"text\"\]$",
    ):
        checkpoint.check_compatible(saved, {"width": 8, "seed": 0, "modalities": ["text"]})


def test_parts_that_do_not_cover_the_rows_are_refused(tmp_path):
    path = save(tmp_path, 10)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["rows-00000.safetensors"]["last"] -= 1
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"parts cover rows \[0, 10\) of \[0, 11\)"):
        find(tmp_path, "auto")


def test_going_back_sets_the_newer_ones_aside_and_deletes_nothing(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, 1 / step, keep=9)
    truncate(tmp_path / "checkpoints" / "step_0000000010")
    with pytest.raises(CheckpointError, match="step_0000000010"):
        Checkpoints(tmp_path).rewind("10")
    assert steps(tmp_path) == [10, 20, 30]
    Checkpoints(tmp_path).rewind("20")
    assert steps(tmp_path) == [10, 20] and steps(tmp_path, "checkpoints/superseded") == [30]
    save(tmp_path, 30, keep=9)
    Checkpoints(tmp_path).rewind("none")
    assert steps(tmp_path) == [] and steps(tmp_path, "checkpoints/superseded") == [10, 20, 30]
    # A new start is not purged in favour of what lies aside.
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3] and find(tmp_path, "auto", best=True).step == 3


def one_rank_fails(comm: Comm, directory: Path, where: str) -> None:
    """Rank 1 cannot write its rows, or rank 0 cannot commit: every rank learns it, and the next save works."""
    saver = Saver(Checkpoints(directory), 2, comm)
    table, manifest = make_table(comm.rank, comm.world_size), {"metric": None, "identity": {}}
    assert saver.save(1, table, dense_state(), manifest)
    original = checkpoint.save_file, saving.write_json

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fail_json(path: Path, value: Any) -> None:
        raise StorageError(f"{path}: cannot be written: No space left on device")

    if where == "rows" and comm.rank == 1:
        checkpoint.save_file = fail  # type: ignore[attr-defined]
    if where == "manifest" and comm.rank == 0:
        saving.write_json = fail_json  # type: ignore[attr-defined]
    assert not saver.save(2, table, dense_state(), manifest)
    checkpoint.save_file, saving.write_json = original  # type: ignore[attr-defined]
    comm.barrier()
    assert steps(directory) == [1] and nothing_is_left_over(directory)
    assert saver.save(3, table, dense_state(), manifest) and steps(directory) == [1, 3]


@pytest.mark.parametrize("where", ["rows", "manifest"])
def test_a_save_that_one_rank_fails_is_failed_by_all(run_ranks, tmp_path, where):
    run_ranks(2, one_rank_fails, tmp_path, where)


class Lost(Comm):
    """A rank whose peer has died."""

    def gather(self, value: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer")


def test_a_lost_peer_does_not_pass_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="Connection closed"):
        Saver(Checkpoints(tmp_path), 2, Lost(0, 1, torch.device("cpu"), None)).save(
            1, make_table(0, 1), dense_state(), {}
        )  # type: ignore[arg-type]


class Apart(Comm):
    """A rank that is told of a file on a disk that it does not see."""

    def gather(self, value: Any) -> list[Any]:
        return [value, {"rows-00001.safetensors": {"bytes": 9, "sha256": ""}}] if isinstance(value, dict) else [value]


def test_a_run_directory_that_not_all_nodes_see_fails_the_first_save(tmp_path):
    with pytest.raises(
        StorageError,
        match=r"rows-00001.safetensors is not visible to rank 0: run.dir must be on storage that all nodes see",
    ):
        save(tmp_path, 1, comm=Apart(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]
    assert steps(tmp_path) == [] and nothing_is_left_over(tmp_path)
