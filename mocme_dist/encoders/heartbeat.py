"""Progress of actors within their shards, through small files in a folder that driver and actors share.

An actor overwrites its file with the number of rows done so far; the driver adds the files up. Nothing waits for these
files: a lost one only delays the progress bar. Finished shards are counted by their results, not here.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mocme_dist.data.progress import Progress
from mocme_dist.encoders.crash_guard import SUFFIX
from mocme_dist.errors import StorageError

PREFIX = ".progress-"
_STALE_S = 3600.0  # age at which a folder is left by a killed run; a live run writes every few seconds
_EVERY_S = 1.0


class Heartbeat:
    """The actor's side: `beat(rows)` adds rows and writes the sum at most once per second."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / uuid.uuid4().hex
        self._rows = 0
        self._written = -_EVERY_S

    def beat(self, rows: int) -> None:
        """Add a number of finished rows."""
        self._rows += rows
        now = time.monotonic()
        if now - self._written < _EVERY_S:
            return
        self._written = now
        try:
            self._path.write_text(f"{self._rows}")
        except OSError:
            self._written = now + 60  # the folder is gone or full: only the progress bar is affected


def rows_done(folder: Path) -> int:
    """Return the sum over all actors' files; a file that is being written counts as 0."""
    total = 0
    for path in folder.iterdir():
        if path.suffix == SUFFIX:
            continue
        text = path.read_text(encoding="ascii", errors="replace")
        total += int(text) if text.isdigit() else 0
    return total


@contextmanager
def watch(parent: Path, progress: Progress, every_s: float = 2.0) -> Iterator[Path]:
    """Yield a folder for heartbeats in `parent`; they are added to `progress`, and the folder is removed at the end.

    Raises:
        StorageError: `parent` cannot be written.
    """
    folder = parent / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder.mkdir()
    except OSError as error:
        raise StorageError(
            f"{parent.absolute()}: cannot be written: {error.strerror or error}; features go there"
        ) from None
    over = threading.Event()

    def follow() -> None:
        while not over.wait(every_s):
            try:
                progress.raise_to(rows_done(folder))
            except OSError:
                continue

    thread = threading.Thread(target=follow, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        over.set()
        thread.join(60)  # a disk that does not answer may hold it
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove heartbeats of killed runs."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another run removed it in the meantime
            if time.time() - path.stat().st_mtime >= _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
