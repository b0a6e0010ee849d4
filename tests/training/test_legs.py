"""The legs of a run: what a resume may change and says, what a finished run refuses, and that nothing is forgotten."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_run import STEPS_PER_EPOCH, losses, tiny_config

from mocme_dist.config import load_config
from mocme_dist.errors import ConfigError, DataError, Preempted
from mocme_dist.runs.task import run_training
from mocme_dist.train import train
from mocme_dist.training import loop
from mocme_dist.training.worker import Worker

LAST = 3 * STEPS_PER_EPOCH
BOTH = "modalities=[structure, numeric]"


def files(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(run_dir: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((run_dir / "checkpoints" / f"step_{step:010d}" / "MANIFEST.json").read_text()))


def legs(run_dir: Path) -> list[str]:
    """The history at the top of config.yaml, without its dates."""
    lines = (run_dir / "config.yaml").read_text().splitlines()
    assert lines[0].startswith("# mocme_dist ")
    found = [line.removeprefix("# ") for line in lines[1:] if line.startswith("#")]
    assert all(" UTC" in line for line in found)
    return [line.partition(", ")[0] + line.partition(" UTC")[2] for line in found]


def test_the_command_of_a_finished_run_prints_its_report_and_changes_nothing(featured_dataset, run_copy):
    before = files(run_copy)
    report = train(tiny_config(featured_dataset, run_copy, BOTH))
    assert report == json.loads((run_copy / "metrics.json").read_text()) and files(run_copy) == before
    # Where and how a run computes does not change what it found.
    assert train(tiny_config(featured_dataset, run_copy, BOTH, "launch.workers=1", "evaluation.tile_rows=32")) == report
    assert files(run_copy) == before


@pytest.mark.parametrize(
    "asked, lines",
    [
        (
            ("train.epochs=2", "train.learning_rate=0.5"),
            ["train.epochs 3 -> 2", "train.learning_rate 0.01 -> 0.5"],
        ),
        (
            ("train.seed=5", "negatives.weighting=uniform"),
            ["train.seed 0 -> 5", "negatives.weighting entropy -> uniform"],
        ),
        (("blend.frequency=false",), ["blend.frequency true -> false"]),
        # The ranks are asked, since steps might be left: none are, with this patience.
        (("train.patience=9", "mine.every=2"), ["train.patience 0 -> 9", "mine.every 1 -> 2"]),
    ],
)
def test_a_finished_run_says_what_was_asked_for_and_keeps_its_record(featured_dataset, run_copy, asked, lines):
    before = files(run_copy)
    with pytest.raises(ConfigError, match=rf"(?s)this run finished at step {LAST}.*--resume none") as error:
        train(tiny_config(featured_dataset, run_copy, BOTH, *asked))
    assert sorted(str(error.value).split("\n  ")[1:]) == sorted(lines) and error.value.exit_code == 2
    assert files(run_copy) == before


def test_a_mistyped_command_leaves_a_finished_run_finished(featured_dataset, run_copy, tmp_path):
    before = files(run_copy)
    with pytest.raises(DataError, match="nowhere"):
        train(tiny_config(tmp_path / "nowhere", run_copy, BOTH, "train.epochs=4"))
    with pytest.raises(DataError, match="no audio in this data set"):
        train(tiny_config(featured_dataset, run_copy, "modalities=[structure, audio]", "train.epochs=4"))
    assert files(run_copy) == before
    # One whose process was killed is not running any more, whatever it wrote last.
    status = json.loads((run_copy / "run_status.json").read_text())
    (run_copy / "run_status.json").write_text(json.dumps({**status, "state": "running"}))
    with pytest.raises(DataError, match="nowhere"):
        train(tiny_config(tmp_path / "nowhere", run_copy, BOTH, "train.epochs=4"))
    after = json.loads((run_copy / "run_status.json").read_text())
    assert (after["state"], after["error"], after["step"]) == ("failed", "its process was killed", LAST)


def test_more_epochs_go_on_where_the_run_ended_and_say_what_changed(featured_dataset, run_copy, caplog):
    before = json.loads((run_copy / "metrics.json").read_text())
    with caplog.at_level(logging.INFO):
        report = train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4", "train.learning_rate=0.03"))
    said = [record.getMessage() for record in caplog.records]
    at = next(number for number, line in enumerate(said) if line.startswith(f"resuming from step {LAST} of 36"))
    changed = ["train.epochs 3 -> 4", "train.learning_rate 0.01 -> 0.03"]
    assert said[at + 1 : at + 3] == [f"changed: {line}" for line in changed]
    assert report["step"] <= 36 and list(losses(run_copy)) == list(range(3, 37, 3))
    assert legs(run_copy) == ["leg 1: from step 0", f"leg 2: from step {LAST}; {'; '.join(changed)}"]
    assert load_config([run_copy / "config.yaml"]).train.epochs == 4
    # Time of both legs.
    first, both = (manifest_of(run_copy, step)["monitor"]["seconds"] for step in (LAST, 36))
    assert 0 < first < both < report["seconds"] + 0.1 and report["seconds"] > before["seconds"] / 2


def test_starting_anew_begins_a_new_history(featured_dataset, run_copy):
    train(tiny_config(featured_dataset, run_copy, BOTH, "run.resume=none", "train.epochs=1", "train.seed=1"))
    assert legs(run_copy) == ["leg 1: from step 0"]


def test_fewer_epochs_than_were_trained_are_refused_before_the_end_too(featured_dataset, tmp_path):
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH)
    Path(config.run.dir, "checkpoints").mkdir(parents=True)
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        run_training(config, lambda: next(asked) >= STEPS_PER_EPOCH + 2)
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"\n  train.epochs 3 -> 1$"):
        run_training(tiny_config(featured_dataset, tmp_path / "run", BOTH, "train.epochs=1"))
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH + 1])
def test_a_resume_remembers_the_best_metric_and_the_patience(featured_dataset, tmp_path, monkeypatch, stop):
    """The first evaluation is the best, and with a patience of 2 the third is the last, wherever the run is stopped."""
    valid_mrr = iter([0.5, 0.3, 0.4])
    original = Worker.evaluate

    def evaluate(self: Any, split: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = original(self, split, *args, **kwargs)
        return metrics | {"mrr": next(valid_mrr, 0.2)} if split == "valid" else metrics

    monkeypatch.setattr(Worker, "evaluate", evaluate)
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH, "train.patience=2", "train.epochs=9")
    Path(config.run.dir, "checkpoints").mkdir(parents=True)
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        run_training(config, lambda: next(asked) >= stop)
    report = run_training(config)
    assert report["step"] == STEPS_PER_EPOCH and max(losses(tmp_path / "run")) == LAST
    last = manifest_of(tmp_path / "run", LAST)
    assert (last["best_mrr"], last["bad_evaluations"]) == (0.5, 2)


def test_a_resume_counts_skipped_steps_on(featured_dataset, tmp_path, monkeypatch):
    """Steps that were not finite before the stop still count, in the curve and against train.max_nonfinite."""
    original, calls = loop.train_step, itertools.count(1)

    def train_step(engine: Any, table: Any, parts: Any, *args: Any, **kwargs: Any) -> Any:
        parts = list(parts)
        if 4 <= next(calls) <= 8:
            parts[0].rows_VD.data[0, 0] = math.nan
        return original(engine, table, parts, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH, "train.epochs=1", "train.max_nonfinite=5")
    Path(config.run.dir, "checkpoints").mkdir(parents=True)
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        run_training(config, lambda: next(asked) >= 5)
    with pytest.raises(loop.DivergedError, match="step 8: 5 steps in a row"):
        run_training(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/skipped_steps"] for line in lines] == [0, 3, 5]


@pytest.mark.parametrize("stops", [[], [5]])
def test_information_is_estimated_at_every_nth_step_of_the_run(featured_dataset, tmp_path, monkeypatch, stops):
    """The moving averages move at steps 0, 3 and 6 and at no other, also when the run is stopped in between."""
    original, moved = loop.train_step, list[bool]()

    def train_step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = engine.module.model.fusion.inter
        before = pairs.log_mean_exp_P.clone()
        result = original(engine, *args, **kwargs)
        moved.append(not bool((pairs.log_mean_exp_P == before).all()))
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH, "train.epochs=1", "mine.every=3")
    Path(config.run.dir, "checkpoints").mkdir(parents=True)
    for stop in stops:
        asked = itertools.count(1)
        with pytest.raises(Preempted):
            run_training(config, lambda asked=asked, stop=stop: next(asked) >= stop)  # type: ignore[misc]
    run_training(config)
    assert [step for step, was in enumerate(moved) if was] == [0, 3, 6] and len(moved) == STEPS_PER_EPOCH
