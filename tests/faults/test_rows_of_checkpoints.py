"""Rows 3, 4, 11, 15, 16, 20 and 44 of the fault matrix.

Runs that meet torn or foreign checkpoints, a full disk, another number of ranks, or a kill between commit and purge.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_harness import fill
from kill_points import tree
from safetensors.torch import load_file, save_file
from tiny_checkpoints import TEARS, find, nothing_is_left_over, save, steps, truncate
from tiny_run import final_hashes, losses, tiny_config

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import file_entry
from mocme_dist.errors import CheckpointError, StorageError
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.task import run_training
from mocme_dist.train import train
from mocme_dist.training import checkpoint, loop
from mocme_dist.training.build import build_worker
from mocme_dist.training.loop import restore

BOTH = "modalities=[structure, numeric]"
UNIFORM = (BOTH, "fusion.estimator=uniform")


@pytest.fixture(scope="module")
def undisturbed(featured_dataset: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the run that goes on for a fourth epoch without a fault."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("undisturbed") / "run"))
    train(tiny_config(featured_dataset, path, BOTH, "train.epochs=4"))
    return final_hashes(path, 36)


@pytest.mark.parametrize("tear, reason", TEARS.values(), ids=TEARS)
def test_row_03_a_run_goes_on_from_the_checkpoint_before_a_torn_one(
    featured_dataset, run_copy, undisturbed, caplog, tear, reason
):
    tear(run_copy / "checkpoints" / "step_0000000027")
    with caplog.at_level(logging.INFO):
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert re.search(rf"step_0000000027 is left out: .*{reason}", caplog.text)
    assert "resuming from step 18" in caplog.text
    assert final_hashes(run_copy, 36) == undisturbed != {}


@pytest.mark.parametrize("tear, reason", TEARS.values(), ids=TEARS)
def test_row_04_a_torn_step_that_is_named_has_no_stand_in(featured_dataset, run_copy, tear, reason):
    tear(run_copy / "checkpoints" / "step_0000000027")
    with pytest.raises(CheckpointError, match=reason) as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4", "run.resume='27'"))
    assert error.value.exit_code == 4 and "step_0000000018" not in str(error.value)


def test_row_03_a_run_whose_checkpoints_are_all_torn_stops_and_lists_them(featured_dataset, run_copy):
    folders = sorted((run_copy / "checkpoints").glob("step_*"))
    assert len(folders) > 1
    for folder in folders:
        truncate(folder)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint: .*--resume none") as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert error.value.exit_code == 4 and all(folder.name in str(error.value) for folder in folders)
    assert sorted((run_copy / "checkpoints").glob("step_*")) == folders


HASH = "0" * 64
LIES = [
    *(({"step": step}, r"says step|step: .*greater than or equal to 0") for step in (9, -5, 10**9)),
    ({"step": "20"}, r"step: Input should be a valid integer, found '20'"),
    ({"files": {}}, r"files: lacks dense.safetensors"),
    ({"files": {"../../../x": {"bytes": -1, "sha256": HASH}}}, r"files.*: String should match pattern"),
    ({"files": {"dense.safetensors": {"bytes": -1, "sha256": HASH}}}, r"bytes: .*greater than or equal to 0"),
    ({"files": {"dense.safetensors": {"bytes": 1, "sha256": "../x"}}}, r"sha256: String should match pattern"),
    ({"files": {"dense.safetensors": {"bytes": 1, "sha256": HASH}}}, r"parts cover rows \[0, 0\) of \[0, 11\)"),
    ({"metric": "good"}, r"metric: Input should be a valid number, found 'good'"),
    ({"table_updates": None}, r"table_updates: Input should be a valid integer"),
    # What a resumed run reads beside the tensors.
    ({"best_mrr": "0.5"}, r"best_mrr: Input should be a valid number, found '0.5'"),
    ({"best_mrr": math.nan}, r"best_mrr: Input should be a finite number"),
    ({"bad_evaluations": -1}, r"bad_evaluations: .*greater than or equal to 0"),
    ({"nonfinite": []}, r"nonfinite: Input should be a valid integer"),
    ({"monitor": {"seconds": 1.0}}, r"lacks monitor\.interval_step"),
    ({"monitor": 7}, r"monitor: Input should be .*MonitorState"),
    ({"legs": [1]}, r"legs\.0: Input should be a valid string"),
    ({"schedule": {"kind": "constant", "warmup_steps": 0, "last_step": 9, "more": 1}}, r"schedule\.more: .*"),
    ({"identity": []}, r"identity: Input should be a valid dictionary"),
]


@pytest.mark.parametrize("lie, message", LIES, ids=range(len(LIES)))
@pytest.mark.parametrize("best", [False, True])
def test_row_03_a_manifest_that_is_not_believed_makes_way_for_an_older_checkpoint(tmp_path, lie, message, best, caplog):
    for step in (10, 20):
        path = save(tmp_path, step, metric=step / 100)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, **lie}))
    found = find(tmp_path, "auto", best)
    assert found is not None and found.step == 10
    assert re.search(message, caplog.text)
    with pytest.raises(CheckpointError, match=message):
        find(tmp_path, "20")


def test_row_03_tensors_that_a_manifest_vouches_for_and_no_run_can_read_are_named(featured_dataset, run_copy):
    """Size and hash agree, the content does not: nothing falls back, because the manifest was written so."""
    newest = run_copy / "checkpoints" / "step_0000000027"
    for name, tensors in (("dense.safetensors", {"x": torch.zeros(1)}), ("rows-00000.safetensors", {})):
        original = (newest / name).read_bytes(), (newest / "MANIFEST.json").read_text()
        save_file(tensors, newest / name)
        manifest = json.loads(original[1])
        manifest["files"][name] |= file_entry(newest / name)
        (newest / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=rf"step_0000000027.*({name} cannot be read|90 tensors differ)"):
            train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
        (newest / name).write_bytes(original[0])
        (newest / "MANIFEST.json").write_text(original[1])


def test_row_44_code_in_a_checkpoint_is_not_run_though_its_manifest_vouches_for_it(
    featured_dataset, run_copy, tmp_path
):
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'sentinel'}",)

    newest = run_copy / "checkpoints" / "step_0000000027"
    torch.save({"x": Payload()}, newest / "dense.safetensors")
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["dense.safetensors"] |= file_entry(newest / "dense.safetensors")
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step_0000000027: dense.safetensors cannot be read") as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert error.value.exit_code == 4 and not (tmp_path / "sentinel").exists()


def first_epoch(comm: Any, dataset: Path, folder: Path) -> None:
    run_training(tiny_config(dataset, folder, *UNIFORM, "train.epochs=1"))


def other_epochs(comm: Any, dataset: Path, folder: Path) -> None:
    """Take the checkpoint with this number of ranks, every row and moment to the bit, and go on."""
    config = tiny_config(dataset, folder, *UNIFORM)
    saved = Checkpoints(folder).find("auto", comm=comm)
    assert saved is not None and saved.step == 9 and saved.manifest["world_size"] != comm.world_size
    worker = build_worker(config, Dataset.open(dataset), comm)
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
def test_row_15_a_run_goes_on_with_another_number_of_ranks(run_ranks, featured_dataset, tmp_path, alone, before, after):
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
    Checkpoints.purge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    save(directory, 40, 0.1, comm=comm)


def test_row_20_a_kill_between_commit_and_purge_costs_nothing_and_torn_ones_are_not_counted(run_ranks, tmp_path):
    save(tmp_path, 10, 0.9)
    for step in (20, 30):
        save(tmp_path, step, 0.1)
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, killed_before_purge, tmp_path)
    assert steps(tmp_path) == [10, 20, 30, 40] and Checkpoints(tmp_path).find().step == 40  # type: ignore[union-attr]
    for step in (20, 30):
        truncate(tmp_path / "checkpoints" / f"step_00000000{step}")
    save(tmp_path, 50, 0.1)
    # The two newest whole ones and the best stay; what is torn is not counted, and left for the user to look at.
    assert steps(tmp_path) == [10, 20, 30, 40, 50]
    save(tmp_path, 60, 0.2)
    assert steps(tmp_path) == [10, 20, 30, 50, 60]
    assert Checkpoints(tmp_path).find(best=True).step == 10  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "override, line",
    [
        ("experts.num_experts=3", "experts.num_experts 2 -> 3"),
        ("modalities=[structure]", 'modalities ["structure", "numeric"] -> ["structure"]'),
        ("train.seed=5", "train.seed 0 -> 5"),
        ("projection.hidden=3", "projection.hidden 8 -> 3"),
        ("rotate.gamma=5", "rotate.gamma 4.0 -> 5.0"),
        ("experts.residual=true", "experts.residual false -> true"),
        ("fusion.temperature=2", "fusion.temperature 1.0 -> 2.0"),
        ("entities.optimizer=adagrad", "entities.optimizer adam -> adagrad"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "18"])
def test_row_16_what_may_not_change_is_refused_by_its_key_and_leaves_the_run_as_it_is(
    featured_dataset, run_copy, override, line, resume
):
    before = tree(run_copy)
    with pytest.raises(CheckpointError) as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, override, "train.epochs=4", f"run.resume='{resume}'"))
    assert str(error.value).split("\n  ")[1:] == [line]
    assert tree(run_copy) == before


@pytest.mark.parametrize("free", [0, 6000], ids=["nothing is free", "too little is free"])
def test_row_11_a_full_disk_costs_checkpoints_and_after_three_of_them_the_run_but_none_that_exist(
    featured_dataset, finished_run, undisturbed, small_disk, monkeypatch, caplog, free
):
    run_dir = small_disk("disk", 4096) / "run"
    shutil.copytree(finished_run, run_dir)
    config = tiny_config(featured_dataset, run_dir, BOTH, "train.epochs=9")
    original, ballast = loop.train_step, run_dir.parent / "ballast"

    def train_step(*args: Any, **kwargs: Any) -> Any:
        if not ballast.exists():
            fill(ballast, free)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    with caplog.at_level(logging.INFO), pytest.raises(StorageError) as error:
        train(config)
    assert error.value.exit_code == 7
    wanted = r"needs \d\.\d MB, 0\.0 MB free at \S+/unsent|No space left on device"
    assert re.search(rf"checkpoint of step 54 could not be written: .*({wanted})", str(error.value))
    for number, step in ((1, 36), (2, 45)):
        warning = rf"training continues without this checkpoint \({number} of 3 failures\): .*step {step} could not"
        assert re.search(warning, caplog.text), caplog.text
    assert steps(run_dir) == [18, 27] and find(run_dir, "27").step == 27
    assert nothing_is_left_over(run_dir)
    monkeypatch.undo()
    ballast.unlink()
    train(tiny_config(featured_dataset, run_dir, BOTH, "train.epochs=4"))
    assert final_hashes(run_dir, 36) == undisturbed
