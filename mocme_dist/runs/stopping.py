"""Requests to stop a run: by the user's signal, or by the launcher that will continue with other workers.

Both create a file that every rank looks for once per step; the ranks agree, save a checkpoint and leave. While no rank
makes steps (data and workers are prepared, or the best checkpoint is evaluated) there is nothing to save, and a signal
ends the command at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A request to stop, and who made it.

    Attributes:
        asked_at: time of the first signal, by the monotonic clock.
        stepping: whether ranks look at the file. The launcher of other processes leaves it True and reads their
            heartbeats instead.
    """

    def __init__(self, file: Path, stepping: bool = True) -> None:
        self.file, self.stepping = file, stepping
        self.asked_at: float | None = None
        self.by_launcher = False

    @property
    def by_user(self) -> bool:
        """Whether a signal was received."""
        return self.asked_at is not None

    def ask(self) -> None:
        """Make the launcher's request; the run continues afterwards."""
        self.by_launcher = True
        self.file.touch()

    def clear(self) -> None:
        """Withdraw the launcher's request before another attempt; the user's stays."""
        self.by_launcher = False
        if not self.by_user:
            self.file.unlink(missing_ok=True)

    def before_step(self, _step: int) -> None:
        """Record that this process makes steps."""
        self.stepping = True

    def ended(self) -> None:
        """Record that this process has made its last step.

        Raises:
            KeyboardInterrupt: a signal came too late to stop it.
        """
        self.stepping = False
        if self.by_user:
            raise KeyboardInterrupt("stopped before the final evaluation")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT: the first asks stepping ranks to save and stop, any other ends the command at
        once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.file.unlink(missing_ok=True)
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.file.unlink(missing_ok=True)

    def _handle(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self.by_user or not self.stepping:
            # An interrupt, so that no `except Exception` on the way catches it.
            raise KeyboardInterrupt(f"{name}, twice" if self.by_user else name)
        self.asked_at = time.monotonic()
        log.warning("%s: saving a checkpoint after this step; once more ends at once", name)
        self.file.touch()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Delay SIGTERM and SIGINT until the end of the block."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
