"""Checkpoints of a run at a URL, written: here first, then there, never over another's and never over an older one.

No two writers, not even two attempts at one step, write the same object (see `remote` on names). Every rank sends its own
files, all agree, and rank 0 sends the manifest last, between two looks at the lease. What could not be sent stays in
`unsent/` on the machines that wrote it, goes with the next checkpoint or at the end, or is sent first by the same command
when it is started again on that machine.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mocme_dist.data.files import read_json, write_json
from mocme_dist.data.storage import Mirror
from mocme_dist.errors import CheckpointError, LockedError, MocmeError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.training import rundir
from mocme_dist.training.checkpoint import DENSE, MANIFEST, Saved, Saver, describe, step_name, worth_keeping, write_parts
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.lease import Held, Lease
from mocme_dist.training.remote import FOLDER, NAME, choose, shown, size_of

log = logging.getLogger(__name__)

UNSENT = "unsent"


def rewind(mirror: Mirror, lease: Lease, resume: str) -> None:
    """Make the checkpoint that `resume` names ("none" or a step) the newest: later ones stay at the URL and do not count.

    Raises:
        CheckpointError: there is none of the named step.
    """
    start = choose(mirror, resume)
    keep = [saved.path.name for saved in shown(mirror) if start and saved.step <= start[0].step]
    lease.inherit(keep)


def inherit(mirror: Mirror, lease: Lease, before_commit: Callable[[], None]) -> bool:
    """What the new holder of a lease does first: send what this machine still has of the run, and say what it goes on from.

    Args:
        before_commit: see `RemoteSaver`.

    Returns:
        Whether something was sent that rank 0 wrote on this machine.

    Raises:
        LockedError, StorageError: the lease is lost, the storage does not answer.
    """
    sent = False
    _sweep(mirror)
    for folder in sorted((mirror.path / UNSENT).glob("step_*")):
        manifest = read_json(folder / MANIFEST)
        there = mirror.listing(f"{FOLDER}/{folder.name}/*")
        waiting = [
            name for name, entry in manifest["files"].items() if size_of(there.get(f"{FOLDER}/{folder.name}/{name}")) != entry["bytes"]
        ]
        missing = [name for name in waiting if not (folder / name).is_file()]
        if manifest.get("lease") != lease.before or missing:
            why = f"{missing[0]} lies on another machine" if missing else "another run has gone on from an earlier one meanwhile"
            log.warning("%s was never sent and stays here: %s", folder, why)
            continue
        log.warning("%s was not sent by the run that wrote it; sending it now", folder.name)
        _send_parts(mirror, folder, waiting)
        if (folder / DENSE).is_file():  # rank 0 was here, and so is its curve
            before_commit()
            sent = True
        _commit(mirror, lease.held, folder)
        _settle(mirror, folder)
    lease.inherit([saved.path.name for saved in shown(mirror)])
    return sent


def _sweep(mirror: Mirror) -> None:
    """Clear what a killed run left half-written on this machine."""
    for folder in (mirror.path / UNSENT).glob("*"):
        if not (folder / MANIFEST).is_file():
            log.warning("%s was left half-written by a run that was killed; removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _send_parts(mirror: Mirror, folder: Path, names: list[str]) -> None:
    for name in names:
        mirror.put(folder / name, f"{FOLDER}/{folder.name}/{name}")


def _commit(mirror: Mirror, held: Held, folder: Path) -> None:
    """The manifest, when all files are there and the lease holds before and after."""
    manifest = read_json(folder / MANIFEST)
    there = mirror.listing(f"{FOLDER}/{folder.name}/*")
    for name, entry in manifest["files"].items():
        if size_of(there.get(f"{FOLDER}/{folder.name}/{name}")) != entry["bytes"]:
            raise StorageError(f"{mirror.url}: {FOLDER}/{folder.name}/{name} is not there in its size after it was sent")
    held.check(mirror)
    mirror.put(folder / MANIFEST, f"{FOLDER}/{folder.name}/{MANIFEST}")
    held.check(mirror)


def _settle(mirror: Mirror, folder: Path) -> None:
    """What was sent is from now on as if it had been fetched; one of several ranks here does it."""
    (mirror.path / FOLDER).mkdir(exist_ok=True)
    try:
        folder.rename(mirror.path / FOLDER / folder.name)
    except OSError:  # another rank was faster, or somebody who reads the run on this machine has begun to fetch it
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Unsent:
    folder: Path
    mine: list[str]
    manifest: dict[str, Any]


class RemoteSaver(Saver):
    """Saves while training at a URL; a store that fails costs warnings until the end."""

    def __init__(self, mirror: Mirror, keep: int, comm: Comm, held: Held, before_commit: Callable[[], None]) -> None:
        """Made on every rank.

        Args:
            before_commit: called by rank 0 before each manifest goes: the curve belongs to the checkpoint.
        """
        self.mirror, self.held, self.before_commit = mirror, held, before_commit
        self.unsent: list[_Unsent] = []
        (mirror.path / FOLDER).mkdir(parents=True, exist_ok=True)
        super().__init__(mirror.path / FOLDER, keep, comm)
        _sweep(mirror)

    def write(self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]) -> str:
        """Write it here, then send it.

        Raises:
            StorageError: this disk could not take it. LockedError: another run has taken over.
        """
        name = self.comm.broadcast(f"{step_name(step)}-{self.held.number}-{uuid.uuid4().hex[:8]}")
        folder = self.mirror.path / UNSENT / name
        error: StorageError | None = None
        mine: dict[str, Any] = {}
        try:
            mine = write_parts(folder, table, dense if self.comm.rank == 0 else {}, self.comm.rank)
        except (OSError, SafetensorError) as cause:
            error = StorageError(f"{folder}: checkpoint of step {step} could not be written: {cause}")
        try:
            self.comm.raise_together(error)
            files = {file: entry for part in self.comm.gather(mine) for file, entry in part.items()}
            whole = {**describe(step, table), "files": files, "lease": self.held.number, **manifest}
            try:
                write_json(folder / MANIFEST, whole)
            except StorageError as cause:
                error = cause
            self.comm.raise_together(error)
        except StorageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.unsent.append(_Unsent(folder, list(mine), whole))
        self._send()
        return f"{self.mirror.url}/{FOLDER}/{name}"

    def flush(self) -> None:
        """Send what a store did not take before.

        Raises:
            StorageError: it still does not; with the folder where all of it lies.
        """
        for pause in rundir.RETRY_S:
            time.sleep(pause if self.unsent else 0)
            if self._send():
                return
        raise StorageError(
            f"{self.mirror.url}: does not take checkpoint {self.unsent[-1].folder.name}; it lies in {self.mirror.path / UNSENT}; "
            "run the same command on this machine when the storage answers, it is sent first"
        )

    def _send(self) -> bool:
        """Send what waits, newest first, and purge; False, the same on every rank, when the store does not take it."""
        sent = False
        while self.unsent:
            try:
                self._send_one(self.unsent[-1])
            except StorageError as error:
                # StorageError alone: a lost peer must not pass for a store that does not answer.
                if self.comm.rank == 0:
                    log.warning(
                        "checkpoint %s is saved here and not there yet; tried again with the next: %s", self.unsent[-1].folder.name, error
                    )
                self._forget_old()
                return False
            _settle(self.mirror, self.unsent.pop().folder)
            sent = True
        if sent:
            self._purge()
        return True

    def _send_one(self, unsent: _Unsent) -> None:
        error: MocmeError | None = None
        try:
            _send_parts(self.mirror, unsent.folder, unsent.mine)
        except StorageError as cause:
            error = cause
        self.comm.raise_together(error)
        if self.comm.rank == 0:
            try:
                self.before_commit()
                _commit(self.mirror, self.held, unsent.folder)
            except (StorageError, LockedError) as cause:
                error = cause
        self.comm.raise_together(error)

    def _forget_old(self) -> None:
        """Of what waits keep the newest ones and the best."""
        kept = worth_keeping([Saved(each.folder, each.manifest) for each in reversed(self.unsent)], self.keep)
        folders = {saved.path for saved in kept}
        for each in [each for each in self.unsent if each.folder not in folders]:
            self.unsent.remove(each)
            shutil.rmtree(each.folder, ignore_errors=True)

    def _purge(self) -> None:
        """Keep the newest checkpoints and the best, there and here."""
        kept: list[str] | None = None
        if self.comm.rank == 0:
            try:
                kept = self._purge_there()
            except (StorageError, CheckpointError) as error:
                log.warning("older checkpoints could not be removed: %s", error)
        kept = self.comm.broadcast(kept)
        if kept is not None:
            for path in self.directory.glob("step_*"):
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)

    def _purge_there(self) -> list[str]:
        whole = shown(self.mirror)
        kept = {saved.path.name for saved in worth_keeping(whole, self.keep)}
        doomed = [saved.path.name for saved in whole if saved.path.name not in kept]
        there = self.mirror.listing(f"{FOLDER}/step_*")
        names = {path.split("/")[1] for path in there}
        # Without a manifest: half-sent by a holder before this one, or by an attempt of this one that was killed.
        waiting = {each.folder.name for each in self.unsent}
        torn = [name for name in names if f"{FOLDER}/{name}/{MANIFEST}" not in there and name not in waiting and self._is_older(name)]
        self.held.check(self.mirror)
        for name in (*doomed, *torn):
            self.mirror.remove(f"{FOLDER}/{name}/{MANIFEST}")  # first: without it the rest is no checkpoint
            self.mirror.remove(f"{FOLDER}/{name}")
        return sorted(kept)

    def _is_older(self, name: str) -> bool:
        match = NAME.fullmatch(name)
        return match is not None and int(match[1] or 0) <= self.held.number
