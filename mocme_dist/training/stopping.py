"""Asking a run to stop: by the user's signal, or by the launcher that wants to go on with other workers.

Both work through one file that every rank looks for once a step; the ranks agree, save a checkpoint and leave.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class StopRequest:
    """The request, and who made it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked_at: float | None = None
        self.by_launcher = False

    @property
    def by_user(self) -> bool:
        """Whether a signal came."""
        return self.asked_at is not None

    def ask(self) -> None:
        """The launcher's request; the run goes on afterwards."""
        self.by_launcher = True
        self.file.touch()

    def clear(self) -> None:
        """Before another attempt; what the user asked for stays."""
        self.by_launcher = False
        if not self.by_user:
            self.file.unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT: the first asks the run to save and stop, the second ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.file.unlink(missing_ok=True)
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.file.unlink(missing_ok=True)

    def _handle(self, number: int, _frame: object) -> None:
        if self.by_user:  # by this process: under torchrun another may have made the file
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked_at = time.monotonic()
        log.warning("%s: saving a checkpoint after this step; once more ends at once", signal.Signals(number).name)
        self.file.touch()
