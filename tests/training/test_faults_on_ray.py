"""Rows 1, 2, 5, 8, 9, 10 and 17 of the fault matrix on real workers: killed, stopped, failing, preempted; two runs in one place.

One undisturbed run on two ranks without Ray gives the bits that every disturbed run must end in.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_harness import LINES, Command, checkpoints, progress, ranks, train_arguments
from tiny_run import final_hashes, losses, tiny_config

from mocme_dist.training.loop import run_training

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

LAST, INTERVAL = 180, 20
LENGTH = ("train.epochs=20", f"train.checkpoint_steps={INTERVAL}", "train.eval_every=20", "train.checkpoint_every=20")
# Each checkpoint takes a good part of a second: time to look at the run, and to hit it where it writes.
SLOW = {"MOCME_TEST_SLOW_SYNC": "0.1"}


def undisturbed_rank(comm: Any, dataset: Path, run_dir: Path) -> None:
    config = tiny_config(dataset, run_dir, *LINES, *LENGTH, "deepspeed.engine=deepspeed")
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    run_training(config)


@pytest.fixture(scope="module")
def undisturbed(featured_dataset, tmp_path_factory, run_ranks) -> Path:
    """The run as it should be, on two ranks."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, undisturbed_rank, featured_dataset, path)
    return Path(path)


def assert_equal_to(undisturbed: Path, run_dir: Path) -> None:
    assert final_hashes(run_dir, LAST) == final_hashes(undisturbed, LAST) != {}
    assert losses(run_dir) == losses(undisturbed) and len(losses(run_dir)) == LAST


def assert_nothing_left(command: Command, *but: str) -> None:
    """All that it started is gone soon; `but` names Ray's own helpers that take minutes, they are ended here."""
    deadline = time.monotonic() + 60
    while (left := {pid for pid in command.left() if title(pid) not in but}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {pid: title(pid) for pid in left} == {}
    for pid in command.left():
        os.kill(pid, signal.SIGKILL)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0 ")
    except OSError:
        return ""


def restarted(run_dir: Path, pids: set[int]) -> bool:
    """Whether other processes have taken steps."""
    now = ranks(run_dir)
    return len(now) == 2 and not pids & {sign["pid"] for sign in now} and all(sign["step"] is not None for sign in now)


def writing(run_dir: Path) -> bool:
    """Whether a checkpoint is being written and its manifest is not there yet."""
    temporary = list((run_dir / "checkpoints").glob(".tmp-*"))
    return bool(temporary) and not any("MANIFEST" in path.name for folder in temporary for path in folder.glob("*"))


def strike(command: Command, run_dir: Path, number: int, when: Any, meanwhile: Any = lambda: None) -> tuple[int, float]:
    """Signal rank 1 once `when` holds, and do something else meanwhile; its pid and the seconds until new workers are at work."""
    command.wait_for(when)
    signs = ranks(run_dir)
    os.kill(signs[1]["pid"], number)
    started = time.monotonic()
    meanwhile()
    command.wait_for(lambda: restarted(run_dir, {sign["pid"] for sign in signs}))
    return signs[1]["pid"], time.monotonic() - started


def resumed_at(text: str) -> list[int]:
    return [int(step) for step in re.findall(rf"resuming from step (\d+) of {LAST} \(step_\d+\) with 2 rank\(s\), saved by 2", text)]


def check_losses_of_rank_1(text: str, first: int, second: int, third: int) -> None:
    """What the launcher said of a rank that was killed, killed while it wrote a checkpoint, and stopped."""
    lost = re.findall(
        r"rank 1 \(pid (\d+) on \S+\) (was lost at|did not answer any more after) step (\d+).*; restart (\d) of 3 from (\S+)", text
    )
    assert [(int(pid), how, int(count)) for pid, how, _, count, _ in lost] == [
        (first, "was lost at", 1),
        (second, "was lost at", 2),
        (third, "did not answer any more after", 3),
    ]
    for (_, how, step, _, path), start in zip(lost, resumed_at(text), strict=True):
        assert path.endswith(f"step_{start:010d}") and int(step) + 1 - start <= INTERVAL
        # Who lost a peer knows the step; a hung group's last word is a second old.
        assert "answer" in how or int(step) + 1 >= start
    assert re.search(r"checkpoints/\.tmp-\d+-\w+ was left half-written", text)
    assert f"(pid {third} on " in text and "is stopped; its stacks are in" in text
    assert "Traceback" not in text


def check_that_it_is_locked(command: Command, arguments: list[str], folder: Path) -> None:
    with Command(folder, *arguments, **SLOW) as second:
        code, _ = second.end()
    assert code == 6 and re.search(rf"error: LockedError: .*: locked by process {command.process.pid} on \S+ since ", second.text)


def test_lost_workers_a_killed_driver_a_second_run_and_a_preemption_change_nothing(featured_dataset, undisturbed, tmp_path):
    """One run meets them all: starting Ray and two ranks anew takes most of the time."""
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, *LENGTH, "launch.max_failures=3")
    begun = time.monotonic()
    # Given up after 12 seconds, not 20: a stopped rank is what this test waits for.
    with Command(tmp_path, *arguments, **SLOW, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="12") as command:
        command.wait_for(lambda: progress(run_dir))
        start_s = time.monotonic() - begun  # what starting processes takes on this machine, now
        first, seconds = strike(command, run_dir, signal.SIGKILL, lambda: checkpoints(run_dir) and progress(run_dir) % INTERVAL)
        assert seconds <= max(30, 2 * start_s)  # row 1
        # Row 2: in the middle of writing the next checkpoint.
        newest = checkpoints(run_dir)[-1]
        second, _ = strike(command, run_dir, signal.SIGKILL, lambda: checkpoints(run_dir)[-1] > newest and writing(run_dir))
        newest = checkpoints(run_dir)[-1]
        # Row 17 as well: the run is not disturbed by a second one.
        third, seconds = strike(
            command,
            run_dir,
            signal.SIGSTOP,
            lambda: checkpoints(run_dir)[-1] > newest,
            lambda: check_that_it_is_locked(command, arguments, tmp_path),
        )
        assert seconds <= max(60, 30 + 2 * start_s)  # row 8
        stacks = [path.read_text() for path in sorted(run_dir.glob("ray/train-*-3/ranks/*.stacks"))]
        command.wait_for(lambda: progress(run_dir) % INTERVAL and len(resumed_at(command.text)) == 3)
        command.descendants()
        command.process.kill()
    check_losses_of_rank_1(command.text, first, second, third)
    # The living rank wrote its own stacks; those of the stopped one were read from outside, where that is allowed.
    assert len(stacks) == 2 and "most recent call first" in stacks[0] and "loop.py" in stacks[0]
    assert "run_training" in stacks[1] or "no stacks of process" in stacks[1]
    # They try to write their last words to the head, which is gone as well.
    assert_nothing_left(command, "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    reached, saved = progress(run_dir), checkpoints(run_dir)[-1]
    assert reached - saved <= INTERVAL

    with Command(tmp_path, *arguments, **SLOW) as again:
        again.wait_for(lambda: checkpoints(run_dir)[-1] > saved and progress(run_dir) % INTERVAL)
        again.descendants()
        again.process.send_signal(signal.SIGTERM)
        code, last = again.end()
    assert re.search(rf"the lock of process {command.process.pid} on \S+, which is gone, is taken over", again.text)
    assert resumed_at(again.text) == [saved]
    assert (code, last) == (75, ""), again.text[-4000:]
    stopped = int(re.search(rf"error: Preempted: stopped at step (\d+) of {LAST}; checkpoint saved", again.text)[1])  # type: ignore[index]
    assert checkpoints(run_dir)[-1] == stopped == progress(run_dir)
    assert json.loads((run_dir / "run_status.json").read_text())["exit_code"] == 75
    assert_nothing_left(again)

    with Command(tmp_path, *arguments) as last_run:
        last_run.wait_for(lambda: progress(run_dir) > stopped)
        last_run.descendants()
        code, last = last_run.end()
    assert code == 0 and json.loads(last)["step"] == LAST, last_run.text[-4000:]
    assert resumed_at(last_run.text) == [stopped] and "Traceback" not in last_run.text
    assert_equal_to(undisturbed, run_dir)
    assert_nothing_left(last_run)


def test_an_error_that_comes_twice_at_one_step_ends_the_run(featured_dataset, tmp_path):
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, *LENGTH, "launch.max_failures=5")
    with Command(tmp_path, *arguments, MOCME_TEST_RAISE="1:25") as command:
        code, last = command.end()
    text = command.text
    assert (code, last) == (70, ""), text[-4000:]
    assert re.search(r"rank 1 \(pid \d+ on \S+\) failed at step 25: RuntimeError: a fault at step 25; restart 1 of 5 from \S+020\n", text)
    final = text.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: RankError: rank 1 \(pid \d+ on \S+\) failed at step 25: RuntimeError: a fault at step 25; the same error came twice at "
        r"this step, so it is not tried again; last checkpoint: \S+/step_0000000020",
        final,
    ), final
    status = json.loads((run_dir / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["last_checkpoint"]) == ("failed", 70, "step_0000000020")
    # The trace of the first cause, once an attempt, and none of the rank that only lost it.
    assert text.count("Traceback (most recent call last)") == 2 == text.count('raise RuntimeError(f"a fault at step {step}")')
