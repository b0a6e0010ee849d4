"""The run directory: who holds it, what state the run is in, and where its files are.

RUN_DIR/config.yaml, metrics.jsonl, metrics.json, run_status.json, checkpoints/, tensorboard/, lock. `run_status.json`
is the truth about how a run ended, because a cluster's job runner hides exit codes.
"""

from __future__ import annotations

import json
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

_OURS = ("config.yaml", "run_status.json", "lock", "dataset")


class RunDirectory:
    """Paths and small files of one run; safe to make on every rank."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.json"
        self.curve = self.path / "metrics.jsonl"
        self.stop_file = self.path / "stop"

    def prepare(self, config: Config) -> None:
        """Make the directory and write the resolved configuration.

        Raises:
            ConfigError: it holds files that are not a run's; nothing is touched.
            StorageError: it cannot be written.
        """
        try:
            if self.path.is_dir() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in _OURS):
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run.dir")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made: {error.strerror}; choose a writable run.dir") from None
        write_bytes(self.path / "config.yaml", f"# mocme_dist {__version__}\n{dump_config(config)}".encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory; a lock whose process is gone is taken over.

        Raises:
            LockedError: another process holds it, named with host and start time.
        """
        path = self.path / "lock"
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.path.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                break
            except FileExistsError:
                _clear_stale(path, self.path)
        with os.fdopen(handle, "w") as file:
            json.dump(mine, file)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def status(self, state: str, **fields: Any) -> None:
        """Write run_status.json: state is running, done, failed or preempted."""
        write_json(self.path / "run_status.json", {"state": state, "updated": time.time(), **fields})

    def read_status(self) -> dict[str, Any]:
        """What `status` wrote last; empty before."""
        path = self.path / "run_status.json"
        return read_json(path) if path.exists() else {}


def _clear_stale(path: Path, directory: Path) -> None:
    """Remove a dead process's lock, or raise LockedError."""
    try:
        owner = json.loads(path.read_text())
        pid, host, since = int(owner["pid"]), owner["host"], owner["since"]
    except (OSError, ValueError, KeyError):
        pid, host, since = 0, "an unknown host", "an unknown time"
    if host == socket.gethostname() and pid and not Path(f"/proc/{pid}").exists():
        path.unlink(missing_ok=True)
        return
    raise LockedError(
        f"{directory}: locked by process {pid} on {host} since {since}; use another run.dir, wait for it, "
        f"or delete {path.name} in it if that process is gone"
    )
