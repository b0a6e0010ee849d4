"""The trace that `train --profile` leaves, what the phase timer adds up, and what it costs."""

from __future__ import annotations

import gzip
import json
import time

import pytest
import tiny_run

from mocme_dist.observe import profiler
from mocme_dist.observe.profiler import PhaseTimer, StepProfiler, phase_table
from mocme_dist.train import train


def test_a_profiled_run_leaves_a_trace_of_its_phases_and_a_table(featured_dataset, tmp_path, caplog):
    path = tmp_path / "run"
    with caplog.at_level("INFO"):
        train(
            tiny_run.tiny_config(
                featured_dataset, path, "modalities=[structure, numeric]", "train.epochs=2", "run.profile=3"
            )
        )
    (trace,) = (path / "profile").glob("*.json.gz")
    assert trace.name == "rank0_steps_6-8.pt.trace.json.gz"
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in ("wait", "lookup", "encode", "exchange", "loss", "agree", "backward", "update"):
        assert ranges.count(phase) == 3, phase
    table = (path / "profile" / "phases.txt").read_text()
    assert "steps 6 to 8 of rank 0" in table and "(between phases)" in table and "aten::" in table
    assert "open" in caplog.text and trace.name in caplog.text


def test_a_run_that_ends_early_leaves_the_steps_there_were(tmp_path):
    timer = PhaseTimer()
    tracer = StepProfiler(tmp_path, 100, 1, timer)
    with tracer.running():
        for step in range(41, 41 + profiler.WARMUP_STEPS + 2):
            with timer.phase("work"):
                pass
            tracer.step(step)
    assert [path.name for path in tmp_path.iterdir()] == ["rank1_steps_46-47.pt.trace.json.gz"]


def test_a_profile_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracer = StepProfiler(tmp_path / "file", 1, 0, PhaseTimer())
    with tracer.running():
        for step in range(1, 10):
            tracer.step(step)
    assert "the profile is not written" in caplog.text


def test_phases_add_up_and_the_rest_is_told():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("one"):
            time.sleep(0.002)
    with pytest.raises(ValueError), timer.phase("two"):
        raise ValueError
    assert timer.take().keys() == {"one", "two"} and timer.take() == {}
    assert timer.total["one"] >= 0.004
    lines = phase_table({"one": 0.6, "two": 0.3}, 1.0, 10).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["one", "60.00", "60.0%"],
        ["two", "30.00", "30.0%"],
        ["(between", "phases)", "10.00", "10.0%"],
        ["step", "100.00", "100.0%"],
    ]


def test_a_phase_costs_microseconds():
    """Eight phases a step: at 20 microseconds of CPU each still under a percent of a step of 20 ms."""
    timer, best = PhaseTimer(), 1.0
    for _ in range(20):
        start = time.thread_time()
        for _ in range(1000):
            with timer.phase("phase"):
                pass
        best = min(best, (time.thread_time() - start) / 1000)
    assert best < 20e-6
