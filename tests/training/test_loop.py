"""A run: what it writes, that stopping and resuming change nothing, and that what is not finite moves nothing."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import STEPS_PER_EPOCH, curve, final_hashes, losses, tiny_config

from mocme_dist.config import load_config
from mocme_dist.errors import CheckpointError, DivergedError, Preempted
from mocme_dist.model.mocme import MoCME
from mocme_dist.runs.launch import launch
from mocme_dist.runs.task import run_training
from mocme_dist.train import train
from mocme_dist.training import loop
from mocme_dist.training.worker import Worker

LAST = 3 * STEPS_PER_EPOCH
BOTH = "modalities=[structure, numeric]"
DROPOUT = ("projection.dropout=0.2", "experts.dropout=0.2")
METRICS = {"mrr", "hits@1", "hits@3", "hits@10", "mr"}


def stop_at(step: int) -> Any:
    """Asked once a step; True from the given step on."""
    asked = itertools.count(1)
    return lambda: next(asked) >= step


def tags(run_dir: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return {
        "scalars": {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]},
        "all": events,
    }


def test_the_loss_falls_and_every_interval_has_a_line(finished_run):
    by_step = losses(finished_run)
    assert list(by_step) == list(range(3, LAST + 1, 3))
    assert by_step[LAST] < by_step[3]
    evaluations = [line for line in curve(finished_run) if "valid/mrr" in line]
    assert [line["step"] for line in evaluations] == [9, 18, 27] and [line["epoch"] for line in evaluations] == [
        1,
        2,
        3,
    ]


def test_the_report_has_the_promised_fields(finished_run):
    report = json.loads((finished_run / "metrics.json").read_text())
    assert {
        "split",
        *METRICS,
        "head",
        "tail",
        "seen",
        "unseen",
        "num_queries",
        "by_relation",
        "by_relation_type",
        "by_degree",
        "baselines",
        "without_source",
        "valid_mrr",
        "step",
        "epoch",
        "seconds",
    } == report.keys()
    assert report["split"] == "test" and report["num_queries"] == 72
    assert report["head"].keys() == report["tail"].keys() == METRICS
    assert report["mrr"] == pytest.approx((report["head"]["mrr"] + report["tail"]["mrr"]) / 2)
    assert 0 < report["hits@1"] <= report["mrr"] <= 1 <= report["mr"] <= 60
    status = json.loads((finished_run / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"], status["last_checkpoint"]) == (
        "done",
        0,
        LAST,
        f"step_{LAST:010d}",
    )
    assert load_config([finished_run / "config.yaml"]).run.dir == str(finished_run)
    assert not (finished_run / "lock").exists() and not (finished_run / "stop").exists()


def test_tensorboard_holds_the_promised_curves_maps_and_settings(finished_run):
    found = tags(finished_run)
    names = [
        "loss",
        "loss_positive",
        "loss_negative",
        "loss_mine",
        "queries_per_s",
        "gradient_norm_dense",
        "gradient_norm_rows",
    ]
    promised = {
        *(f"train/{name}" for name in names),
        *(f"entropy/{name}" for name in ("easy", "ambiguous", "hard")),
        *(
            f"phases/{name}_ms"
            for name in ("wait", "lookup", "encode", "exchange", "loss", "agree", "backward", "update")
        ),
        *(f"fusion/modality/{name}" for name in ("structure", "numeric")),
        *(f"fusion/expert/{name}_{k}" for name in ("structure", "numeric") for k in range(2)),
        *(f"valid/{name}" for name in METRICS),
        "information/inter/structure-numeric",
        "information/intra/numeric_0-numeric_1",
        "warnings/modality_collapse",
        "warnings/no_hard_negative",
        "final/test_mrr",
        "final/valid_mrr",
    }
    assert promised <= found["scalars"].keys()
    assert found["scalars"]["train/loss"] == list(range(3, LAST + 1, 3)) and found["scalars"]["valid/mrr"] == [
        9,
        18,
        27,
    ]
    events = found["all"]
    assert set(events.Tags()["images"]) == {"information/intra", "information/inter"}
    assert [event.step for event in events.Images("information/intra")] == [9, 18, 27]
    assert events.Images("information/intra")[-1].width > events.Images("information/inter")[-1].width
    shares = [events.Scalars(f"entropy/{name}")[-1].value for name in ("easy", "ambiguous", "hard")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_a_stopped_run_saves_and_ends_in_the_bits_of_an_undisturbed_one(featured_dataset, tmp_path, step):
    undisturbed = tiny_config(featured_dataset, tmp_path / "a", BOTH, *DROPOUT, "train.epochs=2")
    stopped = tiny_config(featured_dataset, tmp_path / "b", BOTH, *DROPOUT, "train.epochs=2")
    for config in (undisturbed, stopped):
        Path(config.run.dir, "checkpoints").mkdir(parents=True)
    expected = run_training(undisturbed)
    torch.manual_seed(1234)  # whatever else the process draws
    with pytest.raises(Preempted, match=rf"stopped at step {step} of 18; checkpoint saved"):
        run_training(stopped, stop_at(step))
    report = run_training(stopped)
    assert final_hashes(tmp_path / "a", 18) == final_hashes(tmp_path / "b", 18) != {}
    assert {name: report[name] for name in METRICS} == {name: expected[name] for name in METRICS}
    assert losses(tmp_path / "b") == losses(tmp_path / "a") and len(losses(tmp_path / "a")) == 6
    scalars = tags(tmp_path / "b")["scalars"]
    assert all(len(steps) == len(set(steps)) for tag, steps in scalars.items() if not tag.startswith("final/"))
    # Files of one second are read in the order of their names, where 10 comes before 9.
    assert sorted(scalars["valid/mrr"]) == [9, 18]


def stop_and_resume(comm: Any, dataset: Path, folder: Path, world: int) -> dict[str, float]:
    """Several ranks; one of them alone is told to stop."""
    whole, parts = tiny_config(dataset, folder / "a", BOTH), tiny_config(dataset, folder / "b", BOTH)
    for config in (whole, parts):
        Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    expected = run_training(whole)
    with pytest.raises(Preempted):
        run_training(parts, stop_at(5 if comm.rank == world - 1 else 10**9))
    report = run_training(parts)
    assert {name: report[name] for name in METRICS} == {name: expected[name] for name in METRICS}
    return {name: report[name] for name in METRICS}


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_stop_together_and_resume_exactly(run_ranks, featured_dataset, tmp_path, world, finished_run):
    results = run_ranks(world, stop_and_resume, featured_dataset, tmp_path, world)
    assert final_hashes(tmp_path / "a", LAST) == final_hashes(tmp_path / "b", LAST)
    assert len(final_hashes(tmp_path / "a", LAST)) == world + 1
    assert all(result == results[0] for result in results)
    # The loss curve is that of one rank, but for the order of sums.
    alone = losses(finished_run)
    assert losses(tmp_path / "a") == pytest.approx(alone, rel=1e-3)


def test_evaluation_repeats_the_report_of_the_run_and_leaves_it_as_it_is(featured_dataset, run_copy, caplog):
    text = (run_copy / "metrics.json").read_text()
    before = json.loads(text)
    config = load_config([run_copy / "config.yaml"], [f"run.dir={run_copy}"])
    report = launch(config, "evaluate", split="test", step="auto")
    assert {name: report[name] for name in METRICS} == {name: before[name] for name in METRICS} and report[
        "step"
    ] == before["step"]
    assert json.loads((run_copy / "metrics.test.json").read_text()) == report
    valid = launch(config, "evaluate", split="valid", step="auto")
    assert valid["mrr"] == pytest.approx(before["valid_mrr"], abs=0)
    assert json.loads((run_copy / "metrics.valid.json").read_text()) == valid and valid["split"] == "valid"
    assert (run_copy / "metrics.json").read_text() == text
    # A file that cannot be written costs the file, not the metrics.
    (run_copy / "metrics.valid.json").unlink()
    (run_copy / "metrics.valid.json").mkdir()
    assert launch(config, "evaluate", split="valid", step="auto") == valid and "only printed" in caplog.text
    with pytest.raises(CheckpointError, match="no checkpoint of step 8"):
        launch(config, "evaluate", split="test", step="8")


def test_starting_anew_and_going_back_leave_the_later_checkpoints_aside(featured_dataset, run_copy):
    folder = run_copy / "checkpoints"
    train(tiny_config(featured_dataset, run_copy, BOTH, "run.resume='18'", "train.epochs=3"))
    assert {path.name for path in (folder / "superseded").iterdir()} == {"step_0000000027"}
    assert list(losses(run_copy)) == list(range(3, LAST + 1, 3))
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        train(tiny_config(featured_dataset, run_copy, BOTH, "run.resume='4'"))
    report = train(
        tiny_config(featured_dataset, run_copy, "modalities=[structure]", "run.resume=none", "train.epochs=1")
    )
    assert report["step"] == 9 and [path.name for path in folder.glob("step_*")] == ["step_0000000009"]
    assert list(losses(run_copy)) == [3, 6, 9] and tags(run_copy)["scalars"]["train/loss"] == [3, 6, 9]


def test_patience_ends_the_run_for_good(featured_dataset, tmp_path, monkeypatch):
    # From the second evaluation on nothing is ever better.
    worse = itertools.count()
    original = Worker.evaluate

    def evaluate(self: Any, split: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(self, split, *args, **kwargs) | ({"mrr": 0.5 - 0.01 * next(worse)} if split == "valid" else {})

    monkeypatch.setattr(Worker, "evaluate", evaluate)
    config = tiny_config(
        featured_dataset, tmp_path / "run", BOTH, "train.patience=2", "train.epochs=50", "train.checkpoint_every=50"
    )
    report = train(config)
    assert report["step"] == STEPS_PER_EPOCH  # the best one
    assert max(losses(tmp_path / "run")) == 3 * STEPS_PER_EPOCH
    train(config)
    assert max(losses(tmp_path / "run")) == 3 * STEPS_PER_EPOCH


def everything(worker: Any) -> dict[str, torch.Tensor]:
    """All that a step may move on this rank."""
    table = {"rows": worker.table.rows_rD, **worker.table.state, "updates": torch.tensor(worker.table.num_updates)}
    return {name: value.clone() for name, value in {**table, **worker.engine.state()}.items()}


def bad_steps(comm: Any, dataset: Path, folder: Path, bad: list[int], where: str) -> list[bool]:
    """One rank's rows, or their gradient, are NaN at some steps.

    No rank moves anything there, and the run ends well.
    """
    config = tiny_config(dataset, folder, BOTH, "train.epochs=1", "train.max_nonfinite=3")
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    original, counter, skipped = loop.train_step, itertools.count(1), []

    def train_step(engine: Any, table: Any, parts: Any, *args: Any, **kwargs: Any) -> Any:
        step, parts = next(counter), list(parts)
        rows_VD = parts[-1].rows_VD
        worker = training[0]
        before = everything(worker)
        if step in bad and comm.rank == comm.world_size - 1:
            if where == "rows":
                rows_VD.data[0, 0] = math.nan
            else:
                rows_VD.register_hook(lambda grad: grad * math.nan)
        result = original(engine, table, parts, *args, **kwargs)
        after = everything(worker)
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == result.skipped == (step in bad), step
        skipped.append(result.skipped)
        return result

    training: list[Any] = []
    init = Worker.__init__

    def remember(self: Any, **parts: Any) -> None:
        init(self, **parts)
        training.append(self)

    loop.train_step, Worker.__init__ = train_step, remember  # type: ignore[attr-defined, method-assign]
    try:
        if len(bad) < 3:
            assert run_training(config)["num_queries"] == 72
        else:
            with pytest.raises(
                DivergedError, match=r"step 6: 3 steps in a row were not finite .*; the last checkpoint is of step 0"
            ):
                run_training(config)
    finally:
        loop.train_step, Worker.__init__ = original, init  # type: ignore[attr-defined, method-assign]
    return skipped


@pytest.mark.parametrize("world, where", [(1, "rows"), (2, "rows"), (2, "gradient")])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    run_ranks, featured_dataset, tmp_path, world, where
):
    for skipped in run_ranks(world, bad_steps, featured_dataset, tmp_path / "run", [2, 5], where):
        assert [step for step, was in enumerate(skipped, 1) if was] == [2, 5] and len(skipped) == STEPS_PER_EPOCH
    assert [line["train/skipped_steps"] for line in curve(tmp_path / "run") if "train/loss" in line] == [1, 2, 2]


def test_too_many_of_them_in_a_row_end_the_run(run_ranks, featured_dataset, tmp_path):
    run_ranks(2, bad_steps, featured_dataset, tmp_path / "run", [4, 5, 6], "rows")
    # An interval without a single good step has no loss, and not the best one there is.
    assert losses(tmp_path / "run") == {3: pytest.approx(losses(tmp_path / "run")[3]), 6: None}
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_vectors_that_are_not_finite_are_no_perfect_ranking(featured_dataset, tmp_path, monkeypatch):
    encode = MoCME.encode

    def broken(self: Any, *arguments: Any) -> Any:
        fused = encode(self, *arguments)
        if not self.training:
            fused.z_VD[3] = math.inf
        return fused

    monkeypatch.setattr(MoCME, "encode", broken)
    with pytest.raises(DivergedError, match="vectors are not finite"):
        train(tiny_config(featured_dataset, tmp_path / "run", BOTH))
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["exit_code"] == 5


@pytest.mark.parametrize("loss, weighting", [("one_vs_all", "uniform"), ("contrastive", "self_adversarial")])
def test_the_other_losses_train_too(featured_dataset, tmp_path, loss, weighting):
    config = tiny_config(
        featured_dataset,
        tmp_path / "run",
        f"train.loss={loss}",
        f"negatives.weighting={weighting}",
        "modalities=[structure]",
    )
    train(config)
    by_step = losses(tmp_path / "run")
    assert by_step[LAST] < by_step[3]
