"""Signals fall anywhere: the state says preempted, the exit code is 75, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import STEPS_PER_EPOCH, tiny_config

import mocme_dist.train as command
from mocme_dist import commands
from mocme_dist.data import packing
from mocme_dist.encoders import extractor
from mocme_dist.errors import Preempted
from mocme_dist.runs import launch, stopping, task
from mocme_dist.train import train
from mocme_dist.training import loop
from mocme_dist.training.worker import Worker

BOTH = "modalities=[structure, numeric]"
LAST = 3 * STEPS_PER_EPOCH


@pytest.fixture(autouse=True)
def as_a_command() -> Iterator[None]:
    """The handler that every command runs under."""
    previous = signal.signal(signal.SIGTERM, commands.interrupt)
    yield
    assert signal.getsignal(signal.SIGTERM) is commands.interrupt, "a handler was left behind"
    signal.signal(signal.SIGTERM, previous)


def signalled(function: Callable[..., Any], *numbers: signal.Signals, when: Callable[..., bool] | None = None) -> Any:
    """`function`, sending this process signals once, before it begins."""
    left = list(numbers)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when is None or when(*args, **kwargs):
            while left:
                os.kill(os.getpid(), left.pop(0))
        return function(*args, **kwargs)

    return call


def status_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "run_status.json").read_text()))


PLACES = {
    "packing": (packing, "write_graph", None),
    "extraction": (extractor, "extract_shard", None),
    "planning": (command, "plan_of", None),
    "loading": (task, "open_dataset", None),
    "evaluation": (Worker, "rank", lambda worker, split, *_, **__: split == "test"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
@pytest.mark.parametrize("place", PLACES)
def test_where_there_is_nothing_to_save_a_signal_ends_the_command(tiny_raw, tmp_path, monkeypatch, place, number):
    module, name, when = PLACES[place]
    config = tiny_config(tmp_path / "dataset", tmp_path / "run", BOTH, f"data.raw={json.dumps(str(tiny_raw))}")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled(getattr(module, name), number, when=when))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("preempted", 75) and status["error"].startswith("Preempted: ")
    assert status.get("step") == (LAST if place == "evaluation" else None)
    assert not (tmp_path / "run" / "lock").exists() and not (tmp_path / "run" / "stop").exists()
    assert train(config)["num_queries"] == 72 and status_of(tmp_path / "run")["state"] == "done"


def test_a_second_signal_does_not_wait_for_the_step(featured_dataset, tmp_path, monkeypatch):
    count = iter(range(1, 100))
    in_step_4 = lambda *_, **__: next(count) == 4  # noqa: E731
    twice = signalled(loop.train_step, signal.SIGINT, signal.SIGINT, when=in_step_4)
    monkeypatch.setattr(loop, "train_step", twice)
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH)
    with pytest.raises(KeyboardInterrupt, match="twice"):
        train(config)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("step", [1, LAST])
def test_a_signal_between_steps_saves_and_ends_before_the_final_evaluation(
    featured_dataset, tmp_path, monkeypatch, step
):
    before_step = lambda *_, **__: next(count) == step  # noqa: E731
    count = iter(range(1, 100))
    monkeypatch.setattr(loop, "train_step", signalled(loop.train_step, signal.SIGTERM, when=before_step))
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH)
    # The flag of a step is read before it: this one is seen at the next, or after the last.
    with pytest.raises((Preempted, KeyboardInterrupt)):
        train(config)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, min(step + 1, LAST))
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train(config)["step"] <= LAST


def test_a_finished_run_stays_finished_where_a_signal_falls_before_it_goes_on(featured_dataset, run_copy, monkeypatch):
    before = (run_copy / "run_status.json").read_bytes()
    monkeypatch.setattr(command, "plan_of", signalled(command.plan_of, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(featured_dataset, run_copy, BOTH, "train.epochs=4"))
    assert (run_copy / "run_status.json").read_bytes() == before


def test_a_signal_while_another_command_works_ends_it_with_75(featured_dataset, run_copy, monkeypatch, capsys):
    evaluate = signalled(Worker.rank, signal.SIGTERM)
    monkeypatch.setattr(Worker, "rank", evaluate)
    config = tiny_config(featured_dataset, run_copy, BOTH)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(SystemExit) as end:
        commands.run_command(lambda: launch.launch(config, "evaluate", split="test", step="auto"))
    assert end.value.code == 75 and "interrupted (SIGTERM); run the same command again" in capsys.readouterr().err
    assert not list(run_copy.glob("metrics.*.json"))
    signal.signal(signal.SIGTERM, commands.interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_while_the_interpreter_ends_keeps_the_exit_code(number):
    script = (
        "import atexit, os, signal\n"
        "from mocme_dist.commands import run_command\n"
        f"send = lambda: os.kill(os.getpid(), {int(number)})\n"
        "atexit.register(send)\n"
        "run_command(send)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75 and "Traceback" not in ended.stderr, ended.stderr


def test_a_second_signal_before_the_first_is_recorded_does_not_leave_the_run_running(tiny_raw, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "dataset", tmp_path / "run", BOTH, f"data.raw={json.dumps(str(tiny_raw))}")
    monkeypatch.setattr(command, "plan_of", signalled(command.plan_of, signal.SIGINT))
    monkeypatch.setattr(stopping, "signals_blocked", signalled(stopping.signals_blocked, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
