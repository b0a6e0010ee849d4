"""Checkpoints of a run at a URL: written here, sent there, and never overwritten or lost by another machine.

What is at the URL is the truth. A checkpoint has a name of its own, `checkpoints/step_0000000100-12-1f0c9a2b`: step, number
of the lease, eight random digits; so no two writers, not even two attempts at one step, ever write the same object. Every
rank sends its own files, all agree, and rank 0 sends the manifest last, between two looks at the lease. A checkpoint counts
when its manifest is there, its files have the sizes that the manifest says, and the lease on top made or inherited it.

What could not be sent stays in `unsent/` on the machines that wrote it and goes with the next checkpoint. Who only
reads (evaluation, export) fetches what it needs, deletes nothing and sends nothing.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from mocme_dist.data.files import read_json, sha256_file, write_json
from mocme_dist.data.storage import Mirror
from mocme_dist.errors import CheckpointError, DataError, LockedError, MocmeError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.training.checkpoint import MANIFEST, Saved, Saver, best_of, describe, step_name, write_parts
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.lease import Held, Lease, counts, newest

log = logging.getLogger(__name__)

FOLDER, UNSENT = "checkpoints", "unsent"
# Waits between attempts to send, at the end of a run, what a store did not take before.
RETRY_S = (0.0, 3.0, 15.0)
_NAME = re.compile(r"step_\d{10}(?:-(\d+)-[0-9a-f]{8})?")

Value = TypeVar("Value")


def shown(mirror: Mirror) -> list[Saved]:
    """The checkpoints of a run that count, newest first; their tensors need not be here.

    Raises:
        StorageError: the storage does not answer.
    """
    number, owner = newest(mirror)
    there = mirror.listing(f"{FOLDER}/step_*")
    found = []
    for name in {path.split("/")[1] for path in there}:
        match = _NAME.fullmatch(name)
        manifest = f"{FOLDER}/{name}/{MANIFEST}"
        if match is None or manifest not in there:
            continue  # on its way, or left by a run that was killed
        made_by = int(match[1] or 0)  # one without a number is of a run directory that was copied there
        if not counts(number, owner, made_by, name):
            continue
        try:
            saved = Saved(mirror.path / FOLDER / name, read_json(mirror.bring(manifest, _size(there[manifest]))))
            wrong = [
                file for file, entry in saved.manifest["files"].items() if _size(there.get(f"{FOLDER}/{name}/{file}")) != entry["bytes"]
            ]
            if wrong:
                raise CheckpointError(f"{wrong[0]} is missing or cut")
            found.append(((saved.step, made_by, name), saved))
        except (CheckpointError, DataError, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s/%s/%s is left out: %s", mirror.url, FOLDER, name, error)
    return [saved for _, saved in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _size(version: str | None) -> int:
    return -1 if version is None else int(version.split()[0])


def choose(mirror: Mirror, resume: str, best: bool = False) -> list[Saved]:
    """Checkpoints to try, in this order; see `checkpoint.find`.

    Raises:
        CheckpointError: there is none of the named step.
    """
    if resume == "none":
        return []
    found = shown(mirror)
    if resume != "auto":
        named = [saved for saved in found if saved.step == int(resume)]
        if not named:
            raise CheckpointError(f"{mirror.url}: no checkpoint of step {resume}; it has {', '.join(str(s.step) for s in found) or 'none'}")
        return named
    return sorted(found, key=best_of, reverse=True) if best else found


def bring(mirror: Mirror, saved: Saved, first: int, last: int) -> None:
    """Fetch the files of a checkpoint that rows [first, last) need, and hold them against their hashes.

    Raises:
        CheckpointError: one is not what the manifest says. StorageError: see `Mirror.bring`.
    """
    for name, entry in saved.manifest["files"].items():
        if "first" in entry and (entry["last"] <= first or entry["first"] >= last):
            continue
        path = mirror.bring(f"{FOLDER}/{saved.path.name}/{name}", entry["bytes"])
        if sha256_file(path) != entry["sha256"]:
            path.unlink(missing_ok=True)
            path = mirror.bring(f"{FOLDER}/{saved.path.name}/{name}", entry["bytes"])
            if sha256_file(path) != entry["sha256"]:
                path.unlink(missing_ok=True)
                raise CheckpointError(f"{saved.path.name}: {name}: sha256 differs from the manifest's")


class _Alone:
    """A process without others, for who reads a checkpoint by itself."""

    rank = 0

    def gather(self, value: Value) -> list[Value]:
        return [value]

    broadcast = staticmethod(lambda value: value)

    def raise_together(self, error: BaseException | None) -> None:
        if error is not None:
            raise error


def agree(mirror: Mirror, resume: str, rows: tuple[int, int], comm: Comm | None = None, best: bool = False) -> Saved | None:
    """The checkpoint to load, with what this rank needs of it on this machine; collective.

    Args:
        rows: first and last of this rank.
        comm: None: no other ranks.

    Raises:
        CheckpointError: none is whole, or not the named one. StorageError: the storage does not answer.
    """
    group: Any = comm or _Alone()
    found, error = list[Saved](), None
    if group.rank == 0:
        try:
            found = choose(mirror, resume, best)
        except MocmeError as cause:
            error = cause
    group.raise_together(error)
    for name, manifest in group.broadcast([(saved.path.name, saved.manifest) for saved in found]):
        saved, wrong, failed = Saved(mirror.path / FOLDER / name, manifest), None, None
        try:
            bring(mirror, saved, *rows)
        except CheckpointError as cause:
            wrong = str(cause)
        except StorageError as cause:
            failed = cause
        group.raise_together(failed)
        reasons = [text for text in group.gather(wrong) if text]
        if not reasons:
            return saved
        if group.rank == 0:
            log.warning("checkpoint %s is left out: %s", name, reasons[0])
        found = [saved]
    if group.broadcast(bool(found)):
        raise CheckpointError(f"{mirror.url}: no valid checkpoint; delete them to start anew, or pass --resume none")
    return None


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
        Whether something was sent.

    Raises:
        LockedError, StorageError: the lease is lost, the storage does not answer.
    """
    sent = False
    _sweep(mirror)
    for folder in sorted((mirror.path / UNSENT).glob("step_*")):
        manifest = read_json(folder / MANIFEST)
        missing = [name for name in manifest["files"] if not (folder / name).is_file()]
        if manifest.get("lease") != lease.before or missing:
            why = f"{missing[0]} lies on another machine" if missing else "another run has gone on from an earlier one meanwhile"
            log.warning("%s was never sent and stays here: %s", folder, why)
            continue
        log.warning("%s was not sent by the run that wrote it; sending it now", folder.name)
        _send_parts(mirror, folder, list(manifest["files"]))
        before_commit()
        _commit(mirror, lease.held, folder)
        _settle(mirror, folder)
        sent = True
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
        if _size(there.get(f"{FOLDER}/{folder.name}/{name}")) != entry["bytes"]:
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
        for pause in RETRY_S:
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
        best = max(self.unsent, key=lambda each: best_of(Saved(each.folder, each.manifest)))
        for each in self.unsent[: -self.keep]:
            if each is not best:
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
        kept = {saved.path.name for saved in whole[: self.keep]}
        scored = [saved for saved in whole if saved.manifest.get("metric") is not None]
        if scored:
            kept.add(max(scored, key=best_of).path.name)
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
        match = _NAME.fullmatch(name)
        return match is not None and int(match[1] or 0) <= self.held.number
