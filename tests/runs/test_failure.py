"""Restarts without Ray.

Which cause is named, when another attempt is made, who may stop a run, and what a rank says of itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from mocme_dist.data.progress import Progress
from mocme_dist.errors import DataError, Preempted, RankError
from mocme_dist.runs import heartbeat as heartbeats
from mocme_dist.runs import supervisor as supervise
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.failure import Failure, Restarts, find_failure
from mocme_dist.runs.heartbeat import RankHeartbeat, RankStatus, dump_stopped, is_stopped, read_statuses
from mocme_dist.runs.stopping import StopRequest
from mocme_dist.runs.supervisor import Supervisor

PEER = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:33447"
# Of ranks that share memory.
MISSED = "RankError: rank 0: connection closed by peer: rank 1 is gone"
SILENT = "RankError: rank 0: timed out waiting for rank 2: it sent nothing for 1800 s"
ENDED = "ValueError: Default process group has not been initialized, please make sure to call init_process_group."


def ray_error(name: str, text: str = "") -> Exception:
    """An error of Ray's, known by its name."""
    return type(name, (Exception,), {})(text)


def sign(rank: int, step: int | None = 7, error: str | None = None, trace: str = "") -> RankStatus:
    return RankStatus(rank, 3, 100 + rank, "host", "node", step, error, trace)


GONE, HUNG, LOST = (
    ray_error("WorkerHealthCheckFailedError"),
    ray_error("WorkerHealthCheckTimeoutError"),
    RuntimeError(PEER),
)


@pytest.mark.parametrize(
    "failures, signs, text, step, error",
    [
        # Killed, and a survivor that saw it in the step after the last beat of the dead one.
        ({1: GONE}, [sign(0, 9, PEER), sign(1, 7)], r"rank 1 \(pid 101 on host\) was lost at step 9", 9, False),
        # Ray heard of the complaint only: who did not complain is lost.
        (
            {0: LOST},
            [sign(0, 9, PEER), sign(1, 7), sign(2, 9, PEER)],
            r"rank 1 \(pid 101 .* was lost at step 9",
            9,
            False,
        ),
        ({1: GONE}, [sign(0, 9, MISSED), sign(1, 7)], r"rank 1 \(pid 101 on host\) was lost at step 9", 9, False),
        (
            {0: RankError(MISSED)},
            [sign(0, 9, MISSED), sign(1, 7), sign(2, 9, PEER)],
            r"rank 1 \(pid 101 .* was lost at step 9",
            9,
            False,
        ),
        (
            {2: HUNG},
            [sign(0, 7, SILENT), sign(1), sign(2)],
            r"rank 2 .* stopped answering after step 7",
            7,
            False,
        ),
        ({2: HUNG}, [sign(0), sign(1), sign(2)], r"rank 2 .* stopped answering after step 7", 7, False),
        # Ray gave one up and took the group down under the others, which were between two collectives.
        ({0: HUNG}, [sign(0), sign(1, 8, ENDED)], r"rank 0 .* stopped answering after step 8", 8, False),
        ({1: GONE}, [sign(0, 9, ENDED), sign(1, 7)], r"rank 1 .* was lost at step 9", 9, False),
        # One failed by itself, the others lost it.
        (
            {0: LOST, 1: ValueError("bad")},
            [sign(0, 9, PEER), sign(1, 8)],
            r"rank 1 .* failed at step 8: ValueError: bad$",
            8,
            True,
        ),
        (
            {0: LOST},
            [sign(0, 9, PEER), sign(1, 9, "ValueError: bad", "trace")],
            r"rank 1 .* failed at step 9: ValueError",
            9,
            True,
        ),
        # Before the first step, and without any word.
        ({0: ImportError("no torch")}, [], r"rank 0 failed at step 0 or before: ImportError: no torch", None, True),
        ({}, [], r"the workers failed at step 0 or before: OSError: controller gone", None, True),
    ],
)
def test_the_first_cause_is_named_with_rank_process_and_step(failures, signs, text, step, error):
    failure = find_failure(failures, OSError("controller gone"), signs)
    assert re.search(text, failure.text), failure.text
    assert failure.step == step and (failure.error is not None) == error and "\n" not in failure.text
    assert failure.hung == tuple(rank for rank, cause in failures.items() if "Timeout" in type(cause).__name__)


def test_lost_workers_are_replaced_so_many_times_and_the_same_error_at_the_same_step_never():
    lost, failed = (
        Failure("rank 1 was lost", 5, None),
        Failure("rank 1 failed at step 5: ValueError: x", 5, "ValueError: x"),
    )
    restarts = Restarts(3)
    for failure in (lost, lost, failed):
        restarts.add(failure, "step_5")
    with pytest.raises(
        RankError,
        match=r"the workers failed 4 times \(launch.max_failures=3\): rank 1 was lost; last checkpoint: step_5",
    ):
        restarts.add(lost, "step_5")
    restarts = Restarts(3)
    restarts.add(failed, "step_5")
    restarts.add(
        Failure("rank 1 failed at step 6: ValueError: x", 6, "ValueError: x"), "step_5"
    )  # further on: not the same
    with pytest.raises(
        RankError, match="the same error came twice at this step, so it is not tried again; last checkpoint: none yet"
    ):
        restarts.add(Failure("again", 6, "ValueError: x"), "none yet")


def test_a_rank_says_who_it_is_how_far_it_came_and_how_it_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "INTERVAL_S", 0.0)
    alive = RankHeartbeat(tmp_path / "ranks", 1, 2, "node", stall_s=60)
    assert read_statuses(tmp_path / "ranks") == [RankStatus(1, 2, os.getpid(), os.uname().nodename, "node")]
    alive.before_step(7)
    try:
        raise ValueError("bad row")
    except ValueError as error:
        alive.failed(error)
    alive.close()
    (tmp_path / "ranks" / "00000.json").write_text("{")  # torn
    (said,) = read_statuses(tmp_path / "ranks")
    assert (said.step, said.error) == (7, "ValueError: bad row") and "Traceback" in said.trace
    assert str(said) == f"rank 1 (pid {os.getpid()} on {os.uname().nodename})"


def test_a_rank_that_makes_no_step_writes_the_stacks_of_its_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "INTERVAL_S", 0.0)
    stalled = RankHeartbeat(tmp_path, 0, 1, "node", stall_s=0.2)
    stalled.before_step(3)
    stacks, deadline = tmp_path / "00000.stacks", time.monotonic() + 60
    while not stacks.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.05)
    stalled.close()
    assert "test_a_rank_that_makes_no_step" in stacks.read_text()


def test_a_stopped_process_is_noticed_and_looked_into_from_outside(tmp_path):
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"\n"  # it has a stack to look at
        other = RankStatus(0, 1, process.pid, os.uname().nodename, "node")
        assert not is_stopped(other)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not is_stopped(other) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert is_stopped(other) and not is_stopped(RankStatus(0, 1, process.pid, "elsewhere", "node"))
        text = dump_stopped(tmp_path, other).read_text()
        assert "<module>" in text or f"no stacks of process {process.pid}: " in text
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(other)


class Attempts:
    """Stands for Ray Train: each attempt writes what it is told, or raises it."""

    def __init__(self, *ends: Any) -> None:
        self.ends, self.workers = list(ends), list[int]()

    def __call__(self, workers: int, folder: Path) -> None:
        self.workers.append(workers)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        supervise_write(folder / supervise.OUTCOME, end() if callable(end) else end)


def supervise_write(path: Path, value: Any) -> None:
    from mocme_dist.data.files import write_json

    write_json(path, value)


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """`supervisor(attempts, room, *overrides)`.

    `room` is what the cluster has at each look, the last value for good.
    """

    def make(attempts: Attempts, room: list[int], *overrides: str) -> Supervisor:
        def count(each: Any, free: bool = False) -> int:
            return room.pop(0) if len(room) > 1 else room[0]

        monkeypatch.setattr(supervise, "count_workers", count)
        monkeypatch.setattr(supervise, "draining_nodes", set)
        monkeypatch.setattr(supervise, "LOOK_S", 0.01)
        config = tiny_config(tmp_path / "dataset", tmp_path / "run", *overrides)
        newest = tmp_path / "run" / "checkpoints" / "step_0000000009"
        newest.mkdir(parents=True, exist_ok=True)
        (newest / "MANIFEST.json").touch()
        return Supervisor(
            config.launch, RunDirectory(config.run.dir), "train", StopRequest(tmp_path / "run" / "stop"), attempts
        )

    return make


def test_a_run_goes_on_with_what_fits_and_reports_once(supervisor, caplog):
    lost = ray_error("WorkerGroupError")
    attempts = Attempts(lost, {"report": {"mrr": 0.5}})
    with caplog.at_level(logging.INFO):
        assert supervisor(attempts, [1, 1, 4, 2], "launch.workers=[2, 3]").run() == {"mrr": 0.5}
    assert attempts.workers == [3, 2]  # waited for two, took three of four, then what was left
    assert "waiting for workers: needs 2, cluster has 1; for at most 300 s" in caplog.text
    assert re.search(r"restart 1 of 3 from \S+/step_0000000009", caplog.text)


def test_too_few_workers_are_waited_for_so_long_and_no_longer(supervisor):
    attempts = Attempts(ray_error("WorkerGroupError"))
    with pytest.raises(
        RankError, match=r"needs 2 workers, cluster has 1; waited 0.2 s .*; last checkpoint: \S+/step_0000000009"
    ):
        supervisor(attempts, [2, 1], "launch.workers=2", "launch.wait_s=0.2").run()
    assert attempts.workers == [2]


def test_workers_that_find_no_place_are_no_failure_of_theirs(supervisor, monkeypatch):
    unplaced = ray_error("ControllerError")
    unplaced.controller_failure = ray_error("WorkerGroupStartupTimeoutError")  # type: ignore[attr-defined]
    # On a busy machine they take long to start: each attempt has twice the time of the one before.
    monkeypatch.setenv(supervise.START_TIMEOUT, "30")
    attempts = Attempts(unplaced, unplaced, lambda: {"report": {"limit": os.environ[supervise.START_TIMEOUT]}})
    assert supervisor(attempts, [2], "launch.workers=2", "launch.max_failures=0").run() == {"limit": "120"}
    attempts = Attempts(*[unplaced] * 99)
    unlucky = supervisor(attempts, [2], "launch.workers=2", "launch.wait_s=0.5", "run.dir=again")
    with pytest.raises(RankError, match="needs 2 workers, cluster has 2 free, where they did not start"):
        unlucky.run()


def test_a_mistake_of_the_users_is_not_tried_again_and_a_stop_of_theirs_ends_the_run(supervisor):
    attempts = Attempts({"error": "part 3 is torn", "kind": "DataError"})
    with pytest.raises(DataError, match="part 3 is torn"):
        supervisor(attempts, [2]).run()


def test_a_stop_of_the_launchers_goes_on_and_one_of_the_users_does_not(supervisor):
    stopped = {"error": "stopped at step 9", "kind": "Preempted"}
    box: list[Supervisor] = []

    def grow() -> Any:
        box[0].stop.ask()
        return stopped

    attempts = Attempts(grow, {"report": {}})
    box.append(supervisor(attempts, [1, 2], "launch.workers=[1, 2]"))
    assert box[0].run() == {} and attempts.workers == [1, 2] and not box[0].stop.file.exists()
    # A file that somebody else made is the user's.
    other = Attempts(stopped)
    box[0].fit = other
    with pytest.raises(Preempted, match="stopped at step 9"):
        box[0].run()


def test_the_first_signal_asks_and_stays_and_the_second_interrupts(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mocme_dist.runs.stopping import StopRequest\n"
        "stop = StopRequest(Path(sys.argv[1]))\n"
        "with stop.listening():\n"
        "    print('ready', flush=True)\n"
        "    while not stop.by_user: time.sleep(0.01)\n"
        "    stop.clear(); assert stop.file.exists()\n"
        "    try:\n"
        "        print('asked', flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt as error: print(error, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "stop")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT, twice\n" and process.wait(timeout=50) == 0
    finally:
        process.kill()
        process.wait()


def test_ranks_that_make_no_progress_are_given_up(supervisor, monkeypatch):
    monkeypatch.setattr(supervise, "SILENT_TIMES", 0.2)
    over, working = threading.Event(), threading.Event()

    def hang() -> Any:
        over.wait(60)
        return {"report": {}}

    def work() -> Any:
        with Progress("evaluate test", 100) as progress:
            while not over.wait(0.2):
                progress.add()
                working.set()
        return {"report": {}}

    with pytest.raises(
        RankError, match=r"no rank has made progress for 1 s \(0\.2 times launch\.timeout_s\); .* waiting for 1 workers"
    ):
        supervisor(Attempts(hang), [1], "launch.workers=1", "launch.timeout_s=5").run()
    # Work that is counted is progress, whatever the step.
    timer = threading.Timer(4, over.set)
    timer.start()
    assert supervisor(Attempts(work), [1], "launch.workers=1", "launch.timeout_s=5").run() == {}
    assert working.is_set()


def test_a_run_that_does_not_stop_in_time_ends_all_the_same(supervisor):
    over = threading.Event()

    def hang() -> Any:
        over.wait(30)
        return {"report": {}}

    stuck = supervisor(Attempts(hang), [2], "launch.grace_s=0.3")
    stuck.stop.asked_at = None

    def ask() -> None:
        stuck.stop.asked_at = time.monotonic()

    timer = threading.Timer(0.2, ask)
    timer.start()
    started = time.monotonic()
    with pytest.raises(
        Preempted, match=r"did not stop within 0.3 s \(launch.grace_s\); last checkpoint: \S+/step_0000000009"
    ):
        stuck.run()
    over.set()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("steps", "ended", "said"),
    [
        ([], False, "stopped before a step was made"),
        ([0], False, "stopped before a step was made"),
        ([4], False, "stopped before a step was made"),
        ([0, 1], True, "stopped before the final evaluation was over"),
        ([0, 1], False, "did not stop within 1.5 s"),
    ],
)
def test_a_stop_is_waited_for_only_where_there_is_something_to_save(
    supervisor, monkeypatch, tmp_path, steps, ended, said
):
    """`steps` are those that a rank stands before, one a second.

    One that has made none since its start saves nothing.
    """
    monkeypatch.setattr(supervise, "SETTLE_S", 0.3)
    over = threading.Event()

    def hang() -> Any:
        heartbeat = RankHeartbeat(one.directory.path / "ray" / f"{one.name}-1" / "ranks", 0, 1, "node", 60)
        for step in steps:
            heartbeat.before_step(step)
            over.wait(1.2)
        if ended:
            heartbeat.ended()
        one.stop.asked_at = time.monotonic()
        over.wait(30)
        heartbeat.close()
        return {"report": {}}

    one = supervisor(Attempts(hang), [2], "launch.grace_s=1.5")
    with pytest.raises(Preempted, match=said):
        one.run()
    over.set()


def test_a_node_that_leaves_is_left_in_time(supervisor, monkeypatch, tmp_path, caplog):
    box: list[Supervisor] = []

    def run() -> Any:
        folder = next((tmp_path / "run" / "ray").glob("*-1"))
        RankHeartbeat(folder / "ranks", 0, 1, "leaving", 60).close()
        deadline = time.monotonic() + 60
        while not box[0].stop.file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return {"error": "stopped at step 9", "kind": "Preempted"}

    attempts = Attempts(run, {"report": {}})
    box.append(supervisor(attempts, [2, 1], "launch.workers=[1, 2]", "launch.resize_s=60"))
    monkeypatch.setattr(supervise, "draining_nodes", lambda: {"leaving"})
    (tmp_path / "run" / "ray" / f"{box[0].name}-1").mkdir(parents=True)
    assert box[0].run() == {} and attempts.workers == [2, 1]
    assert re.search(
        r"the nodes of rank 0 \(pid \d+ on \S+\) are leaving: saving, to continue with the others", caplog.text
    )


@pytest.mark.parametrize(("fitting", "grows"), [(2, False), (3, True)])
def test_rests_of_several_nodes_are_no_room_to_grow(supervisor, monkeypatch, fitting, grows):
    """What is free is summed over nodes.

    What fits into each is the other bound, or the run would save and start again for ever.
    """
    one = supervisor(Attempts(), [2], "launch.workers=[1, 4]")
    monkeypatch.setattr(supervise, "count_workers", lambda each, free=False: 1 if free else fitting)
    one._look_for_changes([], 2, 1e9)
    assert one.stop.file.exists() == grows


def test_an_evaluation_leaves_the_stop_file_of_a_training_alone(supervisor):
    one = supervisor(Attempts({"report": {}}), [2])
    one.task = "evaluate"
    one.stop.file.touch()
    assert one.run() == {} and one.stop.file.exists()
