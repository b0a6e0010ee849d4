"""Rows 45, 47 and 49 of the fault matrix: seeds, runs side by side, clocks that jump, and an evaluation that was cut short."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_harness import ROOT
from tiny_run import STEPS_PER_EPOCH, TINY, curve, final_hashes, losses, tiny_config

from mocme_dist.train import train
from mocme_dist.training import loop

BOTH, LAST = "modalities=[structure, numeric]", 3 * STEPS_PER_EPOCH


def report(run_dir: Path) -> dict[str, Any]:
    return {**json.loads((run_dir / "metrics.json").read_text()), "seconds": 0}


def test_a_seed_decides_every_bit_and_another_seed_others(featured_dataset, finished_run, tmp_path):
    train(tiny_config(featured_dataset, tmp_path / "same", BOTH))
    assert final_hashes(tmp_path / "same", LAST) == final_hashes(finished_run, LAST)
    assert report(tmp_path / "same") == report(finished_run) and losses(tmp_path / "same") == losses(finished_run)
    train(tiny_config(featured_dataset, tmp_path / "other", BOTH, "train.seed=1"))
    assert losses(tmp_path / "other") != losses(finished_run)


@pytest.mark.slow
def test_two_runs_side_by_side_do_not_meet(featured_dataset, finished_run, tmp_path):
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
        assert final_hashes(tmp_path / name, LAST) == final_hashes(finished_run, LAST) and report(tmp_path / name) == report(finished_run)


def test_a_clock_that_jumps_back_an_hour_changes_nothing(featured_dataset, finished_run, tmp_path, monkeypatch):
    real, started = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (real() - started > 0.3))
    result = train(tiny_config(featured_dataset, tmp_path / "run", BOTH))
    assert time.time() < started, "it has jumped"
    assert 0 < result["seconds"] < 300
    assert final_hashes(tmp_path / "run", LAST) == final_hashes(finished_run, LAST)
    steps = [line["step"] for line in curve(tmp_path / "run") if "train/loss" in line]
    assert steps == sorted(set(steps)) and all(line.get("elapsed_s", 1) > 0 for line in curve(tmp_path / "run"))


def test_an_evaluation_that_is_cut_short_reports_nothing_and_is_made_again(featured_dataset, finished_run, tmp_path, monkeypatch):
    evaluate = loop.Worker.evaluate

    class Cut(BaseException):
        """As sudden as a signal."""

    def cut(self: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        result = evaluate(self, split, *args, **kwargs)
        if split == "test":
            raise Cut
        return result

    config = tiny_config(featured_dataset, tmp_path / "run", BOTH)
    monkeypatch.setattr(loop.Worker, "evaluate", cut)
    with pytest.raises(Cut):
        train(config)
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr(loop.Worker, "evaluate", evaluate)
    train(config)
    assert report(tmp_path / "run") == report(finished_run)
