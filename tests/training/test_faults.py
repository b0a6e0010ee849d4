"""Runs that meet torn checkpoints, another number of ranks, or a kill between commit and purge."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import TEARS, save, steps, truncate
from tiny_run import final_hashes, losses, tiny_config

from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import CheckpointError
from mocme_dist.train import train
from mocme_dist.training import checkpoint
from mocme_dist.training.loop import restore, run_training
from mocme_dist.training.worker import Worker

BOTH = "modalities=[structure, numeric]"
UNIFORM = (BOTH, "fusion.estimator=uniform")


@pytest.fixture(scope="module")
def undisturbed(featured_dataset: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the run that goes on for a fourth epoch without a fault."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("undisturbed") / "run"))
    train(tiny_config(featured_dataset, path, BOTH, "train.epochs=4"))
    return final_hashes(path, 36)


@pytest.mark.parametrize("tear, reason", TEARS.values(), ids=TEARS)
def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one_and_ends_in_the_same_bits(
    featured_dataset, run_copy, undisturbed, caplog, tear, reason
):
    tear(run_copy / "checkpoints" / "step_0000000027")
    with pytest.raises(CheckpointError, match=reason) as error:  # a step that is named has no stand-in
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4", "run.resume='27'"))
    assert error.value.exit_code == 4 and "step_0000000018" not in str(error.value)
    with caplog.at_level(logging.INFO):
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert re.search(rf"step_0000000027 is left out: .*{reason}", caplog.text) and "resuming from step 18" in caplog.text
    assert final_hashes(run_copy, 36) == undisturbed != {}


def test_a_run_whose_checkpoints_are_all_torn_stops_and_lists_them(featured_dataset, run_copy):
    folders = sorted((run_copy / "checkpoints").glob("step_*"))
    assert len(folders) > 1
    for folder in folders:
        truncate(folder)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint: .*--resume none") as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert error.value.exit_code == 4 and all(folder.name in str(error.value) for folder in folders)
    assert sorted((run_copy / "checkpoints").glob("step_*")) == folders


def first_epoch(comm: Any, dataset: Path, folder: Path) -> None:
    run_training(tiny_config(dataset, folder, *UNIFORM, "train.epochs=1"))


def other_epochs(comm: Any, dataset: Path, folder: Path) -> None:
    """Take the checkpoint with this number of ranks, every row and moment to the bit, and go on."""
    config = tiny_config(dataset, folder, *UNIFORM)
    saved = checkpoint.agree(folder / "checkpoints", "auto", comm)
    assert saved is not None and saved.step == 9 and saved.manifest["world_size"] != comm.world_size
    worker = Worker(config, Dataset.open(dataset), comm)
    restore(worker, saved)
    files = {entry["first"]: name for name, entry in saved.manifest["files"].items() if "first" in entry}
    parts = [load_file(saved.path / files[first]) for first in sorted(files)]
    table = worker.table
    for key, value in (("rows", table.rows_rD), *table.state.items()):
        assert torch.equal(torch.cat([part[key] for part in parts])[table.first : table.last], value)
    assert table.num_updates == 9
    dense = checkpoint.load_dense(saved)
    assert all(torch.equal(value, dense[name]) for name, value in worker.engine.state().items())
    run_training(config)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 4), (4, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(run_ranks, featured_dataset, tmp_path, alone, before, after):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_ranks(before, first_epoch, featured_dataset, tmp_path / "run")
    run_ranks(after, other_epochs, featured_dataset, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5) and len(alone) == 9


@pytest.fixture(scope="module")
def alone(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss curve of one rank from start to end."""
    path = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_config(featured_dataset, path, *UNIFORM))
    return losses(path)


def killed_before_purge(comm: Any, directory: Path) -> None:
    checkpoint._purge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(directory, 40, 0.1, comm=comm)


def test_a_kill_between_commit_and_purge_costs_nothing_and_torn_ones_are_not_counted(run_ranks, tmp_path):
    save(tmp_path, 10, 0.9)
    for step in (20, 30):
        save(tmp_path, step, 0.1)
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, killed_before_purge, tmp_path)
    assert steps(tmp_path) == [10, 20, 30, 40] and checkpoint.find(tmp_path, "auto").step == 40  # type: ignore[union-attr]
    for step in (20, 30):
        truncate(tmp_path / f"step_00000000{step}")
    save(tmp_path, 50, 0.1)
    # The two newest whole ones and the best stay; what is torn is not counted, and left for the user to look at.
    assert steps(tmp_path) == [10, 20, 30, 40, 50]
    save(tmp_path, 60, 0.2)
    assert steps(tmp_path) == [10, 20, 30, 50, 60]
    assert checkpoint.find(tmp_path, "auto", best=True).step == 10  # type: ignore[union-attr]
