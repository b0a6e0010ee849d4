"""How far the actors are inside their shards, by small files in a folder that driver and actors share.

An actor overwrites its file with the rows it has done so far; the driver adds the files up. No process more, nothing
to wait for: a lost file only makes the bar late. Whole shards are counted by their results, not here.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mocme_dist.data.progress import Progress
from mocme_dist.encoders.attempts import SUFFIX
from mocme_dist.errors import StorageError

PREFIX = ".progress-"
_STALE_S = 3600.0  # what a killed run left; a live one writes every few seconds
_EVERY_S = 1.0


class Heartbeat:
    """An actor's side: `beat(rows)` adds rows and writes the sum at most once a second."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / uuid.uuid4().hex
        self._rows = 0
        self._written = -_EVERY_S

    def beat(self, rows: int) -> None:
        """So many more rows are done."""
        self._rows += rows
        now = time.monotonic()
        if now - self._written < _EVERY_S:
            return
        self._written = now
        try:
            self._path.write_text(f"{self._rows}")
        except OSError:
            self._written = now + 60  # the folder is gone or full: features matter, a bar does not


def rows_done(folder: Path) -> int:
    """The sum over all actors' files; one that is just being written counts as nothing this time."""
    total = 0
    for path in folder.iterdir():
        if path.suffix == SUFFIX:
            continue
        text = path.read_text(encoding="ascii", errors="replace")
        total += int(text) if text.isdigit() else 0
    return total


@contextmanager
def watch(parent: Path, progress: Progress, every_s: float = 2.0) -> Iterator[Path]:
    """A folder for heartbeats in `parent`; what they say is added to `progress`, and the folder removed at the end.

    Raises:
        StorageError: `parent` cannot be written.
    """
    folder = parent / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder.mkdir()
    except OSError as error:
        raise StorageError(f"{parent.absolute()}: cannot be written: {error.strerror or error}; features go there") from None
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
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what killed runs left: heartbeats, and files they were about to rename."""
    for path in parent.glob("**/.*"):
        try:
            if time.time() - path.stat().st_mtime < _STALE_S:
                continue
        except OSError:
            continue  # another run renamed or removed it meanwhile
        if path.name.startswith(PREFIX):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".tmp-"):
            path.unlink(missing_ok=True)
