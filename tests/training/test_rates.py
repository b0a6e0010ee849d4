"""Schedules.

Values in closed form, rows and groups that follow them, and resumed runs that end in the bits of whole ones.
"""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch
from tiny_run import STEPS_PER_EPOCH, final_hashes, tiny_config

from mocme_dist.errors import Preempted
from mocme_dist.parallel.comm import communication
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.runs.task import run_training
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.rates import Schedule

BOTH = "modalities=[structure, numeric]"
LINEAR = ("train.schedule=linear", "train.warmup_steps=4")


def test_factors_rise_in_a_line_and_end_at_zero():
    found = {
        kind: [Schedule(kind, 4, 12).factor(step) for step in range(13)] for kind in ("constant", "linear", "cosine")
    }
    for factors in found.values():
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found["constant"][4:] == [1.0] * 9
    assert found["linear"][4:] == pytest.approx([1 - k / 8 for k in range(9)], abs=1e-15)
    halves = [math.cos(math.pi * k / 16) ** 2 for k in range(9)]  # (1 + cos 2x) / 2
    assert found["cosine"][4:] == pytest.approx(halves, abs=1e-15)
    assert [Schedule("linear", 0, 4).factor(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert Schedule("cosine", 9, 5).factor(4) == pytest.approx(5 / 9), "a run that ends while it warms up"


def test_what_a_longer_run_changes_is_said_once_there_is_something_to_say():
    saved = Schedule("linear", 0, 10).to_json()
    assert Schedule("linear", 0, 10).changed_from(saved, 5) is None
    assert Schedule("constant", 0, 99).changed_from(Schedule("constant", 0, 10).to_json(), 5) is None
    assert Schedule("constant", 0, 99).changed_from(None, 5) is None, "a checkpoint from before there were schedules"
    message = Schedule("linear", 0, 40).changed_from(saved, 5)
    assert message == (
        "the schedule of the learning rates is now linear to zero at step 40, and was linear to zero at step 10; "
        "from step 5 they are 0.875 of the full ones, and would have been 0.5"
    )


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_rows_move_as_those_of_a_table_with_the_scaled_rate(kind):
    def make(rate: float) -> EntityTable:
        return EntityTable(RowPartition(9, 1), 0, 4, optimizer=kind, learning_rate=rate, seed=1)

    scaled, plain = make(0.5), make(0.125)
    scaled.scale_rates(0.25)
    for step in range(3):
        gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        for table in (scaled, plain):
            table.update(torch.tensor([1, 2, 5, 8]), gradient)
    assert torch.equal(scaled.rows_rD, plain.rows_rD) and not torch.equal(scaled.rows_rD, make(1.0).rows_rD)


@pytest.mark.parametrize("sharding", ["rows", "zero"])
def test_each_part_of_the_model_has_its_rate(featured_dataset, tmp_path, sharding):
    """Adam's first step moves a parameter by its rate, whatever the gradient's size."""
    rates = ("train.learning_rate=0.001", "relations.learning_rate=0.02", "entities.learning_rate=0.3")
    config = tiny_config(
        featured_dataset, tmp_path / "run", BOTH, *rates, "mine.learning_rate=0.005", f"entities.sharding={sharding}"
    )
    from mocme_dist.training.step import train_step

    with communication(config.launch.timeout_s) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        worker.scale_rates(0.5)
        before = worker.engine.state()
        rows = worker.table.rows_rD.clone()
        prepared = worker.prepare(0)
        parts = worker.micro_batches(prepared, 0)
        train_step(worker.engine, worker.table, parts, comm, worker.tally, estimate=True, timer=worker.timer)
        after = worker.engine.state()
        moved = {name: float((after[name] - before[name]).abs().max()) for name in before if name.startswith("value/")}
        moved["rows"] = float((worker.table.rows_rD - rows).abs().max())
    for name, distance in moved.items():
        part = (
            "rows" if name == "rows" else "mine" if ".mine." in name else "relations" if ".relations." in name else ""
        )
        expected = {"rows": 0.15, "mine": 0.005, "relations": 0.01, "": 0.0005}[part]
        assert distance == pytest.approx(expected, rel=1e-2) or (part == "mine" and distance <= expected), name
    assert max(moved[name] for name in moved if ".mine." in name) == pytest.approx(0.005, rel=1e-2)


def run(dataset: Path, folder: Path, *overrides: str, stop_after: int | None = None) -> None:
    config = tiny_config(dataset, folder, BOTH, "relations.learning_rate=0.03", *overrides)
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    if stop_after is None:
        run_training(config)
        return
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        run_training(config, lambda: next(asked) >= stop_after)


def test_a_resumed_run_follows_the_schedule_bit_for_bit(featured_dataset, tmp_path, caplog):
    last = 2 * STEPS_PER_EPOCH
    caplog.set_level(logging.WARNING)
    run(featured_dataset, tmp_path / "whole", *LINEAR, "train.epochs=2")
    for more in (2, 9):  # stop while it warms up, and at step 11
        run(featured_dataset, tmp_path / "pieces", *LINEAR, "train.epochs=2", stop_after=more)
    run(featured_dataset, tmp_path / "pieces", *LINEAR, "train.epochs=2")
    run(featured_dataset, tmp_path / "constant", "train.epochs=2")
    hashes = [final_hashes(tmp_path / name, last) for name in ("whole", "pieces", "constant")]
    assert hashes[0] == hashes[1] != hashes[2] != {} and "schedule" not in caplog.text


def test_more_epochs_follow_the_longer_schedule_and_say_so(featured_dataset, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run(featured_dataset, tmp_path / "run", *LINEAR, "train.epochs=1")
    run(featured_dataset, tmp_path / "run", *LINEAR, "train.epochs=2")
    assert "is now linear to zero at step 18, warm-up 4 steps, and was linear to zero at step 9" in caplog.text
    assert f"they are {9 / 14:.3g} of the full ones, and would have been 0" in caplog.text
