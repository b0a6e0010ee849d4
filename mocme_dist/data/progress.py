"""Progress of long work: a bar on a terminal, otherwise a log line whenever nothing was written for a while.

In a worker under Ray a `Progress` sends its state to the driver, which shows a copy of it.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

from mocme_dist import console

log = logging.getLogger(__name__)

# Silence after which a line is written, and interval of the checks: together at least one line every ten seconds.
SILENCE_S = 8.0
_LOOK_S = 0.5
# Shortest interval between two states that a worker sends.
_SEND_S = 1.0
# Stages shorter than this draw no bar.
_BAR_AFTER_S = 1.0


class _Stages:
    """The open stages, outermost first, and the thread that reports the innermost."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.open: list[Progress] = []
        self.thread: threading.Thread | None = None
        self.numbers = itertools.count()
        # Copies of the open stages of workers, by worker and number.
        self.twins: dict[tuple[str, int], Progress] = {}

    def enter(self, stage: Progress) -> None:
        with self.lock:
            self.open.append(stage)
            if self.thread is None:
                self.thread = threading.Thread(target=self._speak, name="signs-of-life", daemon=True)
                self.thread.start()

    def add(self, stage: Progress) -> None:
        """Open a stage of a worker, whose driver speaks for it."""
        with self.lock:
            self.open.append(stage)

    def leave(self, stage: Progress) -> None:
        with self.lock:
            self.open = [other for other in self.open if other is not stage]

    def _speak(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            with self.lock:
                if not self.open:
                    self.thread = None
                    return
                stage = self.open[-1]
            if stage.bar is not None:
                stage.refresh()
            elif console.silent_s() >= SILENCE_S:
                console.spoke()  # also if the log level hides the line
                log.info("%s", stage.line())


_stages = _Stages()


def work_done() -> tuple[str, int]:
    """Return name and number of finished units of the innermost open stage, a worker's on the driver."""
    with _stages.lock:
        stage = _stages.open[-1] if _stages.open else None
    return (stage.name, stage.done) if stage is not None else ("", 0)


def current_stage() -> str:
    """Return the line of the innermost stage that is open in this process; empty if there is none."""
    with _stages.lock:
        stage = _stages.open[-1] if _stages.open else None
    return stage.line() if stage is not None else ""


class Progress:
    """A stage of a command, as a context manager; methods may be called from any thread.

    Rate and remaining time are measured from the first advance, so that starting or compiling does not distort them.
    """

    def __init__(
        self, name: str, total: int | None = None, unit: str = "rows", start: int = 0, active: bool = True
    ) -> None:
        """Prepare a stage; nothing is shown before it is entered.

        Args:
            name: of the stage, for example "packing".
            total: units of work, if known; otherwise only the time is shown.
            unit: name of a unit, in the plural; "B" for bytes.
            start: units done before.
            active: False shows nothing, for all ranks but the first.
        """
        self.name = name
        self.total = total
        self.unit = unit
        self.active = active
        self.done = start
        self.note = ""
        self.bar: Any = None
        self._lock = threading.Lock()
        self._first: tuple[float, int] | None = None
        self._number = next(_stages.numbers)
        self._sent = -_SEND_S
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if not self.active:
            return self
        if console.is_worker():
            _stages.add(self)
            self._send()
            return self
        if sys.stderr.isatty():
            self.bar = _bar(self)
        _stages.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if not self.active:
            return
        _stages.leave(self)
        if console.is_worker():
            self._send(over=True)
            return
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` describes the last of them."""
        with self._lock:
            self.done += count
            self.note = note or self.note
            if self._first is None and count:
                self._first = time.monotonic(), self.done
            if self.bar is not None:
                self.bar.set_postfix_str(self.note, refresh=False)
                self.bar.update(count)
        if self.active and console.is_worker() and time.monotonic() - self._sent >= _SEND_S:
            self._send()

    def raise_to(self, count: int, note: str = "") -> None:
        """Raise the number of finished units to `count`, at most to the total; it never falls."""
        with self._lock:
            more = (count if self.total is None else min(count, self.total)) - self.done
        if more > 0 or note:
            self.add(max(more, 0), note)

    def line(self) -> str:
        """Return finished units, total, rate and remaining time as text."""
        now = time.monotonic()
        if self.total is None:
            parts = [f"{self.name}, {duration(now - self._began)} so far"]
        else:
            parts = [f"{self.name}: {self.done:,}/{self.total:,} {self.unit}"]
            at, before = self._first or (now, self.done)
            if self.done > before and now > at:
                rate = (self.done - before) / (now - at)
                parts += [f"{rate:,.1f}/s", f"{duration((self.total - self.done) / rate)} left"]
            else:
                parts.append(f"{duration(now - self._began)} so far")
        return ", ".join([*parts, self.note] if self.note else parts)

    def refresh(self) -> None:
        """Draw the bar again, so that its clock advances."""
        if self.bar is not None and time.monotonic() - self._began >= _BAR_AFTER_S:
            self.bar.refresh()

    def _send(self, over: bool = False) -> None:
        self._sent = time.monotonic()
        names = ("name", "total", "unit", "done", "note")
        console.send_state({"number": self._number, "over": over, **{name: getattr(self, name) for name in names}})


def _bar(stage: Progress) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=stage.total,
        initial=stage.done,
        desc=stage.name,
        unit=f" {stage.unit}",
        unit_scale=stage.unit == "B",
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
        delay=_BAR_AFTER_S,
        bar_format="{desc} {elapsed}{postfix}" if stage.total is None else None,
    )


def show_worker(worker: str, state: dict[str, Any]) -> None:
    """Show a stage of a worker as a stage of this process.

    Args:
        worker: unique name of the worker.
        state: as sent by the stage.
    """
    key = worker, int(state["number"])
    with _stages.lock:
        twin = _stages.twins.pop(key, None)
        if state["over"]:
            if twin is not None:
                twin.__exit__()
            return
        if twin is None:
            twin = Progress(state["name"], state["total"], state["unit"], start=state["done"]).__enter__()
        _stages.twins[key] = twin
    twin.raise_to(state["done"], state["note"])


def forget_workers() -> None:
    """Close the stages of workers that have ended or were lost."""
    with _stages.lock:
        for twin in _stages.twins.values():
            twin.__exit__()
        _stages.twins.clear()


def duration(seconds: float) -> str:
    """Return seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
