"""The run directory: who holds it, what state the run is in, and where its files are.

RUN_DIR/config.yaml, metrics.jsonl, metrics.json, run_status.json, checkpoints/, tensorboard/, lock. `run_status.json`
is the truth about how a run ended, because a cluster's job runner hides exit codes.

Of a run at a URL every machine has a copy to work in; what is at the URL is the truth. Its checkpoints are `remote`'s, the
small files go by `send`: rank 0's machine sends what the ranks write, the launcher's what it says about the end.
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist import __version__
from mocme_dist.config import Config, dump_config
from mocme_dist.data.files import read_json, write_bytes, write_json
from mocme_dist.data.storage import Mirror, is_url
from mocme_dist.errors import ConfigError, LockedError, StorageError
from mocme_dist.training.lease import FOLDER as LEASE
from mocme_dist.training.lease import Held, Lease
from mocme_dist.training.lock import Lock

log = logging.getLogger(__name__)

# Waits between attempts to send, at the end of a run, what a store did not take before.
RETRY_S = (0.0, 3.0, 15.0)
# Files of a run beside its checkpoints; at a URL these are sent and fetched.
_SMALL = ("config.yaml", "metrics.json", "metrics.jsonl", "run_status.json", "tensorboard/*")
# What never leaves the machine that it is of, or goes in another way.
_STAYS = ("lock*", "stop", "ray/*", "dataset/*", "lease/*", "checkpoints/*", "unsent/*")
_OURS = ("run_status.json", "lock")
# The first line of a run's config.yaml begins so; another project's file of that name does not.
_CONFIG_MARK = "# mocme_dist "


class RunDirectory:
    """Paths and small files of one run; safe to make on every rank."""

    def __init__(self, place: str | Path) -> None:
        self.mirror = Mirror(str(place)) if is_url(place) else None
        self.path = self.mirror.path if self.mirror else Path(place).absolute()
        self.place = self.mirror.url if self.mirror else str(self.path)
        self._sent: dict[str, tuple[int, int]] = {}
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
    def lock(self) -> Iterator[Lease | None]:
        """Make the directory and hold it; a lock whose process is gone is taken over. Of a URL the lease is given.

        Raises:
            ConfigError: it holds files that are not a run's; nothing is touched.
            LockedError: another process holds it, named with host and start time.
            StorageError: it cannot be written.
        """
        try:
            if self.path.is_dir() and any(self.path.iterdir()) and not self._is_ours() and self.mirror is None:
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run.dir")
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made: {error.strerror}; choose a writable run.dir") from None
        try:
            if self.mirror is None:
                yield None
                return
            there = self.mirror.listing()
            if there and not any(name.startswith(f"{LEASE}/") or name in ("run_status.json", self.config.name) for name in there):
                raise ConfigError(f"{self.mirror.url}: not empty and not a run directory; choose another run.dir")
            lease = Lease(self.mirror)
            try:
                yield lease
            finally:
                lease.release()
        finally:
            lock.release()

    def fetch(self) -> None:
        """Bring the small files of a run at a URL; what is not there goes here too. Nothing for a folder.

        Raises:
            StorageError: the storage does not answer.
        """
        if self.mirror is None:
            return
        there = self.mirror.listing(*_SMALL)
        for path in (*self.path.glob("*.*"), *self.tensorboard.rglob("*")):
            name = str(path.relative_to(self.path))
            if path.is_file() and name not in there and any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL):
                path.unlink(missing_ok=True)
        self.mirror.pull(*_SMALL)

    def send(self, held: Held | None, *names: str) -> None:
        """Send the small files of a run at a URL that are new or have changed, or only those named. Nothing for a folder.

        Raises:
            LockedError: another run has taken over. StorageError: the storage does not take it.
        """
        if self.mirror is None or held is None:
            return
        held.check(self.mirror)
        if names:
            self.mirror.push(name for name in names if (self.path / name).is_file())
        else:
            self.mirror.push_tree(("run_status.json",), _STAYS, self._sent)

    def insist_to_send(self, held: Held | None, *names: str) -> None:
        """`send` at the end of a run, where a moment without the store must not cost it its report.

        Raises:
            LockedError: see `send`. StorageError: the last attempt failed, too; with the folder where all of it lies.
        """
        for number, pause in enumerate(RETRY_S, 1):
            time.sleep(pause)
            try:
                self.send(held, *names)
                return
            except StorageError as error:
                if number == len(RETRY_S):
                    raise StorageError(f"{error}; what was not sent lies in {self.path}; run the same command on this machine") from None

    def try_to_send(self, held: Held | None, *names: str) -> None:
        """`send`, where a failure is worth a warning and no more."""
        try:
            self.send(held, *names)
        except (StorageError, LockedError) as error:
            log.warning("%s", error)

    def status(self, state: str, **fields: Any) -> None:
        """Write run_status.json: state is running, done, failed or preempted. A full disk costs the status, not the run."""
        try:
            write_json(self.path / "run_status.json", {"state": state, "updated": time.time(), **fields})
        except StorageError as error:
            log.warning("the status %s is not written: %s", state, error)

    def read_status(self) -> dict[str, Any]:
        """What `status` wrote last, on whatever machine; empty before."""
        path = self.path / "run_status.json"
        if self.mirror is not None:
            try:
                self.mirror.pull(path.name)
            except StorageError as error:
                log.warning("%s", error)
        return read_json(path) if path.exists() else {}

    def last_checkpoint(self) -> str:
        """Path or address of the newest one, unverified: the ranks verify when they load."""
        names = sorted(path.name for path in self.checkpoints.glob("step_*"))
        if self.mirror is not None:
            try:
                there = self.mirror.listing("checkpoints/step_*/MANIFEST.json")
            except StorageError:
                return f"unknown, {self.place} does not answer"
            names = sorted(name.split("/")[1] for name in there)
        return f"{self.place}/checkpoints/{names[-1]}" if names else "none yet"
