"""The run directory: who holds it, what state the run is in, and where its files are.

RUN_DIR/config.yaml, metrics.jsonl, metrics.json, run_status.json, checkpoints/, tensorboard/, lock. `run_status.json`
is the truth about how a run ended, because a cluster's job runner hides exit codes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist import __version__
from mocme_dist.config import Config, dump_config
from mocme_dist.data.files import read_json, write_bytes, write_json
from mocme_dist.errors import ConfigError, LockedError, StorageError

log = logging.getLogger(__name__)

_OURS = ("config.yaml", "run_status.json", "lock", "dataset")


class RunDirectory:
    """Paths and small files of one run; safe to make on every rank."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.json"
        self.curve = self.path / "metrics.jsonl"
        self.stop_file = self.path / "stop"

    def write_config(self, config: Config) -> None:
        """Keep the resolved configuration and the version of the package."""
        write_bytes(self.config, f"# mocme_dist {__version__}\n{dump_config(config)}".encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory and hold it; a lock whose process is gone is taken over.

        Raises:
            ConfigError: it holds files that are not a run's; nothing is touched.
            LockedError: another process holds it, named with host and start time.
            StorageError: it cannot be written.
        """
        path = self.path / "lock"
        host, since = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
        mine = {"pid": os.getpid(), "host": host, "since": since, "started": _start_of(os.getpid())}
        try:
            if self.path.is_dir() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in _OURS):
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run.dir")
            self.path.mkdir(parents=True, exist_ok=True)
            _take(path, self.path, mine)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made: {error.strerror}; choose a writable run.dir") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def status(self, state: str, **fields: Any) -> None:
        """Write run_status.json: state is running, done, failed or preempted. A full disk costs the status, not the run."""
        try:
            write_json(self.path / "run_status.json", {"state": state, "updated": time.time(), **fields})
        except StorageError as error:
            log.warning("the status %s is not written: %s", state, error)

    def read_status(self) -> dict[str, Any]:
        """What `status` wrote last; empty before."""
        path = self.path / "run_status.json"
        return read_json(path) if path.exists() else {}


def _take(path: Path, directory: Path, mine: dict[str, Any]) -> None:
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            _clear_stale(path, directory)
    with os.fdopen(handle, "w") as file:
        json.dump(mine, file)


def _start_of(pid: int) -> str | None:
    """When a process of this host began, in ticks since its boot; None when there is no such process."""
    try:
        # The name, in parentheses, may hold spaces; the start is the 22nd field, the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _clear_stale(path: Path, directory: Path) -> None:
    """Remove a dead process's lock, or raise LockedError."""
    try:
        owner = json.loads(path.read_text())
        pid, host, since, started = int(owner["pid"]), owner["host"], owner["since"], owner.get("started")
    except FileNotFoundError:
        return  # let go in this moment
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pid, host, since, started = 0, "an unknown host", "an unknown time", None
    # A restarted container gives the same number to another process: the start tells them apart.
    now = _start_of(pid)
    if host == socket.gethostname() and pid and (now is None or (started is not None and now != started)):
        log.warning("%s: the lock of process %d, which is gone, is taken over", directory, pid)
        path.unlink(missing_ok=True)
        return
    raise LockedError(
        f"{directory}: locked by process {pid} on {host} since {since}; use another run.dir, wait for it, "
        f"or delete {path.name} in it if that process is gone"
    )
