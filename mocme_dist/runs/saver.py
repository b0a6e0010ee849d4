"""Saves checkpoints while training: staged on this machine by every rank, put in place together, older ones purged.

`checkpoints` has the protocol. A save fails on all ranks or on none, and earlier checkpoints are untouched.
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

from mocme_dist.data.files import write_json
from mocme_dist.errors import CheckpointError, LockedError, MocmeError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.runs import checkpoints as saved_checkpoints
from mocme_dist.runs.checkpoints import FOLDER, UNSENT, Checkpoints
from mocme_dist.runs.lease import Held
from mocme_dist.training.checkpoint import MANIFEST, Saved, describe, step_name, worth_keeping, write_parts
from mocme_dist.training.engine_rows import EngineRows

log = logging.getLogger(__name__)


@dataclass
class _Unsent:
    """A checkpoint that is staged on this machine, and not yet in place."""

    folder: Path
    mine: list[str]  # the files this rank wrote
    manifest: dict[str, Any]


class Saver:
    """Saves checkpoints while training.

    A full disk is survived a few times before the run stops. A store at a URL that fails costs warnings until the end.

    Args:
        checkpoints: of the run.
        keep: number of newest checkpoints to keep, in addition to the one with the best metric.
        comm: the ranks of the run.
        held: the lease of a run at a URL.
        before_commit: called by rank 0 before each manifest is put: sends the curve up to it.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: int,
        comm: Comm,
        held: Held | None = None,
        before_commit: Callable[[], None] | None = None,
        max_failures: int = 3,
    ) -> None:
        self.checkpoints, self.keep, self.comm, self.held = checkpoints, keep, comm, held
        self.before_commit = before_commit
        self.max_failures, self.failures = max_failures, 0
        self.unsent = list[_Unsent]()
        self.storage = checkpoints.storage
        if self.storage.is_remote:  # every machine has a copy
            (self.storage.path / FOLDER).mkdir(parents=True, exist_ok=True)
        if self.storage.is_remote or comm.rank == 0:
            checkpoints.sweep()

    def save(
        self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]
    ) -> str | None:
        """Save a checkpoint and purge older ones; return its path or URL, None if it could not be saved. Collective.

        Args:
            table: this rank's rows and their optimizer state.
            dense: full dense state, the same on every rank; rank 0 writes it.
            manifest: further fields in JSON; "identity" must match at resume, "metric" picks the best.

        Raises:
            StorageError: the last `max_failures` attempts all failed. LockedError: another run has taken over.
        """
        try:
            staged = self._stage(step, table, dense, manifest)
            if not self.storage.is_remote:
                self._publish_or_drop(staged)
        except StorageError as error:
            self.failures += 1
            if self.failures >= self.max_failures:
                raise
            log.warning(
                "training continues without this checkpoint (%d of %d failures): %s",
                self.failures,
                self.max_failures,
                error,
            )
            return None
        self.failures = 0
        if self.storage.is_remote:
            self.unsent.append(staged)
            self._send()
        else:
            self._purge()
        return f"{self.storage.place}/{FOLDER}/{staged.folder.name}"

    def flush(self) -> None:
        """Send what the store did not take before; nothing for a folder. Collective.

        Raises:
            StorageError: the store still does not take it; with the folder that has all of it.
        """
        for pause in saved_checkpoints.RETRY_S:
            time.sleep(pause if self.unsent else 0)
            if self._send():
                return
        raise StorageError(
            f"{self.storage.place}: does not take checkpoint {self.unsent[-1].folder.name}; it is in "
            f"{self.storage.path / UNSENT}; run the same command on this machine when the storage answers to send it"
        )

    def _stage(
        self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]
    ) -> _Unsent:
        """Write this rank's files, and on rank 0 the manifest, to `unsent`.

        Raises:
            StorageError: on every rank, if a disk could not take it.
        """
        lease = {} if self.held is None else {"lease": self.held.number}
        suffix = "" if self.held is None else f"-{self.held.number}-{uuid.uuid4().hex[:8]}"
        folder = self.storage.path / UNSENT / self.comm.broadcast(f"{step_name(step)}{suffix}")
        error: StorageError | None = None
        entries: dict[str, Any] = {}
        try:
            entries = write_parts(folder, table, dense if self.comm.rank == 0 else {}, self.comm.rank)
        except (OSError, SafetensorError) as cause:
            error = StorageError(f"{folder}: checkpoint of step {step} could not be written: {cause}")
        # StorageError alone is caught: a lost peer must not pass for a full disk, which training survives.
        try:
            self.comm.raise_together(error)
            files = {name: entry for part in self.comm.gather(entries) for name, entry in part.items()}
            content = {**describe(step, table), "files": files, **lease, **manifest}
            try:
                # Ranks on machines of their own each need a manifest, to send their files at the next start.
                if self.comm.rank == 0 or self.storage.is_remote:
                    write_json(folder / MANIFEST, content)
                if (
                    self.comm.rank == 0
                    and not self.storage.is_remote
                    and (self.checkpoints.path / folder.name).exists()
                ):
                    # A damaged one of this step, because training would have resumed after a whole one.
                    self.checkpoints.set_aside(folder.name)
            except (OSError, StorageError) as cause:
                error = StorageError(f"{folder}: checkpoint of step {step} could not be written: {cause}")
            self.comm.raise_together(error)
        except StorageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _Unsent(folder, list(entries), content)

    def _publish_or_drop(self, staged: _Unsent) -> None:
        """Put a checkpoint of a folder in place; what a failure leaves of it is removed."""
        try:
            self._publish(staged)
        except StorageError:
            if self.comm.rank == 0:
                self.storage.remove(f"{FOLDER}/{staged.folder.name}")
                shutil.rmtree(staged.folder, ignore_errors=True)
            raise
        if self.comm.rank == 0:
            self.checkpoints.settle(staged.folder)

    def _publish(self, staged: _Unsent) -> None:
        error: MocmeError | None = None
        try:
            self.checkpoints.put_files(staged.folder, staged.mine)
        except StorageError as cause:
            error = cause
        self.comm.raise_together(error)
        if self.comm.rank == 0:
            try:
                if self.before_commit is not None:
                    self.before_commit()
                self.checkpoints.commit(staged.folder, self.held)
            except (StorageError, LockedError) as cause:
                error = cause
        self.comm.raise_together(error)

    def _send(self) -> bool:
        """Send what waits, newest first, and purge; return False on every rank if the store does not take it."""
        sent = False
        while self.unsent:
            try:
                self._publish(self.unsent[-1])
            except StorageError as error:
                # StorageError alone: a lost peer must not pass for a store that does not answer.
                if self.comm.rank == 0:
                    log.warning(
                        "checkpoint %s is saved here and not sent yet; it is tried again with the next one: %s",
                        self.unsent[-1].folder.name,
                        error,
                    )
                self._forget_old()
                return False
            self.checkpoints.settle(self.unsent.pop().folder)
            sent = True
        if sent:
            self._purge()
        return True

    def _forget_old(self) -> None:
        """Keep the newest and the best of the checkpoints that wait to be sent, and delete the others."""
        kept = worth_keeping([Saved(each.folder, each.manifest) for each in reversed(self.unsent)], self.keep)
        folders = {saved.path for saved in kept}
        for each in [each for each in self.unsent if each.folder not in folders]:
            self.unsent.remove(each)
            shutil.rmtree(each.folder, ignore_errors=True)

    def _purge(self) -> None:
        """Purge older checkpoints, now that every rank knows that the new one exists; and their copies on this
        machine."""
        kept: list[str] | None = None
        if self.comm.rank == 0:
            try:
                kept = self.checkpoints.purge(self.keep, {each.folder.name for each in self.unsent}, self.held)
            except (OSError, StorageError, CheckpointError) as error:
                log.warning("older checkpoints could not be removed: %s", error)
        if not self.storage.is_remote:
            return
        kept = self.comm.broadcast(kept)
        if kept is not None:
            for path in self.checkpoints.path.glob("step_*"):
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)
