"""Checkpoints without a topology: row ranges and full dense state, safetensors and JSON, no pickle.

All ranks write into one temporary directory; rank 0 then writes the manifest with every file's size and hash, syncs,
and renames. A checkpoint therefore exists as a whole or not at all, and any number of ranks at any ZeRO stage reads
what any other wrote. Loading verifies first and falls back to the next older one, saying why.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mocme_dist.data.files import read_json, sha256_file, sync, write_json
from mocme_dist.errors import CheckpointError, DataError, StorageError
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.training.engine_rows import EngineRows

log = logging.getLogger(__name__)

MANIFEST, DENSE = "MANIFEST.json", "dense.safetensors"
SUPERSEDED = "superseded"
_TEMPORARY = ".tmp-"
# Rows read at a time: 64 MiB of D 256 beside the table.
_LOADED_ROWS = 1 << 16


@dataclass(frozen=True)
class Saved:
    """A checkpoint that verified: where it is and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.manifest["step"])


def step_name(step: int) -> str:
    """Directory of the checkpoint of `step`; names sort as steps do."""
    return f"step_{step:010d}"


def save(
    directory: Path,
    step: int,
    table: EntityTable | EngineRows,
    dense: Mapping[str, Tensor],
    manifest: dict[str, Any],
    comm: Comm,
    keep: int,
) -> Path:
    """Write, commit and then purge; collective.

    Args:
        directory: the run's checkpoints directory.
        table: this rank's rows and their optimizer state.
        dense: full dense state, the same on every rank; rank 0 writes it.
        manifest: JSON fields to keep beside the files; "identity" must match at resume, "metric" picks the best.
        keep: newest checkpoints that stay, besides the one with the best metric.

    Raises:
        StorageError: on every rank, when any rank could not write; earlier checkpoints are untouched.
    """
    temporary = directory / comm.broadcast(f"{_TEMPORARY}{step}-{uuid.uuid4().hex[:8]}")
    error: StorageError | None = None
    entries: dict[str, Any] = {}
    try:
        entries = write_parts(temporary, table, dense if comm.rank == 0 else {}, comm.rank)
    except (OSError, SafetensorError) as cause:
        error = StorageError(f"{directory}: checkpoint of step {step} could not be written: {cause}")
    # StorageError alone: a lost peer must not pass for a full disk, which training survives.
    try:
        comm.raise_together(error)
        gathered = comm.gather(entries)
        if comm.rank == 0:
            files = {name: entry for part in gathered for name, entry in part.items()}
            try:
                _commit(temporary, {**describe(step, table), "files": files, **manifest})
            except (OSError, StorageError) as cause:
                error = StorageError(f"{directory}: checkpoint of step {step} could not be committed: {cause}")
        comm.raise_together(error)
    except StorageError:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Only now, when every rank knows that the new one exists, may older ones go.
    if comm.rank == 0:
        try:
            _purge(directory, keep)
        except OSError as cause:
            log.warning("older checkpoints could not be removed: %s", cause)
    return directory / step_name(step)


def describe(step: int, table: EntityTable | EngineRows) -> dict[str, Any]:
    """Of which table and by which libraries. No state of random numbers: every draw is a function of seed, step and rank."""
    versions = {}
    for name in ("mocme-dist", "torch", "deepspeed", "safetensors"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "format": 1,
        "step": step,
        "num_rows": table.partition.num_rows,
        "width": table.width,
        "dtype": str(table.rows_rD.dtype).removeprefix("torch."),
        "optimizer": table.optimizer,
        "table_updates": table.num_updates,
        "versions": versions,
    }


def _commit(temporary: Path, manifest: dict[str, Any]) -> None:
    """Manifest, sync, rename: from here on the checkpoint exists."""
    directory, final = temporary.parent, temporary.parent / step_name(manifest["step"])
    for name, entry in manifest["files"].items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise StorageError(f"{name} is not visible to rank 0: run.dir must be on storage that all nodes see")
    write_json(temporary / MANIFEST, manifest)
    sync(temporary)
    # A torn one of the same step makes way for the whole one, and is deleted only afterwards.
    aside = directory / f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}"
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync(directory)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill leaves something to sweep and not half a checkpoint."""
    doomed = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Clear what a killed run left half-written or half-deleted."""
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        log.warning("%s was left half-written or half-deleted by a run that was killed; removed", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def write_parts(temporary: Path, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    """One rank's files of a checkpoint: its rows, and the dense state where it is given; their manifest entries by name."""
    temporary.mkdir(parents=True, exist_ok=True)
    rows = {"rows": table.rows_rD, **table.state}
    needed = sum(value.numel() * value.element_size() for value in (*rows.values(), *dense.values()))
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise OSError(f"needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free at {temporary.parent}")
    name = f"rows-{rank:05d}.safetensors"
    entries = {name: {**_write(temporary / name, rows), "first": table.first, "last": table.last}}
    if dense:
        entries[DENSE] = _write(temporary / DENSE, dense)
    return entries


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify(path: Path, hashes: bool = True) -> Saved:
    """The checkpoint at `path`; without `hashes` only that its files are there in their sizes.

    Raises:
        CheckpointError: what is wrong with which file: missing, size, hash, or no manifest.
    """
    try:
        manifest = read_json(path / MANIFEST)
        files = manifest["files"]
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{path.name}: {name} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{path.name}: {name} has size {file.stat().st_size}, manifest says {entry['bytes']}")
            if hashes and sha256_file(file) != entry["sha256"]:
                raise CheckpointError(f"{path.name}: {name}: sha256 differs from the manifest's")
        int(manifest["step"])
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: {MANIFEST} is missing or torn: {error}") from None
    return Saved(path, manifest)


def _candidates(directory: Path) -> list[Path]:
    return sorted((path for path in directory.glob("step_*") if path.is_dir()), reverse=True) if directory.is_dir() else []


def _purge(directory: Path, keep: int) -> None:
    """Keep the `keep` newest whole checkpoints and the best one."""
    sweep(directory)
    whole = []
    for path in _candidates(directory):
        try:
            whole.append(verify(path, hashes=False))
        except CheckpointError:
            continue  # torn: kept for the user to look at, and not counted
    kept = worth_keeping(whole, keep)
    for saved in whole:
        if saved not in kept:
            _remove(saved.path)


def rewind(directory: Path, resume: str) -> None:
    """Make the checkpoint that `resume` names ("none" or a step) the newest: newer ones move to `superseded`.

    Left in place they would be newest and best for a run that no longer descends from them.

    Raises:
        CheckpointError: the named step does not verify; nothing is moved.
    """
    start = find(directory, resume)
    newer = [path for path in _candidates(directory) if start is None or path.name > start.path.name]
    for path in newer:
        target = directory / SUPERSEDED / path.name
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            _remove(target)
        path.rename(target)
    if newer:
        log.warning("%d checkpoints after the one to go on from moved to %s", len(newer), directory / SUPERSEDED)


def find(directory: Path, resume: str, best: bool = False) -> Saved | None:
    """The checkpoint to load, verified; None when there is none to look at or resume is "none".

    Args:
        resume: "auto" (newest that verifies), "none", or a step as text (that one and no other).
        best: prefer the highest metric over the newest.

    Raises:
        CheckpointError: a named step does not verify, or candidates exist and none does; every reason is listed.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return verify(directory / step_name(int(resume)))
    candidates = _candidates(directory)
    reasons, valid = [], []
    for path in candidates:
        try:
            saved = verify(path)
        except CheckpointError as error:
            log.warning("checkpoint %s is left out: %s", path.name, error)
            reasons.append(str(error))
            continue
        if not best:
            return saved
        valid.append(saved)
    if valid:
        return max(valid, key=best_of)
    if candidates:
        raise CheckpointError(f"{directory}: no valid checkpoint: {'; '.join(reasons)}; delete them to start anew, or pass --resume none")
    return None


def best_of(saved: Saved) -> tuple[bool, float, int]:
    """What the best checkpoint has the most of: a metric, the metric, steps."""
    metric = saved.manifest.get("metric")
    return metric is not None, metric or 0.0, saved.step


def worth_keeping(whole: list[Saved], keep: int) -> list[Saved]:
    """Of whole checkpoints, newest first, the `keep` newest and the best."""
    best = max(whole, key=best_of, default=None)  # without any metric the newest
    return [saved for place, saved in enumerate(whole) if place < keep or saved is best]


def agree(directory: Path, resume: str, comm: Comm, best: bool = False) -> Saved | None:
    """`find` by rank 0, its answer or its error on every rank; collective."""
    found: Saved | None = None
    error: CheckpointError | None = None
    if comm.rank == 0:
        try:
            found = find(directory, resume, best)
        except CheckpointError as cause:
            error = cause
    message = comm.broadcast(None if error is None else str(error))
    if message is not None:
        raise CheckpointError(message)
    return comm.broadcast(found)


def check_identity(saved: Saved, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or data set.

    Raises:
        CheckpointError: every field that differs, with both values.
    """
    theirs = saved.manifest.get("identity", {})
    differing = [(key, str(theirs.get(key, "nothing")), str(value)) for key, value in identity.items() if theirs.get(key) != value]
    if differing:
        rows = [("setting", "checkpoint", "now"), *differing]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = "\n".join(f"  {key:<{widths[0]}}  {then:<{widths[1]}}  {now}" for key, then, now in rows)
        raise CheckpointError(f"{saved.path}: made with other settings; use another run.dir or the settings of then\n{table}")


def load_rows(saved: Saved, table: EntityTable | EngineRows) -> None:
    """Fill this rank's range from whatever parts hold it.

    Raises:
        CheckpointError: the parts do not cover the range.
    """
    with table.filling() as part:
        covered = 0
        for name, entry in saved.manifest["files"].items():
            first, last = entry.get("first"), entry.get("last")
            if first is None:
                continue
            begin, end = max(first, part.first), min(last, part.last)
            if begin >= end:
                continue
            for at in range(begin, end, _LOADED_ROWS):
                to = min(at + _LOADED_ROWS, end)
                # Opened anew for each piece: a slice is a copy, and pages of a mapped file are this process's while it is open.
                with safe_open(saved.path / name, framework="pt") as file:
                    for key, target in (("rows", part.rows_rD), *part.state.items()):
                        target[at - part.first : to - part.first].copy_(file.get_slice(key)[at - first : to - first])
            covered += end - begin
        if covered != part.last - part.first:
            raise CheckpointError(f"{saved.path}: parts cover {covered:,} of rows [{part.first:,}, {part.last:,})")
        part.num_updates = int(saved.manifest["table_updates"])


def read_rows(saved: Saved, first: int, last: int) -> Tensor:
    """(last - first, D) float32 rows of the entities [first, last), whatever parts hold them.

    Raises:
        CheckpointError: the parts do not cover the range.
    """
    pieces, covered = [], first
    parts = [(entry["first"], entry["last"], name) for name, entry in saved.manifest["files"].items() if entry.get("first") is not None]
    for begin, end, name in sorted(parts):
        if begin <= covered < min(end, last):
            with safe_open(saved.path / name, framework="pt") as file:
                pieces.append(file.get_slice("rows")[covered - begin : min(end, last) - begin].float())
            covered = min(end, last)
    if covered != last:
        raise CheckpointError(f"{saved.path}: parts cover rows [{first:,}, {covered:,}) of [{first:,}, {last:,})")
    return torch.cat(pieces)


def load_dense(saved: Saved) -> dict[str, Tensor]:
    """Full dense state by name."""
    with safe_open(saved.path / DENSE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


class Saver:
    """Saves while training; a full disk is survived a few times before the run stops."""

    def __init__(self, directory: Path, keep: int, comm: Comm, max_failures: int = 3) -> None:
        self.directory, self.keep, self.comm, self.max_failures = directory, keep, comm, max_failures
        self.failures = 0
        if comm.rank == 0:
            sweep(directory)

    def save(self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]) -> str | None:
        """Where it is saved, None when it is not; collective.

        Raises:
            StorageError: the last `max_failures` attempts all failed.
        """
        try:
            place = self.write(step, table, dense, manifest)
        except StorageError as error:
            self.failures += 1
            if self.failures >= self.max_failures:
                raise
            log.warning("training goes on without this checkpoint (%d of %d failures): %s", self.failures, self.max_failures, error)
            return None
        self.failures = 0
        return place

    def write(self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]) -> str:
        """One attempt; see `save` of this module."""
        return str(save(self.directory, step, table, dense, manifest, self.comm, self.keep))

    def flush(self) -> None:
        """Finish what is still to be sent: nothing, for a folder."""
