"""The run directory: its holder, the state of the run, and the places of its files.

RUN_DIR has config.yaml, blend.safetensors, metrics.jsonl, metrics.json (of the training), metrics.SPLIT.json (of
evaluations), run_status.json, checkpoints/, tensorboard/ and lock. `run_status.json` says how a run ended, because a
cluster's job runner hides exit codes.

For a run at a URL every machine works in a copy; the files at the URL are authoritative. Checkpoints are sent by
`saver`, small files by `send`: rank 0's machine sends what the ranks write, the launcher's machine what it writes about
the end.
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist import __version__
from mocme_dist.config import Config, dump_config, load_config
from mocme_dist.data.files import read_json, write_bytes, write_json
from mocme_dist.data.remote_storage import RemoteStorage, open_storage
from mocme_dist.errors import ConfigError, DataError, LockedError, StorageError
from mocme_dist.evidence.blend import FILE as BLEND
from mocme_dist.runs import checkpoints as saved_checkpoints
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.lease import FOLDER as LEASE
from mocme_dist.runs.lease import Held, Lease
from mocme_dist.runs.lock import Lock

log = logging.getLogger(__name__)

STATUS = "run_status.json"
# Files of a run beside its checkpoints, which are sent to a URL and fetched from it.
_SMALL = ("config.yaml", BLEND, "metrics.json", "metrics.jsonl", STATUS, "tensorboard/*")
# Files that stay on their machine, or are sent in another way.
_STAYS = ("lock*", "stop", "ray/*", "dataset/*", "lease/*", "checkpoints/*", "unsent/*")
# First line of a run's config.yaml; a file of this name of another project has another one.
_CONFIG_MARK = "# mocme_dist "


class RunDirectory:
    """Paths and small files of one run; cheap to create on every rank."""

    def __init__(self, place: str | Path) -> None:
        self.storage = open_storage(place)
        self.path = self.storage.path
        self.place = self.storage.place
        self.checkpoints = Checkpoints(self.storage)
        self._sent: dict[str, tuple[int, int]] = {}
        self._unwritten: set[str] = set()
        self._lock: Lock | None = None
        self.config = self.path / "config.yaml"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.json"
        self.curve = self.path / "metrics.jsonl"
        self.blend = self.path / BLEND
        self.stop_file = self.path / "stop"
        self._status = self.path / STATUS

    def write_config(self, config: Config, legs: Sequence[str] = ()) -> None:
        """Write the resolved configuration with the version of the package and, as comments, the legs of the run."""
        history = "".join(f"# leg {number}: {' '.join(leg.split())}\n" for number, leg in enumerate(legs, 1))
        write_bytes(self.config, f"{_CONFIG_MARK}{__version__}\n{history}{dump_config(config)}".encode())

    def read_config(self) -> Config | None:
        """Return the configuration that the run last accepted; None if there is none that this version can read."""
        try:
            return load_config([self.config]) if self.config.is_file() else None
        except ConfigError as error:
            log.warning("the settings of the earlier run are not compared: %s", error)
            return None

    def read_report(self) -> dict[str, Any] | None:
        """Return the report of the training; None before its end.

        Raises:
            DataError: the file is not a JSON object.
        """
        if not self.metrics.is_file():
            return None
        report = read_json(self.metrics)
        if not isinstance(report, dict):
            raise DataError(
                f"{self.metrics}: expected a JSON object, found {type(report).__name__}; remove the file and run the "
                "same command: it is written at the end"
            )
        return report

    def write_evaluation(self, split: str, report: dict[str, Any]) -> None:
        """Write the metrics of an evaluation, one file per split; if that fails, they are only printed."""
        try:
            write_json(self.path / f"metrics.{split}.json", report)
        except StorageError as error:
            log.warning("the metrics are only printed: %s", error)

    def _is_ours(self) -> bool:
        if self._status.exists() or (self.path / "lock").exists():
            return True
        if not self.config.is_file():
            return False
        with self.config.open("rb") as file:
            return file.read(len(_CONFIG_MARK)) == _CONFIG_MARK.encode()

    def _refuse_folders(self) -> None:
        """Raise ConfigError if a folder has the name of a file of the run."""
        for path in (
            self.path / "lock",
            self.config,
            self._status,
            self.stop_file,
            self.curve,
            self.metrics,
            self.blend,
        ):
            if path.is_dir():
                raise ConfigError(f"{path}: a folder, expected a file; remove it, or choose another run.dir")

    @contextmanager
    def lock(self) -> Iterator[Lease | None]:
        """Create the directory and hold it, with the lease of a URL; the lock of a dead process is taken over.

        Raises:
            ConfigError: it has files that are not a run's; nothing is changed.
            LockedError: another process holds it; with its host and start time.
            StorageError: it cannot be written.
        """
        remote = self.storage if isinstance(self.storage, RemoteStorage) else None
        try:
            if remote is None and self.path.is_dir() and any(self.path.iterdir()) and not self._is_ours():
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run.dir")
            self._refuse_folders()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock = Lock(self.path)
            self.checkpoints.path.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be created: {error.strerror}; choose a writable run.dir") from None
        try:
            if remote is None:
                yield None
                return
            there = remote.list()
            if there and not any(name.startswith(f"{LEASE}/") or name in (STATUS, self.config.name) for name in there):
                raise ConfigError(f"{remote.url}: not empty and not a run directory; choose another run.dir")
            lease = Lease(remote)
            try:
                yield lease
            finally:
                lease.release()
        finally:
            lock.release()

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock and no other process has taken it over."""
        return self._lock is not None and self._lock.is_mine()

    def fetch(self) -> None:
        """Make the local small files equal to those at the URL, deletions included; does nothing for a folder.

        Raises:
            StorageError: the storage does not answer.
        """
        if not isinstance(self.storage, RemoteStorage):
            return
        there = self.storage.list(*_SMALL)
        for path in (*self.path.glob("*.*"), *self.tensorboard.rglob("*")):
            name = str(path.relative_to(self.path))
            if path.is_file() and name not in there and any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL):
                path.unlink(missing_ok=True)
        self.storage.pull(*_SMALL)

    def fetch_file(self, path: Path) -> bool:
        """Bring one small file up to date from the URL; return whether it exists in the run.

        Raises:
            StorageError: the storage does not answer.
        """
        if not isinstance(self.storage, RemoteStorage):
            return path.is_file()
        name = path.relative_to(self.path).as_posix()
        self.storage.pull(name)
        return bool(self.storage.list(name)) and path.is_file()

    def send(self, held: Held | None, *names: str) -> None:
        """Send small files that are new or have changed, or only those named, to the URL; does nothing for a folder.

        Raises:
            LockedError: another run has taken over. StorageError: the storage does not take it.
        """
        if not isinstance(self.storage, RemoteStorage) or held is None:
            return
        held.check(self.storage)
        if names:
            self.storage.push(name for name in names if (self.path / name).is_file())
        else:
            self.storage.push_tree((STATUS,), _STAYS, self._sent)

    def send_at_end(self, held: Held | None, *names: str) -> None:
        """`send` with several attempts, so that a moment without the store does not cost a finished run its report.

        Raises:
            LockedError: see `send`. StorageError: the last attempt failed, too; with the folder that has all of it.
        """
        waits = saved_checkpoints.RETRY_S
        for number, pause in enumerate(waits, 1):
            time.sleep(pause)
            try:
                self.send(held, *names)
                return
            except StorageError as error:
                if number == len(waits):
                    raise StorageError(
                        f"{error}; files that were not sent are in {self.path}; run the same command on this machine"
                    ) from None

    def try_to_send(self, held: Held | None, *names: str) -> None:
        """`send`, where a failure costs a warning."""
        try:
            self.send(held, *names)
        except (StorageError, LockedError) as error:
            log.warning("%s", error)

    def write_status(self, state: str, *, durable: bool = True, **fields: Any) -> None:
        """Write run_status.json; `state` is running, done, failed or preempted. A full disk costs a warning."""
        try:
            write_json(self._status, {"state": state, "updated": time.time(), **fields}, durable)
        except StorageError as error:
            if state not in self._unwritten:  # heartbeats come every few seconds
                log.warning("the status %s is not written: %s", state, error)
            self._unwritten.add(state)

    def write_progress(self, **fields: Any) -> None:
        """Write the status of a run that trains, unless its launcher has already written how it ended."""
        if self.storage.is_remote or self.local_status().get("state", "running") == "running":
            self.write_status("running", **fields)

    def local_status(self) -> dict[str, Any]:
        """Return the status on this machine; empty before the first, and if it is damaged."""
        try:
            status = read_json(self._status) if self._status.exists() else {}
        except DataError as error:
            log.warning("%s", error)
            return {}
        if isinstance(status, dict):
            return status
        log.warning("%s: expected a JSON object, found %s; it is written anew", self._status, type(status).__name__)
        return {}

    def read_status(self) -> dict[str, Any]:
        """Return the status that was written last, on any machine; empty before, and if it is damaged."""
        try:
            self.fetch_file(self._status)
        except (StorageError, DataError) as error:
            log.warning("%s", error)
        return self.local_status()
