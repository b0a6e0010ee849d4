"""Rows 1, 2, 5, 8, 9, 10 and 17 of the fault matrix on real workers: killed, stopped, failing, preempted.

Starting Ray and two ranks anew takes most of the time, so one run meets all faults but row 9, once for all tests. One
undisturbed run on two ranks without Ray gives the bits that it must end in. `-s` prints the recovery times.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_harness import LINES, Command, checkpoints, progress, ranks, train_arguments
from tiny_run import final_hashes, losses, tiny_config

from mocme_dist.runs.task import run_training

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
    """Whether the parts of a checkpoint are being written: staged, and its manifest is not there yet."""
    staged = [{path.name for path in folder.glob("*")} for folder in (run_dir / "unsent").glob("*")]
    return any("MANIFEST.json" not in names and any("rows" in name for name in names) for names in staged)


def strike(command: Command, run_dir: Path, number: int, when: Any, meanwhile: Any = lambda: None) -> Loss:
    """Signal rank 1 once `when` holds, do something else meanwhile, and wait until new workers take steps."""
    command.wait_for(when)
    signs = ranks(run_dir)
    os.kill(signs[1]["pid"], number)
    started = time.monotonic()
    meanwhile()
    command.wait_for(lambda: restarted(run_dir, {sign["pid"] for sign in signs}))
    return Loss(signs[1]["pid"], time.monotonic() - started)


def resumed_at(text: str) -> list[int]:
    return [
        int(step)
        for step in re.findall(rf"resuming from step (\d+) of {LAST} \(step_\d+\) with 2 rank\(s\), saved by 2", text)
    ]


@dataclass
class Loss:
    """One strike at rank 1: its pid, how long until new workers took steps, and how that is said."""

    pid: int
    seconds: float
    how: str = ""
    step: int = -1
    restart: int = 0
    from_step: int = -1


@dataclass
class Story:
    """A run that loses a worker, a worker that writes a checkpoint, an answer, and its driver; then it is preempted."""

    run_dir: Path
    start_s: float = 0.0
    losses: list[Loss] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    second: tuple[int, str] = (0, "")
    first_pid: int = 0
    text: str = ""
    reached: int = 0
    saved: int = 0
    again: tuple[int, str, str] = (0, "", "")
    stopped: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    stopped_at: tuple[int, int] = (0, 0)
    last: tuple[int, str, str] = (0, "", "")


@pytest.fixture(scope="module")
def story(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    told = Story(folder / "run")
    arguments = train_arguments(featured_dataset, told.run_dir, *LENGTH, "launch.max_failures=3")
    lose_workers_and_driver(told, folder, arguments)

    with Command(folder, *arguments, **SLOW) as again:
        again.wait_for(lambda: checkpoints(told.run_dir)[-1] > told.saved and progress(told.run_dir) % INTERVAL)
        again.descendants()
        again.process.send_signal(signal.SIGTERM)
        told.again = (*again.end(), again.text)
    told.status = json.loads((told.run_dir / "run_status.json").read_text())
    told.stopped_at = checkpoints(told.run_dir)[-1], progress(told.run_dir)
    assert_nothing_left(again)

    with Command(folder, *arguments) as last:
        last.wait_for(lambda: progress(told.run_dir) > told.stopped_at[0])
        last.descendants()
        told.last = (*last.end(), last.text)
    assert_nothing_left(last)
    return told


def lose_workers_and_driver(told: Story, folder: Path, arguments: list[str]) -> None:
    """Strike rank 1 three times, then kill the driver."""
    run_dir, begun = told.run_dir, time.monotonic()
    # Given up after 12 seconds, not 20: a stopped rank is what this waits for.
    with Command(folder, *arguments, **SLOW, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="12") as command:
        command.wait_for(lambda: progress(run_dir))
        told.start_s = time.monotonic() - begun  # what starting processes takes on this machine, now
        told.losses.append(
            strike(command, run_dir, signal.SIGKILL, lambda: checkpoints(run_dir) and progress(run_dir) % INTERVAL)
        )
        newest = checkpoints(run_dir)[-1]
        told.losses.append(
            strike(command, run_dir, signal.SIGKILL, lambda: checkpoints(run_dir)[-1] > newest and writing(run_dir))
        )
        newest = checkpoints(run_dir)[-1]

        def start_second() -> None:
            with Command(folder, *arguments, **SLOW) as second:
                code, _ = second.end()
            told.second = code, second.text

        told.losses.append(
            strike(command, run_dir, signal.SIGSTOP, lambda: checkpoints(run_dir)[-1] > newest, start_second)
        )
        told.stacks = [path.read_text() for path in sorted(run_dir.glob("ray/train-*-3/ranks/*.stacks"))]
        command.wait_for(lambda: progress(run_dir) % INTERVAL and len(resumed_at(command.text)) == 3)
        command.descendants()
        command.process.kill()
    told.first_pid, told.text = command.process.pid, command.text
    # Ray's own helpers try to write their last words to the head, which is gone as well.
    assert_nothing_left(command, "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    told.reached, told.saved = progress(run_dir), checkpoints(run_dir)[-1]
    said = re.findall(
        r"rank 1 \(pid (\d+) on \S+\) (was lost at|stopped answering after) step (\d+).*; restart (\d) of 3 from (\S+)",
        told.text,
    )
    for loss, (pid, how, step, count, path), start in zip(told.losses, said, resumed_at(told.text), strict=True):
        assert int(pid) == loss.pid and path.endswith(f"step_{start:010d}")
        loss.how, loss.step, loss.restart, loss.from_step = how, int(step), int(count), start
    print(f"start {told.start_s:.1f} s; recovery {[round(loss.seconds, 1) for loss in told.losses]} s")


def check_loss(loss: Loss, number: int, how: str, budget_s: float) -> None:
    """The launcher named rank, process and step, and at most one interval was made again, in time."""
    assert (loss.how, loss.restart) == (how, number)
    assert loss.step + 1 - loss.from_step <= INTERVAL and loss.seconds <= budget_s


def test_row_01_a_killed_worker_is_replaced_and_the_run_ends_in_the_same_bits(story, undisturbed):
    check_loss(story.losses[0], 1, "was lost at", max(30, 2 * story.start_s))
    assert story.losses[0].step + 1 >= story.losses[0].from_step
    assert "Traceback" not in story.text
    code, report, text = story.last
    assert code == 0 and json.loads(report)["step"] == LAST, text[-4000:]
    assert_equal_to(undisturbed, story.run_dir)


def test_row_02_a_worker_killed_while_it_writes_a_checkpoint_leaves_the_one_before(story):
    check_loss(story.losses[1], 2, "was lost at", max(30, 2 * story.start_s))
    assert re.search(r"unsent/step_\d+ was left half-written", story.text)


def test_row_05_a_killed_driver_costs_at_most_one_interval(story):
    assert story.reached - story.saved <= INTERVAL
    text = story.again[2]
    assert re.search(rf"the lock of process {story.first_pid} on \S+ since .*, which has ended, is taken over", text)
    assert resumed_at(text) == [story.saved]


def test_row_08_a_stopped_worker_is_given_up_with_the_stacks_of_all(story):
    loss = story.losses[2]
    check_loss(loss, 3, "stopped answering after", max(60, 30 + 2 * story.start_s))
    assert f"(pid {loss.pid} on " in story.text and "is stopped; its stacks are in" in story.text
    # The living rank wrote its own stacks; those of the stopped one were read from outside, where that is allowed.
    stacks = story.stacks
    assert len(stacks) == 2 and "most recent call first" in stacks[0] and "loop.py" in stacks[0]
    assert "run_training" in stacks[1] or "no stacks of process" in stacks[1]


def test_row_10_a_preempted_run_saves_its_last_step_and_loses_none(story):
    (code, last, text), (saved, reached) = story.again, story.stopped_at
    assert (code, last) == (75, ""), text[-4000:]
    stopped = re.search(rf"error: Preempted: stopped at step (\d+) of {LAST}; checkpoint saved", text)
    assert stopped is not None and int(stopped[1]) == saved == reached
    assert story.status["exit_code"] == 75
    assert resumed_at(story.last[2]) == [saved] and "Traceback" not in story.last[2]


def test_row_17_a_second_run_is_turned_away_and_disturbs_nothing(story):
    code, text = story.second
    assert code == 6 and re.search(
        rf"error: LockedError: .*: locked by process {story.first_pid} on \S+ since .*; use another run.dir", text
    )


def test_row_09_an_error_that_comes_twice_at_one_step_ends_the_run(featured_dataset, tmp_path):
    run_dir = tmp_path / "run"
    arguments = train_arguments(featured_dataset, run_dir, *LENGTH, "launch.max_failures=5")
    with Command(tmp_path, *arguments, MOCME_TEST_RAISE="1:25") as command:
        code, last = command.end()
    text = command.text
    assert (code, last) == (70, ""), text[-4000:]
    assert re.search(
        r"rank 1 \(pid \d+ on \S+\) failed at step 25: RuntimeError: a fault at step 25; restart 1 of 5 from \S+020\n",
        text,
    )
    final = text.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: RankError: rank 1 \(pid \d+ on \S+\) failed at step 25: RuntimeError: a fault at step 25; the same"
        r" error came twice at "
        r"this step, so it is not tried again; last checkpoint: \S+/step_0000000020",
        final,
    ), final
    status = json.loads((run_dir / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["last_checkpoint"]) == ("failed", 70, "step_0000000020")
    # The trace of the first cause, once an attempt, and none of the rank that only lost it.
    assert (
        text.count("Traceback (most recent call last)")
        == 2
        == text.count('raise RuntimeError(f"a fault at step {step}")')
    )
