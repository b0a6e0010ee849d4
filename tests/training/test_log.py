"""What a run shows: pictures, progress lines, curves that stay whole, and a writer that may die."""

from __future__ import annotations

import json
import logging
import re
import time

import numpy as np
import pytest

from mocme_dist.training.log import Progress, RunLog, duration, heat_map


def test_a_heat_map_runs_from_white_to_dark_and_shows_missing_values_grey():
    picture = heat_map(np.array([[0.0, 1.0], [9.0, np.nan]]), peak=2.0, cell=4)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [255, 255, 255] and picture[4, 0].tolist() == [8, 48, 107]
    assert picture[4, 4].tolist() == [160, 160, 160] and picture[3, 4].tolist() == picture[0, 7].tolist() == [131, 151, 181]
    assert (heat_map(np.zeros((1, 1)), peak=0.0) == 255).all()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (86399.9, "24:00:00")])
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


def test_progress_speaks_at_intervals_and_at_the_end(caplog):
    with caplog.at_level(logging.INFO):
        quiet, often = Progress("pack", 3, True, 60), Progress("evaluate", 3, True, 0)
        for done in (1, 2, 3):
            time.sleep(0.01)
            quiet(done)
            often(done, "loss 0.5")
        Progress("hidden", 1, False, 0)(1)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == ["evaluate 1/3", "evaluate 2/3", "pack 3/3", "evaluate 3/3"]
    assert lines[0] == "evaluate 1/3, loss 0.5"
    assert all(line.endswith("left, loss 0.5") for line in lines[1:] if line.startswith("evaluate"))


def test_a_first_step_that_compiles_does_not_count_in_the_time_left(caplog):
    with caplog.at_level(logging.INFO):
        progress = Progress("step", 1000, True, 0)
        progress.start -= 100  # as if it had taken so long
        progress(1)
        time.sleep(0.01)
        progress(2)
    rate = re.search(r"step 2/1000, ([\d.]+)/s", caplog.messages[-1])
    assert rate and float(rate[1]) > 0.1  # with the first step it would be 0.02; the second may take seconds on a busy machine


def test_a_resumed_curve_loses_the_lines_behind_its_step_and_half_lines(tmp_path):
    curve = tmp_path / "metrics.jsonl"
    curve.write_text('{"step": 3, "a": 1}\n{"step": 6}\n{"step": 9}\n[1]\n{"st')
    log = RunLog(curve, tmp_path / "tensorboard", True, 6)
    log.line({"step": 7, "loss": float("nan"), "norm": float("inf"), "name": "x"})
    log.close()
    lines = curve.read_text().splitlines()
    assert lines == ['{"step": 3, "a": 1}', '{"step": 6}', '{"step": 7, "loss": null, "norm": null, "name": "x"}']
    assert all(json.loads(line) for line in lines)


def test_a_writer_that_fails_is_switched_off_with_one_warning(tmp_path, caplog):
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", True, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    log._writer.add_scalar = full
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            log.scalars(step, {"a": 1.0})
            log.line({"step": step})
            log.heat_map("m", step, np.zeros((2, 2)), 1.0)
        log.flush()
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "monitoring is off from here on: OSError: [Errno 28] No space left on device"
    ]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", False, 0)
    log.line({"step": 1})
    log.scalars(1, {"a": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
