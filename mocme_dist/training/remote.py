"""Checkpoints of a run at a URL, read: which of them count, and what a rank fetches of one.

A checkpoint has a name of its own, `checkpoints/step_0000000100-12-1f0c9a2b`: step, number of the lease, eight random
digits. It counts when its manifest is there, its files have the sizes that the manifest says, and the lease on top made or
inherited it. Who reads (evaluation, export, a run that resumes) deletes nothing there and sends nothing.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, TypeVar

from mocme_dist.data.files import read_json, sha256_file
from mocme_dist.data.storage import Mirror
from mocme_dist.errors import CheckpointError, DataError, MocmeError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.training.checkpoint import MANIFEST, Saved, best_of
from mocme_dist.training.lease import counts, newest

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
NAME = re.compile(r"step_\d{10}(?:-(\d+)-[0-9a-f]{8})?")

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
        match = NAME.fullmatch(name)
        manifest = f"{FOLDER}/{name}/{MANIFEST}"
        if match is None or manifest not in there:
            continue  # on its way, or left by a run that was killed
        made_by = int(match[1] or 0)  # one without a number is of a run directory that was copied there
        if not counts(number, owner, made_by, name):
            continue
        try:
            path = _bring_or_miss(mirror, manifest, size_of(there[manifest]))
            if path is None:
                continue
            saved = Saved(path.parent, read_json(path))
            wrong = [
                file for file, entry in saved.manifest["files"].items() if size_of(there.get(f"{FOLDER}/{name}/{file}")) != entry["bytes"]
            ]
            if wrong:
                raise CheckpointError(f"{wrong[0]} is missing or cut")
            found.append(((saved.step, made_by, name), saved))
        except (CheckpointError, DataError, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s/%s/%s is left out: %s", mirror.url, FOLDER, name, error)
    return [saved for _, saved in sorted(found, key=lambda pair: pair[0], reverse=True)]


def size_of(version: str | None) -> int:
    """Bytes in an entry of a listing; -1 where there is none."""
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
        full = f"{FOLDER}/{saved.path.name}/{name}"
        for _ in range(2):  # the first may be a copy that went bad here
            path = _bring_or_miss(mirror, full, entry["bytes"])
            if path is None:
                raise CheckpointError(f"{saved.path.name}: {name} is not there any more")
            if sha256_file(path) == entry["sha256"]:
                break
            path.unlink(missing_ok=True)
        else:
            raise CheckpointError(f"{saved.path.name}: {name}: sha256 differs from the manifest's")


def _bring_or_miss(mirror: Mirror, name: str, size: int) -> Path | None:
    """See `Mirror.bring`; None when it has been removed since it was listed."""
    try:
        return mirror.bring(name, size)
    except StorageError:
        if mirror.listing(name):
            raise
        return None


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
    reasons: dict[str, str] = {}
    while True:
        # Asked anew after each that fails: a run that goes on meanwhile may have removed it, and have a newer one.
        found, error = None, None
        if group.rank == 0:
            try:
                found = next(((s.path.name, s.manifest) for s in choose(mirror, resume, best) if s.path.name not in reasons), None)
            except MocmeError as cause:
                error = cause
        group.raise_together(error)
        found = group.broadcast(found)
        if found is None and reasons:
            raise CheckpointError(
                f"{mirror.url}: no valid checkpoint: {'; '.join(reasons.values())}; delete them to start anew, or pass --resume none"
            )
        if found is None:
            return None
        saved, wrong, failed = Saved(mirror.path / FOLDER / found[0], found[1]), None, None
        try:
            bring(mirror, saved, *rows)
        except CheckpointError as cause:
            wrong = str(cause)
        except StorageError as cause:
            failed = cause
        group.raise_together(failed)
        texts = [text for text in group.gather(wrong) if text]
        if not texts:
            return saved
        reasons[saved.path.name] = texts[0]
        if group.rank == 0:
            log.warning("checkpoint %s is left out: %s", saved.path.name, texts[0])
