"""Runs a task on Ray over as many attempts as it takes: number of workers, restarts, and when to give up.

Each attempt has a fixed number of workers, as many as fit between the two numbers of launch.workers. Ray's own elastic
policy is not used, for three reasons. It looks at the cluster every twenty seconds, so it asks for the workers of a
dead node again. It grows by killing the workers, which loses their steps since the last checkpoint. It waits for ever
if too few workers fit. Here the ranks save before the run grows, and waiting ends after launch.wait_s.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mocme_dist import environment, ray_loss
from mocme_dist.cluster import count_workers, draining_nodes
from mocme_dist.config.schema import LaunchConfig
from mocme_dist.data.files import read_json
from mocme_dist.data.progress import Progress, current_stage, forget_workers, work_done
from mocme_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LockedError,
    MocmeError,
    Preempted,
    RankError,
    StorageError,
)
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.failure import Restarts, find_failure
from mocme_dist.runs.heartbeat import RankStatus, dump_stopped, is_stopped, read_statuses
from mocme_dist.runs.stopping import StopRequest

log = logging.getLogger(__name__)

# Time between two looks at a cluster that is too small (seconds).
LOOK_S = 0.5
# Time after a signal in which a rank with short steps has stopped, and one with long steps has sent a heartbeat
# (seconds).
SETTLE_S = 3.0
# Ranks without any progress are given up after this multiple of launch.timeout_s: a rank that waits for others failed
# by itself before.
SILENT_TIMES = 6.0
# How long Ray Train waits for the workers of a group to be placed and to start (seconds). Short at first, because a
# cluster that has lost a node seems to have room; on a busy machine workers take longer to start, so it doubles.
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Errors that another attempt would meet again.
FINAL = (ConfigError, DataError, CheckpointError, DivergedError, LockedError, StorageError, Preempted)
_KINDS = {kind.__name__: kind for kind in (*FINAL, RankError, MocmeError)}
# Ray's errors if workers could not be placed or died before they began: the cluster was not as it seemed.
_UNPLACED = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
# File that a rank writes into the attempt's folder: {"report": ...} or {"error": ..., "kind": ...}.
OUTCOME = "outcome.json"
# Runs an attempt with this number of workers to its end, in a folder of its own; raises what Ray raises.
Fit = Callable[[int, Path], None]


def resources_of(config: LaunchConfig) -> dict[str, float]:
    """Return the resources of one worker, as Ray names them."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus} if config.gpus > 0 else {})


class Supervisor:
    """A task on Ray Train, over as many attempts as it takes."""

    def __init__(self, config: LaunchConfig, directory: RunDirectory, task: str, stop: StopRequest, fit: Fit) -> None:
        self.launch, self.directory, self.task, self.stop, self.fit = config, directory, task, stop, fit
        self.restarts = Restarts(config.max_failures)
        # Ray keeps a record per name: each attempt gets a name of its own, so an older record cannot block it.
        self.name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.attempts = 0
        self.unplaced_since: float | None = None

    def run(self) -> dict[str, Any]:
        """Return the report of the attempt that reached the end."""
        while True:
            workers = self._wait_for_workers()
            self.attempts += 1
            # The stop file is of this directory's training, which may run beside an evaluation.
            if self.task == "train":
                self.stop.clear()
            folder = self.directory.path / "ray" / f"{self.name}-{self.attempts}"
            result, error = self._attempt(folder, workers)
            if "report" in result:
                return dict(result["report"])
            if "error" in result:
                resized = result["kind"] == Preempted.__name__ and self.stop.by_launcher and not self.stop.by_user
                if not resized:
                    raise _KINDS[result["kind"]](result["error"])
                continue  # it saved, to continue with other workers
            cause = getattr(error, "controller_failure", None)
            if type(cause).__name__ in _UNPLACED:
                self.unplaced_since = self.unplaced_since or time.monotonic()
                waited_s = environment.seconds(START_TIMEOUT, 30)
                log.warning("%d workers did not start within %g s; looking again", workers, waited_s)
                environment.raise_to(START_TIMEOUT, min(2 * waited_s, self.launch.wait_s))
                time.sleep(4 * LOOK_S)
                continue
            self.unplaced_since = None
            self._count_failure(error or RankError("the workers ended without a report"), folder)

    def _wait_for_workers(self) -> int:
        """Return how many workers to start with, once enough fit."""
        low, high = self.launch.min_workers, self.launch.max_workers
        begun, logged = time.monotonic(), -math.inf
        while True:
            # After a failed placement, count only resources that are free.
            have = count_workers(resources_of(self.launch), free=self.unplaced_since is not None)
            now = time.monotonic()
            overdue = now - (self.unplaced_since or begun) >= self.launch.wait_s
            if self.stop.by_user:
                raise Preempted(
                    f"stopped while no workers ran; last checkpoint: {self._last()}; run the same command to continue"
                )
            if have >= low and not (overdue and self.unplaced_since):
                return min(have, high)
            if overdue:
                where = " free, where they did not start" if self.unplaced_since else ""
                raise RankError(
                    f"needs {low} workers, cluster has {have}{where}; waited {self.launch.wait_s:g} s for it to grow "
                    f"(launch.wait_s); last checkpoint: {self._last()}; "
                    "run the same command when there are more nodes, or lower launch.workers"
                )
            if now - logged >= 10:
                logged = now
                log.info(
                    "waiting for workers: needs %d, cluster has %d; for at most %g s", low, have, self.launch.wait_s
                )
            time.sleep(LOOK_S)

    def _last(self) -> str:
        return self.directory.checkpoints.last()

    def _attempt(self, folder: Path, workers: int) -> tuple[dict[str, Any], BaseException | None]:
        """Return what a rank wrote, which says more than what Ray saw, and what Ray raised."""
        failure = list[BaseException]()

        def fit() -> None:
            try:
                self.fit(workers, folder)
            except BaseException as error:
                failure.append(error)

        # Not on the main thread, where Ray would handle SIGINT and abort without a checkpoint. A daemon, so that a run
        # which does not stop in time ends with this process.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        with Progress(f"waiting for {workers} workers") as stage:
            thread.start()
            try:
                self._watch(thread, folder / "ranks", workers, stage)
            finally:
                forget_workers()
        outcome = folder / OUTCOME
        return read_json(outcome) if outcome.exists() else {}, failure[0] if failure else None

    def _watch(self, thread: threading.Thread, ranks: Path, workers: int, stage: Progress) -> None:
        """Until the attempt ends, look for stopped processes, leaving nodes, room to grow, and a stop that takes too
        long."""
        begun, looked, dumped = time.monotonic(), time.monotonic(), set[int]()
        first_step: int | None = None
        seen: object = None
        changed = begun
        while thread.is_alive():
            thread.join(0.2)
            now = time.monotonic()
            waiting_s = -math.inf if self.stop.asked_at is None else now - self.stop.asked_at
            if waiting_s > self.launch.grace_s:
                raise Preempted(
                    f"did not stop within {self.launch.grace_s:g} s (launch.grace_s); last checkpoint: {self._last()}; "
                    "run the same command to continue from there"
                )
            if now - looked < 1:
                continue
            looked, statuses = now, read_statuses(ranks)
            state = (work_done(), [(status.rank, status.step, status.ended) for status in statuses])
            changed, seen = (now, state) if state != seen else (changed, seen)
            self._refuse_silence(now - changed, ranks)
            if first_step is None:
                first_step = min((status.step for status in statuses if status.step is not None), default=None)
            if first_step is not None:  # shown again when the ranks' own stages are over
                stage.name = "waiting for the workers to end"
            if waiting_s > SETTLE_S:
                self._leave_without_saving(statuses, first_step)
            for status in statuses:
                if status.rank not in dumped and is_stopped(status):
                    dumped.add(status.rank)
                    log.warning("%s is stopped; its stacks are in %s", status, dump_stopped(ranks, status))
            if self.task == "train" and statuses and not (self.stop.by_user or self.stop.by_launcher):
                self._look_for_changes(statuses, workers, now - begun)

    def _refuse_silence(self, silent_s: float, ranks: Path) -> None:
        """Raise RankError if the ranks have neither made a step nor finished any other work for too long."""
        limit_s = SILENT_TIMES * self.launch.timeout_s
        if silent_s >= limit_s:
            raise RankError(
                f"no rank has made progress for {limit_s:g} s ({SILENT_TIMES:g} times launch.timeout_s); the last "
                "stage "
                f"was: {current_stage()}; stacks of the ranks are in {ranks}; last checkpoint: {self._last()}; "
                "run the same command to continue from there, or raise launch.timeout_s"
            )

    def _leave_without_saving(self, statuses: list[RankStatus], first_step: int | None) -> None:
        """Raise Preempted if waiting would give no checkpoint: before the end of the first step, or after the last
        one."""
        made = any(status.step is not None and status.step != first_step for status in statuses)
        if made and not any(status.ended for status in statuses):
            return
        where = "before the final evaluation was over" if made else "before a step was made"
        raise Preempted(f"stopped {where}; last checkpoint: {self._last()}; run the same command to continue")

    def _look_for_changes(self, statuses: list[RankStatus], workers: int, running_s: float) -> None:
        """Ask the ranks to stop if their nodes are leaving or the cluster has room for more of them."""
        leaving = draining_nodes()
        if lost := [str(status) for status in statuses if status.node in leaving]:
            log.warning("the nodes of %s are leaving: saving, to continue with the others", ", ".join(lost))
            self.stop.ask()
        elif workers < self.launch.max_workers and running_s >= self.launch.resize_s:
            each = resources_of(self.launch)
            # Free resources are summed over nodes: remainders of several nodes may look like room for a worker that
            # fits on none of them.
            room = min(count_workers(each), workers + count_workers(each, free=True), self.launch.max_workers)
            if room > workers:
                log.info(
                    "the cluster has room for %d workers, %d are running: saving, to continue with all", room, workers
                )
                self.stop.ask()

    def _count_failure(self, error: BaseException, folder: Path) -> None:
        ray_loss.end_if_lost(error)
        ranks = folder / "ranks"
        failure = find_failure(getattr(error, "worker_failures", None) or {}, error, read_statuses(ranks))
        if failure.hung:
            log.warning("stacks of the ranks: %s", ", ".join(str(path) for path in sorted(ranks.glob("*.stacks"))))
        if failure.trace:
            log.warning("%s", failure.trace.rstrip())
        last = self._last()
        self.restarts.add(failure, last)
        log.warning("%s; restart %d of %d from %s", failure.text, self.restarts.count, self.launch.max_failures, last)
