"""Whose folder it is: a run's own is gone on with, another project's is not touched."""

from __future__ import annotations

import json

import pytest
from tiny_run import tiny_config

from mocme_dist.errors import ConfigError, DataError
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.status import State


@pytest.mark.parametrize("name", ["config.yaml", "dataset/manifest.json"])
def test_another_projects_folder_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs: 1\n")
    with pytest.raises(ConfigError, match="not empty and not a run directory"), RunDirectory(tmp_path).lock():
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [name]
    assert (tmp_path / name).read_text() == "theirs: 1\n"


def test_a_runs_own_configuration_marks_its_directory(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config(tiny_config(tmp_path / "dataset", tmp_path), ["from step 0\ntrain: {seed: 7}"])
    config = directory.read_config()
    assert config is not None and config.train.seed == 0  # a leg is a comment, whatever its values hold
    for _ in range(2):
        with directory.lock():
            assert directory.checkpoints.path.is_dir()


def test_a_process_that_has_lost_the_run_does_not_write_its_state(tmp_path):
    directory = RunDirectory(tmp_path)
    with directory.lock():
        state = State(directory)
        state.begin()
        before = directory.read_status()
        mine = (tmp_path / "lock").read_text()
        (tmp_path / "lock").write_text(json.dumps({**json.loads(mine), "token": "of another"}))
        state.end(KeyboardInterrupt())
        assert directory.read_status() == before
        (tmp_path / "lock").write_text(mine)
        state.end(KeyboardInterrupt())
        assert directory.read_status()["state"] == "preempted"


def test_ranks_that_outlive_their_launcher_do_not_write_over_how_it_ended(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_status("running", pid=1)
    directory.write_progress(step=3)
    assert directory.read_status()["step"] == 3
    directory.write_status("preempted", exit_code=75, step=3)
    directory.write_progress(step=4)
    assert (directory.read_status()["state"], directory.read_status()["step"]) == ("preempted", 3)


@pytest.mark.parametrize(
    "name", ["run_status.json", "stop", "metrics.jsonl", "metrics.json", "lock", "blend.safetensors"]
)
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name):
    RunDirectory(tmp_path).write_config(tiny_config(tmp_path / "dataset", tmp_path))
    (tmp_path / name).mkdir()
    with (
        pytest.raises(ConfigError, match=rf"{name}: a folder, expected a file; remove it"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    assert (tmp_path / name).is_dir() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"{", b"[" * 100_000, b"null", b'{"step": 3}'], ids=range(6))
def test_a_damaged_status_does_not_stop_the_run(tmp_path, text):
    directory = RunDirectory(tmp_path)
    with directory.lock():
        (tmp_path / "run_status.json").write_bytes(text)
        state = State(directory)
        state.end(ConfigError("train.seed: expected a number"))
        assert directory.read_status()["state"] == "failed"
        (tmp_path / "run_status.json").write_bytes(text)
        state.begin()
        directory.write_progress(step=4)
        assert directory.read_status()["step"] == 4


def test_metrics_that_are_no_object_are_named(tmp_path):
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(DataError, match=r"metrics\.json: expected a JSON object, found list"):
        RunDirectory(tmp_path).read_report()
