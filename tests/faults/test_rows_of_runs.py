"""Rows 12, 23, 45, 46, 47 and 49 of the fault matrix.

A full disk under the curves, a run that explodes, seeds, runs side by side, signs of life, clocks that jump, and an
evaluation that was cut short.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_harness import ROOT
from tiny_run import STEPS_PER_EPOCH, TINY, curve, final_hashes, losses, tiny_config

from mocme_dist.encoders import extractor
from mocme_dist.errors import DivergedError
from mocme_dist.runs import status
from mocme_dist.train import train
from mocme_dist.training import loop
from mocme_dist.training.worker import Worker

BOTH, LAST = "modalities=[structure, numeric]", 3 * STEPS_PER_EPOCH


def report(run_dir: Path) -> dict[str, Any]:
    return {**json.loads((run_dir / "metrics.json").read_text()), "seconds": 0}


def test_row_45_a_seed_decides_every_bit_and_another_seed_others(featured_dataset, finished_run, tmp_path):
    train(tiny_config(featured_dataset, tmp_path / "same", BOTH))
    assert final_hashes(tmp_path / "same", LAST) == final_hashes(finished_run, LAST)
    assert report(tmp_path / "same") == report(finished_run) and losses(tmp_path / "same") == losses(finished_run)
    train(tiny_config(featured_dataset, tmp_path / "other", BOTH, "train.seed=1"))
    assert losses(tmp_path / "other") != losses(finished_run)


@pytest.mark.slow
def test_row_45_two_runs_side_by_side_do_not_meet(featured_dataset, finished_run, tmp_path):
    runs = []
    for name in ("left", "right"):
        paths = [f"data.dataset={json.dumps(str(featured_dataset))}", f"run.dir={json.dumps(str(tmp_path / name))}"]
        command = [sys.executable, "-m", "mocme_dist.train", "--set", *TINY, BOTH, *paths]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        for run in runs:
            _, errors = run.communicate(timeout=400)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
    for name in ("left", "right"):
        assert final_hashes(tmp_path / name, LAST) == final_hashes(finished_run, LAST) and report(
            tmp_path / name
        ) == report(finished_run)


def test_row_47_a_clock_that_jumps_back_an_hour_changes_nothing(featured_dataset, finished_run, tmp_path, monkeypatch):
    real, started = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (real() - started > 0.3))
    result = train(tiny_config(featured_dataset, tmp_path / "run", BOTH))
    assert time.time() < started, "it has jumped"
    assert 0 < result["seconds"] < 300
    assert final_hashes(tmp_path / "run", LAST) == final_hashes(finished_run, LAST)
    steps = [line["step"] for line in curve(tmp_path / "run") if "train/loss" in line]
    assert steps == sorted(set(steps)) and all(line.get("elapsed_s", 1) > 0 for line in curve(tmp_path / "run"))


def test_row_49_an_evaluation_that_is_cut_short_reports_nothing_and_is_made_again(
    featured_dataset, finished_run, tmp_path, monkeypatch
):
    rank = Worker.rank

    class Cut(BaseException):
        """As sudden as a signal."""

    def cut(self: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        result = rank(self, split, *args, **kwargs)
        if split == "test":
            raise Cut
        return result

    config = tiny_config(featured_dataset, tmp_path / "run", BOTH)
    monkeypatch.setattr(Worker, "rank", cut)
    with pytest.raises(Cut):
        train(config)
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr(Worker, "rank", rank)
    train(config)
    assert report(tmp_path / "run") == report(finished_run)


def test_row_12_a_full_disk_under_tensorboard_costs_the_curves_with_one_warning(
    featured_dataset, finished_run, tmp_path, small_disk
):
    """In a process of its own: the thread that writes events would print its trace there."""
    small_disk("run/tensorboard", 16)
    (tmp_path / "run" / "config.yaml").write_text("# mocme_dist 0\n")
    paths = [f"data.dataset={json.dumps(str(featured_dataset))}", f"run.dir={json.dumps(str(tmp_path / 'run'))}"]
    command = [sys.executable, "-m", "mocme_dist.train", "--set", *TINY, BOTH, *paths, "train.projector=50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "monitoring is off" in line]
    assert f"{tmp_path / 'run'} cannot be written: OSError: [Errno 28] No space left on device" in warning
    assert final_hashes(tmp_path / "run", LAST) == final_hashes(finished_run, LAST)


@pytest.mark.parametrize(
    "rates, how",
    [
        (("train.learning_rate=1e6",), "were not finite"),
        (("entities.learning_rate=1e6",), r"had a loss 1,000 times that of the first step \(1\.83\) or more "),
        (("train.learning_rate=1e3",), r"had a loss 1,000 times that of the first step \(1\.83\) or more "),
    ],
)
def test_row_23_a_rate_that_explodes_ends_the_run_as_diverged(featured_dataset, tmp_path, rates, how):
    with pytest.raises(
        DivergedError, match=rf"step 1[12]: 1[01] steps in a row {how}.*lower train.learning_rate and ent"
    ):
        train(tiny_config(featured_dataset, tmp_path / "run", BOTH, *rates))
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5) and not (tmp_path / "run" / "metrics.json").exists()


def test_row_23_a_resumed_run_compares_with_its_own_first_step(featured_dataset, tmp_path):
    """The loss at which a run exploded is not the one that the next attempt begins with."""
    config = tiny_config(
        featured_dataset, tmp_path / "run", BOTH, "train.learning_rate=1e3", "train.checkpoint_steps=5"
    )
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"step 12: 11 steps in a row had a loss"):
            train(config)
        config = tiny_config(featured_dataset, tmp_path / "run", BOTH, "train.learning_rate=1e3", "run.resume='10'")


@pytest.mark.parametrize("place", ["extraction", "training", "evaluation"])
def test_row_46_a_run_that_works_in_silence_beats_in_its_status(
    featured_dataset, tiny_raw, tmp_path, monkeypatch, place
):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(status, "BEAT_S", 0.05)

    def slow(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(seen) < 3:
                deadline = time.monotonic() + 30
                while len({each["updated"] for each in seen}) < 3 and time.monotonic() < deadline:
                    seen.append(json.loads((tmp_path / "run" / "run_status.json").read_text()))
                    time.sleep(0.02)
            return function(*args, **kwargs)

        return call

    module, name = {
        "extraction": (extractor, "extract_shard"),
        "training": (loop, "train_step"),
        "evaluation": (Worker, "rank"),
    }[place]
    monkeypatch.setattr(module, name, slow(getattr(module, name)))
    data = f"data.raw={json.dumps(str(tiny_raw))}" if place == "extraction" else "train.epochs=1"
    dataset = tmp_path / "dataset" if place == "extraction" else featured_dataset
    train(tiny_config(dataset, tmp_path / "run", BOTH, data))
    times = sorted({each["updated"] for each in seen})
    assert len(times) >= 3 and all(each["state"] == "running" for each in seen)
    word = {"extraction": "extract", "training": "training: ", "evaluation": "training: 9/9"}[place]
    assert re.search(word, seen[-1]["stage"]), seen[-1]
    end = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (end["state"], end["exit_code"]) == ("done", 0) and "stage" not in end
