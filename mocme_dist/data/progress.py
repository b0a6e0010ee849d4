"""Shows that long work is alive: a bar on a terminal, a log line per interval elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Counts work of a known total and shows rate and ETA; a context manager. `add` may be called from any thread."""

    def __init__(self, name: str, total: int, unit: str = "rows", interval_s: float = 10.0) -> None:
        self.name, self.total, self.unit, self.interval_s = name, total, unit, interval_s
        self.done = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._bar: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, desc=self.name, unit=f" {self.unit}", unit_scale=self.unit == "B", dynamic_ncols=True, leave=False
            )
        else:
            self._thread = threading.Thread(target=self._lines, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._thread.join()

    def add(self, count: int = 1) -> None:
        """`count` more units are done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)

    def raise_to(self, count: int) -> None:
        """At least `count` units are done in all, as far as there are so many; what was counted before stays."""
        with self._lock:
            more = min(count, self.total) - self.done
        if more > 0:
            self.add(more)

    def line(self) -> str:
        """Done of total, rate and time left, in words."""
        elapsed = time.monotonic() - self._started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate > 0 else "time left unknown yet"
        return f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left}"

    def _lines(self) -> None:
        while not self._over.wait(self.interval_s):
            log.info("%s", self.line())
