"""Whose folder it is: a run's own is gone on with, another project's is not touched."""

from __future__ import annotations

import pytest
from tiny_run import tiny_config

from mocme_dist.errors import ConfigError
from mocme_dist.training.rundir import RunDirectory


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
    directory.write_config(tiny_config(tmp_path / "dataset", tmp_path))
    for _ in range(2):
        with directory.lock():
            assert directory.checkpoints.is_dir()
