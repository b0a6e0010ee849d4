"""Long work shows that it is alive: a line after each silence, a bar on a terminal, a worker's stages at the driver."""

from __future__ import annotations

import io
import json
import logging
import re
import time

import pytest

from mocme_dist import console
from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data import progress
from mocme_dist.data.packing import pack_folder
from mocme_dist.data.progress import Progress, duration, forget_workers, show_worker
from mocme_dist.encoders.pipeline import extract_features


@pytest.fixture
def impatient(monkeypatch, caplog):
    """Lines after a twentieth of a second of silence; the log that they reach."""
    monkeypatch.setattr(progress, "SILENCE_S", 0.05)
    monkeypatch.setattr(progress, "_LOOK_S", 0.01)
    with caplog.at_level(logging.INFO):
        yield caplog


def wait_for(text: str, caplog) -> None:
    deadline = time.monotonic() + 60
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in caplog.text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (86399.9, "24:00:00")]
)
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


def test_silent_work_shows_life_without_progress(impatient):
    with Progress("work", 10, "things") as stage:
        wait_for("work: 0/10 things, 0:00 so far", impatient)
        stage.add(5)
        stage.add(1, "loss 0.5")
        wait_for("work: 6/10 things", impatient)
        wait_for("left, loss 0.5", impatient)
    with Progress("starting"):
        wait_for("starting, 0:00 so far", impatient)


def test_the_innermost_stage_speaks_and_nothing_does_while_lines_are_written(impatient):
    with Progress("outer"), Progress("inner"):
        wait_for("inner, 0:00 so far", impatient)
        impatient.clear()
        for _ in range(100):
            console.spoke()  # as every line does
            time.sleep(0.001)
    assert "outer" not in impatient.text and impatient.messages.count("inner, 0:00 so far") <= 1


def test_hidden_stages_say_nothing(impatient):
    with Progress("hidden", 1, active=False) as stage:
        stage.add()
        time.sleep(0.2)
    assert impatient.messages == []


def test_what_comes_before_the_first_unit_does_not_count_in_the_time_left():
    stage = Progress("training", 1000, "steps")
    stage._began -= 100  # as if the first step had compiled for so long
    stage.raise_to(1)
    time.sleep(0.01)
    stage.raise_to(2, "loss 0.5")
    rate = re.search(r"training: 2/1,000 steps, ([\d.]+)/s, [\d:]+ left, loss 0.5", stage.line())
    assert rate and float(rate[1]) > 0.1  # with the first step it would be 0.02


def test_a_resumed_stage_counts_from_where_it_starts():
    stage = Progress("training", 10, "steps", start=6)
    stage.raise_to(7)
    time.sleep(0.01)
    stage.raise_to(8)
    assert stage.line().startswith("training: 8/10 steps, ") and stage.done == 8
    stage.raise_to(3)
    assert stage.done == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    with Progress("packing", 4, "shards") as stage:
        stage.add(2, "note")
        console.write_line("a line")
        stage.refresh()
    text = screen.getvalue()
    assert "packing:" in text and "2/4" in text and "note" in text and "a line\n" in text
    assert not text.endswith("\n")  # the bar is gone, the line stays


def test_a_workers_stage_is_shown_by_the_driver(monkeypatch, capsys, impatient):
    monkeypatch.setattr(console._output, "rank", "0")
    monkeypatch.setattr(progress, "_SEND_S", 0.0)
    with Progress("training", 4, "steps") as stage:
        stage.add(1, "loss 0.5")
        stage.add(2, "loss 0.4")
    sent = capsys.readouterr().err.splitlines()
    monkeypatch.setattr(console._output, "rank", None)
    states = [console._parts(line) for line in sent]
    assert [kind for kind, _, _ in states] == ["P"] * 4
    for _, _, text in states[:3]:
        show_worker("here:1", json.loads(text))
    wait_for("training: 3/4 steps", impatient)
    wait_for("loss 0.4", impatient)
    show_worker("here:1", json.loads(states[3][2]))
    assert not progress._stages.twins
    show_worker("here:1", json.loads(states[0][2]))
    forget_workers()  # it was lost
    assert not progress._stages.twins and not progress._stages.open


def test_packing_and_statistics_count_entities_to_the_last(tiny_raw, tmp_path, monkeypatch):
    closed = {}

    def close(stage: Progress, *_: object) -> None:
        closed[stage.name] = stage.done, stage.total, stage.unit
        progress._stages.leave(stage)

    monkeypatch.setattr(Progress, "__exit__", close)
    dataset = pack_folder(tiny_raw, tmp_path / "packed", DataConfig(shard_rows=16))
    extract_features(dataset, EncodersConfig(), (), ("numeric",), use_ray=False)
    assert closed["packing"] == (60, 60, "entities")
    assert closed["numeric statistics"] == closed["extract"] == (60, 60, "rows")
