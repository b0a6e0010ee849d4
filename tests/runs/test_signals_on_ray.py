"""On real Ray: a signal at any stage, and the death of Ray itself, leave the documented state and exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_harness import Command, progress, train_arguments

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def status(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run_status.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def pid_of(command: Command, name: str) -> int | None:
    """The child whose program has this name."""
    for pid in command.descendants():
        try:
            if Path(os.readlink(f"/proc/{pid}/exe")).name == name:
                return pid
        except OSError:
            continue
    return None


STAGES: dict[str, Callable[[Command, Path], Any]] = {
    "Ray starts": lambda command, run_dir: pid_of(command, "gcs_server"),
    "workers start": lambda command, run_dir: list(run_dir.glob("ray/train-*")),
    "final evaluation": lambda command, run_dir: re.search(r'"ended": true', signs(run_dir)),
}


def signs(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("ray/train-*/ranks/*.json"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_the_command_within_ten_seconds_as_preempted(featured_dataset, tmp_path, stage):
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, "train.epochs=1", "launch.workers=1")
    with Command(tmp_path, *arguments, MOCME_TEST_SLOW_TEST="60") as command:
        command.wait_for(lambda: STAGES[stage](command, run_dir))
        command.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        code, last = command.end()
        took = time.monotonic() - begun
    assert (code, last) == (75, ""), command.text[-4000:]
    assert (status(run_dir)["state"], status(run_dir)["exit_code"]) == ("preempted", 75)
    assert took < 30 and "Traceback" not in command.text, (took, command.text[-4000:])
    assert not (run_dir / "lock").exists()


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        # It says that it is going before it closes a connection; tools/soak.py kills one at once.
        ("raylet", signal.SIGTERM, "its raylet on this machine is gone"),
        ("gcs_server", signal.SIGKILL, "its GCS at .* has not answered"),
    ],
)
def test_the_death_of_ray_is_a_failure_with_its_code(featured_dataset, tmp_path, name, number, said):
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, "train.epochs=10000", "launch.workers=1")
    with Command(tmp_path, *arguments, MOCME_TEST_GCS_SILENT="6") as command:
        command.wait_for(lambda: progress(run_dir))
        pid = pid_of(command, name)
        assert pid is not None
        os.kill(pid, number)
        code, last = command.end()
    assert (code, last) == (70, ""), command.text[-4000:]
    assert re.search(rf"error: RankError: Ray was lost: {said}", command.text)
    now = status(run_dir)
    assert (now["state"], now["exit_code"]) == ("failed", 70) and "Ray was lost" in now["error"]


def test_a_stopped_raylet_does_not_hold_a_finished_command(featured_dataset, tmp_path):
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, "train.epochs=1", "launch.workers=1")
    with Command(tmp_path, *arguments, MOCME_TEST_SLOW_TEST="2", MOCME_TEST_LEAVE="4") as command:
        command.wait_for(lambda: STAGES["final evaluation"](command, run_dir))
        raylet = pid_of(command, "raylet")
        assert raylet is not None
        os.kill(raylet, signal.SIGSTOP)
        code, last = command.end()
    assert code == 0 and "mrr" in json.loads(last), command.text[-4000:]
    assert "has not answered for 4 s, so this command ends without leaving it" in command.text
    assert status(run_dir)["state"] == "done" and not (run_dir / "lock").exists()
    command.wait_until_gone(raylet)
