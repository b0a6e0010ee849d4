"""State of a run in run_status.json, as its launcher writes it: running, then done, failed or preempted.

While it runs, the file is rewritten every few seconds with the time (`updated`) and the stage of the work (`stage`):
by rank 0 while it trains, otherwise by the launcher. A file that stands still belongs to a run that is dead or hung.

A command is accepted once the ranks have loaded the checkpoint under its settings. A command that ends earlier, because
of a mistyped path or settings that may not change, changes nothing: the run keeps the status it had.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mocme_dist.data.progress import current_stage
from mocme_dist.errors import DataError, MocmeError, Preempted
from mocme_dist.runs.directory import RunDirectory

PREPARING = "preparing"
# Fields of a status that remain valid when another command starts.
_LASTING = ("step", "last_step", "last_checkpoint")
# Interval of the heartbeats in run_status.json (seconds).
BEAT_S = 5.0
# Held while a thread of this process reads and writes the file: launcher and rank 0 may be one process.
STATUS_LOCK = threading.Lock()


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` every BEAT_S seconds, with STATUS_LOCK held, in a thread that lasts as long as the block."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT_S):
            # A torn file is one that another process is writing.
            with STATUS_LOCK, suppress(DataError):
                beat()

    thread = threading.Thread(target=run, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_S)


class State:
    """State of the run whose lock this process holds.

    Attributes:
        ended: whether `end` has completed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.ended = False
        self.before = directory.read_status()
        if self.before.get("state") == "running":  # only this process holds the lock
            self.before |= {"state": "failed", "exit_code": MocmeError.exit_code, "error": "its process was killed"}

    def begin(self) -> None:
        """Record that data is being prepared; the ranks remove this phase when they accept the command."""
        self.directory.write_status("running", phase=PREPARING, pid=os.getpid(), **_lasting(self.before))

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats within the block, as long as no rank does."""
        seen: list[dict[str, Any]] = []
        mine: dict[str, Any] = {}

        def beat() -> None:
            nonlocal mine
            now = self.directory.local_status()
            seen[:] = [*seen[-2:], now]
            # Rank 0 is silent while it starts, and if it is gone; it may run on another machine with another clock.
            silent = now.get("phase") == PREPARING or now == mine or seen == [now] * 3
            if now.get("state") == "running" and silent and self.directory.is_held and not self.ended:
                fields = {key: value for key, value in now.items() if key not in ("state", "updated", "stage")}
                self.directory.write_status("running", **fields, stage=current_stage())
                mine = self.directory.local_status()

        with beating(beat):
            yield

    def end(self, error: BaseException | None, durable: bool = True) -> None:
        """Record how the command ended, None for success; writes nothing if another process has taken the run over."""
        self._write_end(error, durable)
        self.ended = True

    def _write_end(self, error: BaseException | None, durable: bool) -> None:
        if not self.directory.is_held:
            return
        if error is None:
            self.directory.write_status("done", exit_code=0, durable=durable, **_lasting(self.directory.read_status()))
            return
        now = self.directory.read_status()
        stopped = isinstance(error, Preempted | KeyboardInterrupt)
        refused = now.get("phase") == PREPARING and "step" in self.before
        if refused and (not stopped or self.before.get("state") == "done"):
            self.directory.write_status(**({"state": "failed"} | self.before))
            return
        code = Preempted.exit_code if stopped else error.exit_code if isinstance(error, MocmeError) else 70
        kind = Preempted.__name__ if stopped else type(error).__name__
        self.directory.write_status(
            "preempted" if stopped else "failed",
            durable=durable,
            exit_code=code,
            error=f"{kind}: {error}",
            **_lasting(now),
        )


def _lasting(status: dict[str, Any]) -> dict[str, Any]:
    return {key: status[key] for key in _LASTING if key in status}
