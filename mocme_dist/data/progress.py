"""Signs of life for long work: a bar on a terminal, a line of log at an interval elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Counts `advance`d units of `total`; use it as a context.

    Args:
        what: what is being done, for the user.
        total: units in all.
        unit: name of a unit; "B" is shown in kilo- and megabytes.
        interval_s: seconds between two lines where there is no terminal.
    """

    def __init__(self, what: str, total: int, unit: str, interval_s: float = 10.0) -> None:
        self._what, self._total, self._unit, self._interval_s = what, total, unit, interval_s
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int = 1) -> None:
        """Count `units` more, and show it when it is time."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
            return
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            rate = self._done / (now - self._start)
            left_s = (self._total - self._done) / rate if rate else 0.0
            done, total, speed = f"{self._done:,}", f"{self._total:,}", f"{rate:,.1f}"
            log.info("%s: %s of %s %s, %s %s/s, %.0f s left", self._what, done, total, self._unit, speed, self._unit, left_s)
