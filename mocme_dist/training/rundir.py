"""The run directory: who holds it, what state the run is in, and where its files are.

RUN_DIR/config.yaml, metrics.jsonl, metrics.json, run_status.json, checkpoints/, tensorboard/, lock. `run_status.json`
is the truth about how a run ended, because a cluster's job runner hides exit codes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist import __version__
from mocme_dist.config import Config, dump_config
from mocme_dist.data.files import read_json, write_bytes, write_json
from mocme_dist.errors import ConfigError, StorageError
from mocme_dist.training.lock import Lock

log = logging.getLogger(__name__)

_OURS = ("run_status.json", "lock")
# The first line of a run's config.yaml begins so; another project's file of that name does not.
_CONFIG_MARK = "# mocme_dist "


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
        write_bytes(self.config, f"{_CONFIG_MARK}{__version__}\n{dump_config(config)}".encode())

    def _is_ours(self) -> bool:
        if any((self.path / name).exists() for name in _OURS):
            return True
        if not self.config.is_file():
            return False
        with self.config.open("rb") as file:
            return file.read(len(_CONFIG_MARK)) == _CONFIG_MARK.encode()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory and hold it; a lock whose process is gone is taken over.

        Raises:
            ConfigError: it holds files that are not a run's; nothing is touched.
            LockedError: another process holds it, named with host and start time.
            StorageError: it cannot be written.
        """
        try:
            if self.path.is_dir() and any(self.path.iterdir()) and not self._is_ours():
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run.dir")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made: {error.strerror}; choose a writable run.dir") from None
        try:
            yield
        finally:
            lock.release()

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
