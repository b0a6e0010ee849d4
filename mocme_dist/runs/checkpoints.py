"""Checkpoints of a run in a folder or at a URL: which of them count, how one is found, saved, set aside and purged.

A checkpoint is a folder `checkpoints/NAME` whose manifest was written last, so a killed save never leaves half a
checkpoint that counts. Each rank first writes its files to `unsent/NAME` on its machine, then puts them in place: in a
folder by renaming them, at a URL by uploading them. When all ranks have done so, rank 0 verifies that every file has
arrived and puts the manifest.

In a folder, NAME is the step, and the run's lock keeps other writers out. At a URL, NAME also has the number of the
lease and eight random digits, so no two writers, not even two attempts at one step, write the same object; a checkpoint
counts if the current lease made or inherited it. What a store does not take stays in `unsent/` on the machines that
wrote it. It is sent with the next checkpoint or at the end, or first of all when the same command is started again on
that machine.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mocme_dist.data.files import TEMPORARY, read_json
from mocme_dist.data.remote_storage import RemoteStorage, open_storage
from mocme_dist.data.storage import LocalStorage, size_of
from mocme_dist.errors import CheckpointError, MocmeError, StorageError
from mocme_dist.parallel.comm import Comm, single
from mocme_dist.runs.lease import Held, Lease, counts, newest
from mocme_dist.training.checkpoint import (
    DENSE,
    MANIFEST,
    NAME,
    Saved,
    best_of,
    check_hash,
    needed_files,
    read_manifest,
    step_name,
    worth_keeping,
)

log = logging.getLogger(__name__)

FOLDER, UNSENT, SUPERSEDED = "checkpoints", "unsent", "superseded"
# Waits before attempts to send, at the end of a run, what a store did not take before (seconds).
RETRY_S = (0.0, 3.0, 15.0)
_ALL_ROWS = (0, 1 << 62)


class Checkpoints:
    """The checkpoints of one run. Readers (evaluation, export, a run that resumes) delete and send nothing."""

    def __init__(self, place: str | Path | LocalStorage | RemoteStorage) -> None:
        self.storage = open_storage(place) if isinstance(place, str | Path) else place
        self.path = self.storage.path / FOLDER

    def whole(self) -> tuple[list[Saved], dict[str, str]]:
        """Return the complete checkpoints that count, newest first, and the reasons why others are left out.

        Their tensors may not be on this machine yet, and are not verified by hash; see `find`.

        Raises:
            StorageError: the storage does not answer.
        """
        remote = self.storage.is_remote
        number, owner = newest(self.storage) if isinstance(self.storage, RemoteStorage) else (0, {})
        there = self.storage.list(f"{FOLDER}/step_*")
        found, left_out = [], {}
        for name in sorted({path.split("/")[1] for path in there}, reverse=True):
            match = NAME.fullmatch(name)
            # A name without a lease number at a URL is of a run directory that was copied there.
            made_by = int(match["lease"] or 0) if match else 0
            if match is None or (remote and not counts(number, owner, made_by, name)):
                continue
            if f"{FOLDER}/{name}/{MANIFEST}" not in there and (remote or (self.storage.path / UNSENT / name).is_dir()):
                continue  # being written, or left by a killed run
            try:
                saved = self._read(name, there)
            except CheckpointError as error:
                left_out[name] = str(error)
                continue
            if saved is not None:
                found.append(((saved.step, made_by, name), saved))
        return [saved for _, saved in sorted(found, key=lambda pair: pair[0], reverse=True)], left_out

    def _read(self, name: str, there: Mapping[str, str]) -> Saved | None:
        """Return a checkpoint with its manifest and file sizes checked; None if it was removed since it was listed."""
        manifest = f"{FOLDER}/{name}/{MANIFEST}"
        if manifest in there and self._fetch(manifest, size_of(there[manifest])) is None:
            return None
        saved = read_manifest(self.path / name)
        for file, entry in saved.manifest["files"].items():
            size = size_of(there.get(f"{FOLDER}/{name}/{file}"))
            if size < 0:
                raise CheckpointError(f"{name}: {file} is missing")
            if size != entry["bytes"]:
                raise CheckpointError(f"{name}: {file} has size {size}, manifest says {entry['bytes']}")
        return saved

    def _fetch(self, name: str, size: int) -> Path | None:
        """Fetch a file; return None if it was removed since it was listed."""
        try:
            return self.storage.fetch(name, size)
        except StorageError:
            if self.storage.list(name):
                raise
            return None

    def candidates(self, resume: str, best: bool = False) -> tuple[list[Saved], dict[str, str]]:
        """Return the checkpoints to try, in this order, and why others are left out; see `find`.

        Raises:
            CheckpointError: there is none of the named step.
        """
        if resume == "none":
            return [], {}
        found, left_out = self.whole()
        if resume == "auto":
            return sorted(found, key=best_of, reverse=True) if best else found, left_out
        named = [saved for saved in found if saved.step == int(resume)]
        if not named:
            reasons = [text for name, text in left_out.items() if name.startswith(step_name(int(resume)))]
            steps = ", ".join(str(saved.step) for saved in found) or "none"
            raise CheckpointError(
                "; ".join(reasons) or f"{self.storage.place}: no checkpoint of step {resume}; it has {steps}"
            )
        return named, {}

    def find(
        self,
        resume: str = "auto",
        best: bool = False,
        rows: tuple[int, int] = _ALL_ROWS,
        comm: Comm | None = None,
    ) -> Saved | None:
        """Return the checkpoint to load, with the files this rank needs on this machine and verified; collective.

        Args:
            resume: "auto" (the newest that verifies), "none", or a step as text (that one and no other).
            best: prefer the highest metric over the newest.
            rows: first and last row of this rank.
            comm: the ranks that load it together; None for a single process.

        Returns:
            The same checkpoint on every rank; None if there are no checkpoints or `resume` is "none".

        Raises:
            CheckpointError: the named step does not verify, or checkpoints exist and none verifies; with every reason.
            StorageError: the storage does not answer.
        """
        comm = comm or single()
        failed: dict[str, str] = {}
        while True:
            # Listed again after each failure: a run that continues meanwhile may have removed it and have a newer one.
            found: tuple[str, dict[str, Any]] | None = None
            reasons: list[str] = []
            refused: MocmeError | None = None
            try:
                if comm.rank == 0:
                    found, reasons = self._next(resume, best, failed)
            except MocmeError as cause:
                refused = cause
            comm.raise_together(refused)
            found, reasons = comm.broadcast((found, reasons))
            if found is None and reasons:
                raise CheckpointError(
                    f"{self.storage.place}: no valid checkpoint: {'; '.join(reasons)}; "
                    "delete them to start anew, or pass --resume none"
                )
            if found is None:
                return None
            saved = Saved(self.path / found[0], found[1])
            wrong, error = None, None
            try:
                self._verify(saved, *rows)
            except CheckpointError as cause:
                wrong = str(cause)
            except StorageError as cause:
                error = cause
            comm.raise_together(error)
            texts = [text for text in comm.gather(wrong) if text]
            if not texts:
                return saved
            failed[saved.path.name] = texts[0]
            if comm.rank == 0:
                _log_left_out({saved.path.name: texts[0]})

    def _next(
        self, resume: str, best: bool, failed: Mapping[str, str]
    ) -> tuple[tuple[str, dict[str, Any]] | None, list[str]]:
        """Return name and manifest of the next checkpoint to try, and all reasons so far."""
        found, left_out = self.candidates(resume, best)
        if not failed:
            _log_left_out(left_out)
        chosen = next(((saved.path.name, saved.manifest) for saved in found if saved.path.name not in failed), None)
        reasons = [text for _, text in sorted({**left_out, **failed}.items(), reverse=True)]
        return chosen, reasons

    def _verify(self, saved: Saved, first: int, last: int) -> None:
        """Fetch the files that rows [first, last) need and compare them with their hashes.

        Raises:
            CheckpointError: a file differs from the manifest. StorageError: the storage does not answer.
        """
        for name, entry in needed_files(saved, first, last).items():
            full = f"{FOLDER}/{saved.path.name}/{name}"
            if self._fetch(full, entry["bytes"]) is None:
                raise CheckpointError(f"{saved.path.name}: {name} no longer exists")
            try:
                check_hash(saved.path / name, entry)
            except CheckpointError:
                if not self.storage.is_remote:
                    raise
                (saved.path / name).unlink(missing_ok=True)  # the local copy may be damaged: fetch it once more
                if self._fetch(full, entry["bytes"]) is None:
                    raise
                check_hash(saved.path / name, entry)

    def last(self) -> str:
        """Return the path or URL of the newest checkpoint, unverified: the ranks verify when they load."""
        try:
            names = sorted(name.split("/")[1] for name in self.storage.list(f"{FOLDER}/step_*/{MANIFEST}"))
        except StorageError:
            return f"unknown, {self.storage.place} does not answer"
        return f"{self.storage.place}/{FOLDER}/{names[-1]}" if names else "none yet"

    def rewind(self, resume: str, lease: Lease | None = None) -> None:
        """Make the checkpoint that `resume` names ("none" or a step) the newest; later ones are kept and do not count.

        In a folder they move to `superseded`; at a URL the lease does not inherit them. If they counted, they would be
        the newest and the best of a run that does not descend from them.

        Raises:
            CheckpointError: the named step does not verify; nothing is changed.
        """
        if lease is not None:
            start = self.candidates(resume)[0][:1]
            kept = [saved.path.name for saved in self.whole()[0] if start and saved.step <= start[0].step]
            lease.inherit(kept)
            return
        found = self.find(resume)
        newer = [path for path in self.path.glob("step_*") if found is None or path.name > found.path.name]
        for path in newer:
            self.set_aside(path.name)
        if newer:
            log.warning("%d checkpoints after step %s moved to %s", len(newer), resume, self.path / SUPERSEDED)

    def set_aside(self, name: str) -> None:
        """Move a checkpoint of a folder to `superseded`; an earlier one of this name there is deleted."""
        target = self.path / SUPERSEDED / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.storage.remove(f"{FOLDER}/{SUPERSEDED}/{name}")
        (self.path / name).rename(target)

    def inherit(self, lease: Lease, before_commit: Callable[[], None]) -> bool:
        """Send what this machine still has of the run at a URL, and write down which checkpoints the run descends from.

        Args:
            lease: new; nothing has been committed under it.
            before_commit: see `Saver`.

        Returns:
            Whether files that rank 0 wrote on this machine were sent.

        Raises:
            StorageError: the lease is lost, or the storage does not answer.
        """
        sent = False
        self.sweep()
        for folder in sorted((self.storage.path / UNSENT).glob("step_*")):
            try:
                manifest = read_manifest(folder).manifest
            except CheckpointError as error:
                log.warning("%s was never sent and stays here: %s", folder, error)
                continue
            there = self.storage.list(f"{FOLDER}/{folder.name}/*")
            waiting = [
                name
                for name, entry in manifest["files"].items()
                if size_of(there.get(f"{FOLDER}/{folder.name}/{name}")) != entry["bytes"]
            ]
            missing = [name for name in waiting if not (folder / name).is_file()]
            if missing or manifest.get("lease") != lease.before:
                why = "another run has continued from an earlier one meanwhile"
                if missing:
                    why = f"{missing[0]} is on another machine"
                log.warning("%s was never sent and stays here: %s", folder, why)
                continue
            log.warning("%s was not sent by the run that wrote it; sending it now", folder.name)
            self.put_files(folder, waiting)
            if (folder / DENSE).is_file():  # rank 0 ran on this machine, so its curve is here, too
                before_commit()
                sent = True
            self.commit(folder, lease.held)
            self.settle(folder)
        found, left_out = self.whole()
        _log_left_out(left_out)
        lease.inherit([saved.path.name for saved in found])
        return sent

    def sweep(self) -> None:
        """Remove what a killed run left half-written or half-deleted; what a URL still has to be sent stays."""
        leftovers = [*self.path.glob(f"{TEMPORARY}*"), *(self.path / SUPERSEDED).glob(f"{TEMPORARY}*")]
        for folder in (self.storage.path / UNSENT).glob("*"):
            if not self.storage.is_remote and not (self.path / folder.name / MANIFEST).is_file():
                self.storage.remove(f"{FOLDER}/{folder.name}")  # some of its files were in place, its manifest was not
            if not self.storage.is_remote or not (folder / MANIFEST).is_file():
                leftovers.append(folder)
        for leftover in leftovers:
            log.warning("%s was left half-written or half-deleted by a run that was killed; removed", leftover)
            shutil.rmtree(leftover, ignore_errors=True)

    def put_files(self, folder: Path, names: list[str]) -> None:
        """Put staged files of a checkpoint in place."""
        for name in names:
            self.storage.put(f"{FOLDER}/{folder.name}/{name}", folder / name)

    def commit(self, folder: Path, held: Held | None) -> None:
        """Put the manifest of a staged checkpoint, if all its files have arrived and the lease holds before and after.

        Raises:
            StorageError: a file has not arrived, or the storage does not take the manifest. LockedError: see `Held`.
        """
        there = self.storage.list(f"{FOLDER}/{folder.name}/*")
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            if size_of(there.get(f"{FOLDER}/{folder.name}/{name}")) == entry["bytes"]:
                continue
            if self.storage.is_remote:
                raise StorageError(f"{self.storage.place}: {FOLDER}/{folder.name}/{name} has not arrived in its size")
            raise StorageError(f"{name} is not visible to rank 0: run.dir must be on storage that all nodes see")
        if held is not None:
            held.check(self.storage)
        self.storage.put(f"{FOLDER}/{folder.name}/{MANIFEST}", folder / MANIFEST)
        if held is not None:
            held.check(self.storage)

    def settle(self, folder: Path) -> None:
        """Keep staged files that were uploaded as if they had been fetched; one of the ranks of a machine does it."""
        self.path.mkdir(exist_ok=True)
        try:
            folder.rename(self.path / folder.name)
        except OSError:  # in a folder all files were moved; at a URL another rank or a reader was first
            shutil.rmtree(folder, ignore_errors=True)

    def purge(self, keep: int, waiting: set[str], held: Held | None) -> list[str]:
        """Delete all checkpoints but the `keep` newest and the best one, and return the names of those.

        Damaged ones in a folder are not counted, and stay for the user to look at.

        Args:
            waiting: names of staged checkpoints that are still to be sent.

        Raises:
            StorageError, LockedError: the storage does not answer, or the lease is lost.
        """
        whole, _ = self.whole()
        kept = {saved.path.name for saved in worth_keeping(whole, keep)}
        doomed = [saved.path.name for saved in whole if saved.path.name not in kept]
        if held is None:
            for name in doomed:
                self.storage.remove(f"{FOLDER}/{name}")
            return sorted(kept)
        there = self.storage.list(f"{FOLDER}/step_*")
        for name in {path.split("/")[1] for path in there} - waiting:
            # Without a manifest: half-sent under an earlier lease, or by a killed attempt under this one.
            match = NAME.fullmatch(name)
            if f"{FOLDER}/{name}/{MANIFEST}" not in there and match and int(match["lease"] or 0) <= held.number:
                doomed.append(name)
        held.check(self.storage)
        for name in doomed:
            self.storage.remove(f"{FOLDER}/{name}/{MANIFEST}")  # first: the rest without it is no checkpoint
            self.storage.remove(f"{FOLDER}/{name}")
        return sorted(kept)


def _log_left_out(reasons: Mapping[str, str]) -> None:
    for name, text in reasons.items():
        log.warning("checkpoint %s is left out: %s", name, text)
