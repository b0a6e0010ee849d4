"""Keeps a run on Ray going: how many workers, what to do when some are lost, when to give up. Knows Ray Train only as `fit`.

Each attempt has a fixed number of workers, as many as fit between launch.workers' two numbers. Ray's own elastic policy
is not used. It looks at the cluster every twenty seconds, so it asks for a dead node's workers again; it grows by
killing the workers, which loses what they did since the last checkpoint; and where too few fit it waits for ever. Here
the ranks save before the run grows, and waiting ends after launch.wait_s.
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

from mocme_dist.cluster import count_workers, draining_nodes
from mocme_dist.config import Config
from mocme_dist.data.files import read_json
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
from mocme_dist.training.pulse import Sign, dump_stopped, is_stopped, read_signs
from mocme_dist.training.restart import Restarts, find_failure
from mocme_dist.training.rundir import RunDirectory
from mocme_dist.training.stopping import StopRequest

log = logging.getLogger(__name__)

# Between two looks at a cluster that is too small.
LOOK_S = 0.5
# Errors that another attempt would meet again.
FINAL = (ConfigError, DataError, CheckpointError, DivergedError, LockedError, StorageError, Preempted)
_KINDS = {kind.__name__: kind for kind in (*FINAL, RankError, MocmeError)}
# What Ray says when workers could not be placed or died before they began: the cluster was not what it seemed.
_UNPLACED = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
# What a rank writes into the attempt's folder: {"report": ...} or {"error": ..., "kind": ...}.
OUTCOME = "outcome.json"
# Runs an attempt of so many workers to its end, in a folder of its own; what Ray raises is raised.
Fit = Callable[[int, Path], None]


def resources_of(config: Config) -> dict[str, float]:
    """Of one worker, as Ray names them."""
    gpus = config.launch.gpus_per_worker
    return {"CPU": config.launch.cpus_per_worker} | ({"GPU": gpus} if gpus > 0 else {})


class Supervisor:
    """A task on Ray Train, over as many attempts as it takes."""

    def __init__(self, config: Config, task: str, stop: StopRequest, fit: Fit) -> None:
        self.config, self.task, self.stop, self.fit = config, task, stop, fit
        self.directory, self.launch = RunDirectory(config.run.dir), config.launch
        self.restarts = Restarts(config.launch.max_failures)
        # Ray's own record of a run is not ours: each attempt gets a name of its own, so an older record cannot block it.
        self.name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.attempts = 0
        self.unplaced_since: float | None = None

    def run(self) -> dict[str, Any]:
        """The report of the attempt that reached the end."""
        while True:
            workers = self._wait_for_workers()
            self.attempts += 1
            if self.task == "train":  # the file stops the training of this directory, which may run beside an evaluation
                self.stop.clear()
            folder = self.directory.path / "ray" / f"{self.name}-{self.attempts}"
            result, error = self._attempt(folder, workers)
            if "report" in result:
                return dict(result["report"])
            if "error" in result and not (result["kind"] == Preempted.__name__ and self.stop.by_launcher and not self.stop.by_user):
                raise _KINDS[result["kind"]](result["error"])
            if "error" in result:
                continue  # it saved, to go on with other workers
            cause = getattr(error, "controller_failure", None)
            if type(cause).__name__ in _UNPLACED:
                self.unplaced_since = self.unplaced_since or time.monotonic()
                log.warning("%d workers did not find their place in the cluster; looking again", workers)
                time.sleep(4 * LOOK_S)
                continue
            self.unplaced_since = None
            self._count_failure(error or RankError("the workers ended without a report"), folder)

    def _wait_for_workers(self) -> int:
        """How many workers to start with, once enough fit."""
        low, high, begun, said = self.launch.min_workers, self.launch.max_workers, time.monotonic(), -math.inf
        while True:
            # What looks free on paper was not: count only what is.
            have = count_workers(resources_of(self.config), free=self.unplaced_since is not None)
            now = time.monotonic()
            overdue = now - (self.unplaced_since or begun) >= self.launch.wait_s
            if self.stop.by_user:
                raise Preempted(
                    f"stopped while no workers ran; last checkpoint: {self.directory.last_checkpoint()}; run the same command to go on"
                )
            if have >= low and not (overdue and self.unplaced_since):
                return min(have, high)
            if overdue:
                where = " free, where they did not start" if self.unplaced_since else ""
                raise RankError(
                    f"needs {low} workers, cluster has {have}{where}; waited {self.launch.wait_s:g} s for it to grow "
                    f"(launch.wait_s); last checkpoint: {self.directory.last_checkpoint()}; "
                    "run the same command when there are more nodes, or lower launch.workers"
                )
            if now - said >= 10:
                said = now
                log.info("waiting for workers: needs %d, cluster has %d; for at most %g s", low, have, self.launch.wait_s)
            time.sleep(LOOK_S)

    def _attempt(self, folder: Path, workers: int) -> tuple[dict[str, Any], BaseException | None]:
        """What the workers wrote and what Ray raised. What one rank wrote says more than what Ray saw."""
        failure = list[BaseException]()

        def fit() -> None:
            try:
                self.fit(workers, folder)
            except BaseException as error:
                failure.append(error)

        # Not on the main thread: there Ray would take SIGINT for itself and abort without a checkpoint. A daemon: a
        # run that does not stop in time is left to end with this process.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        self._watch(thread, folder / "ranks", workers)
        outcome = folder / OUTCOME
        return read_json(outcome) if outcome.exists() else {}, failure[0] if failure else None

    def _watch(self, thread: threading.Thread, ranks: Path, workers: int) -> None:
        """Until the attempt ends: look for stopped processes, leaving nodes, room to grow, and a stop that takes too long."""
        begun, looked, dumped = time.monotonic(), time.monotonic(), set[int]()
        while thread.is_alive():
            thread.join(0.2)
            now = time.monotonic()
            if self.stop.asked_at is not None and now - self.stop.asked_at > self.launch.grace_s:
                raise Preempted(
                    f"did not stop within {self.launch.grace_s:g} s (launch.grace_s); last checkpoint: {self.directory.last_checkpoint()}; "
                    "run the same command to go on from there"
                )
            if now - looked < 1:
                continue
            looked, signs = now, read_signs(ranks)
            for sign in signs:
                if sign.rank not in dumped and is_stopped(sign):
                    dumped.add(sign.rank)
                    log.warning("%s is stopped; its stacks are in %s", sign, dump_stopped(ranks, sign))
            if self.task == "train" and signs and not (self.stop.by_user or self.stop.by_launcher):
                self._look_for_changes(signs, workers, now - begun)

    def _look_for_changes(self, signs: list[Sign], workers: int, running_s: float) -> None:
        leaving = draining_nodes()
        if lost := [str(sign) for sign in signs if sign.node in leaving]:
            log.warning("the nodes of %s are leaving: saving, to go on with the others", ", ".join(lost))
            self.stop.ask()
        elif workers < self.launch.max_workers and running_s >= self.launch.resize_s:
            each = resources_of(self.config)
            # What is free is summed over nodes: rests of several nodes may look like room for one that fits in none.
            room = min(count_workers(each), workers + count_workers(each, free=True), self.launch.max_workers)
            if room > workers:
                log.info("the cluster has room for %d workers, %d are running: saving, to go on with all", room, workers)
                self.stop.ask()

    def _count_failure(self, error: BaseException, folder: Path) -> None:
        signs = read_signs(folder / "ranks")
        failure = find_failure(getattr(error, "worker_failures", None) or {}, error, signs)
        if failure.hung:
            log.warning("stacks of the ranks: %s", ", ".join(str(path) for path in sorted((folder / "ranks").glob("*.stacks"))))
        if failure.trace:
            log.warning("%s", failure.trace.rstrip())
        last = self.directory.last_checkpoint()
        self.restarts.add(failure, last)
        log.warning("%s; restart %d of %d from %s", failure.text, self.restarts.count, self.launch.max_failures, last)
