"""Format of a checkpoint: row ranges and the full dense state in safetensors files, and a manifest in JSON; no pickle.

A checkpoint does not depend on the number of ranks: any number of ranks at any ZeRO stage reads what any other wrote.
Each rank writes the rows it holds, rank 0 also writes the dense state. The manifest lists every file with its size and
hash, and is written last: a folder without it is no checkpoint. Where checkpoints are kept, and which of them count, is
left to `runs.checkpoints`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mocme_dist.data.files import file_entry, read_json, sha256_file, sync
from mocme_dist.data.manifests import Count, FileEntry, FileName, Manifest, Size, checked
from mocme_dist.errors import CheckpointError, DataError
from mocme_dist.parallel.table import EntityTable
from mocme_dist.training.compatibility import changed_fields
from mocme_dist.training.engine_rows import EngineRows

MANIFEST = "MANIFEST.json"
DENSE = "dense.safetensors"
# For a run at a URL, the lease number and eight random digits follow the step.
NAME = re.compile(r"step_(?P<step>\d{10})(?:-(?P<lease>\d{1,18})-[0-9a-f]{8})?", re.ASCII)
# Rows read at a time: 64 MiB at D = 256, in addition to the table.
_LOADED_ROWS = 1 << 16


class PartEntry(FileEntry):
    """A file of a checkpoint; `first` and `last` are set if it holds the rows [first, last) of the entity table."""

    first: Count | None = None
    last: Count | None = None


class WarningState(Manifest):
    """Symptoms of a run that were logged before; see `observe.diagnostics`."""

    said: list[str]
    best_mrr: float
    without_better: Count


class MonitorState(Manifest):
    """The interval of steps that a checkpoint cut in two; see `observe.monitor`."""

    seconds: float
    interval_step: Count
    interval_s: float
    phases_s: dict[str, float]
    sums: list[float]
    skipped: Count = 0  # of older checkpoints
    total_skipped: Count
    sent_vectors: Count
    signatures: WarningState | None = None


class ScheduleState(Manifest):
    """The schedule of the learning rates that the run followed."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    warmup_steps: Count
    last_step: Count


class CheckpointManifest(Manifest):
    """Fields of MANIFEST.json. A later start of the run reads them all, so each is checked; older ones lack some."""

    format: Literal[1]
    step: Count
    num_rows: Count
    width: Size
    optimizer: str
    table_updates: Count
    files: dict[FileName, PartEntry]
    identity: dict[str, Any] = Field(default_factory=dict)
    metric: float | None = None
    lease: Count | None = None
    best_mrr: float | None = None
    first_loss: float | None = None
    bad_evaluations: Count = 0
    nonfinite: Count = 0
    exploded: Count = 0
    monitor: MonitorState | None = None
    legs: list[str] = Field(default_factory=list)
    schedule: ScheduleState | None = None

    @model_validator(mode="after")
    def _check_files(self) -> CheckpointManifest:
        if DENSE not in self.files:
            raise ValueError(f"files: lacks {DENSE}")
        covered = 0
        # A range without an end counts as one that ends before it begins.
        parts = [
            (part.first, -1 if part.last is None else part.last)
            for part in self.files.values()
            if part.first is not None
        ]
        for first, last in sorted(parts):
            if first != covered or last < first:
                break
            covered = last
        if covered != self.num_rows:
            raise ValueError(f"parts cover rows [0, {covered:,}) of [0, {self.num_rows:,})")
        return self


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its folder on this machine and the content of its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of training steps before it was written."""
        return int(self.manifest["step"])


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of `step`; names sort as steps do."""
    return f"step_{step:010d}"


def read_manifest(folder: Path) -> Saved:
    """Return the checkpoint in `folder`, with its manifest checked before any file it names is opened.

    Raises:
        CheckpointError: the manifest is missing, torn or impossible, or its step is not that of the folder's name.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        checked(CheckpointManifest, manifest, path, "it does not count")
    except DataError as error:
        raise CheckpointError(f"{folder.name}: {MANIFEST} is missing or torn: {error}") from None
    match = NAME.fullmatch(folder.name)
    if match is None or int(match["step"]) != manifest["step"]:
        raise CheckpointError(f"{folder.name}: {MANIFEST} says step {manifest['step']}, the folder name another")
    return Saved(folder, dict(manifest))


def write_parts(
    folder: Path, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], rank: int
) -> dict[str, dict[str, Any]]:
    """Write one rank's files: its rows, and the dense state if given; return their manifest entries by name.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"rows": table.rows_rD, **table.state}
    needed = sum(value.numel() * value.element_size() for value in (*rows.values(), *dense.values()))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free at {folder.parent}")
    name = f"rows-{rank:05d}.safetensors"
    entries = {name: {**_write(folder / name, rows), "first": table.first, "last": table.last}}
    if dense:
        entries[DENSE] = _write(folder / DENSE, dense)
    return entries


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    sync(path)
    return file_entry(path)


def describe(step: int, table: EntityTable | EngineRows) -> dict[str, Any]:
    """Return manifest fields about the table and library versions.

    No state of random generators is kept: every draw is a function of seed, step and rank.
    """
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


def needed_files(saved: Saved, first: int, last: int) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of the files that rows [first, last) need, the dense state included."""
    return {
        name: entry
        for name, entry in saved.manifest["files"].items()
        if entry.get("first") is None or (entry["first"] < last and entry["last"] > first)
    }


def check_hash(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file of a checkpoint with its manifest entry.

    Raises:
        CheckpointError: the file is missing, or its size or hash differs.
    """
    where = f"{path.parent.name}: {path.name}"
    if not path.is_file():
        raise CheckpointError(f"{where} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{where} has size {path.stat().st_size}, manifest says {entry['bytes']}")
    if sha256_file(path) != entry["sha256"]:
        raise CheckpointError(f"{where}: sha256 differs from the manifest's")


def best_of(saved: Saved) -> tuple[bool, float, int]:
    """Return the sort key of the best checkpoint: the highest metric, and the newest of equal ones."""
    metric = saved.manifest.get("metric")
    return metric is not None, metric or 0.0, saved.step


def worth_keeping(newest_first: Sequence[Saved], keep: int) -> list[Saved]:
    """Return the `keep` newest checkpoints and the best one."""
    best = max(newest_first, key=best_of, default=None)  # without any metric the newest
    return [saved for place, saved in enumerate(newest_first) if place < keep or saved is best]


def check_compatible(saved: Saved, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or data set.

    Args:
        identity: compatibility fields of the run that loads it.

    Raises:
        CheckpointError: every setting that differs, with both values.
    """
    if changed := changed_fields(saved.manifest.get("identity", {}), identity):
        lines = "".join(f"\n  {line}" for line in changed)
        raise CheckpointError(
            f"{saved.path}: made with other settings, which may not change; "
            f"use another run.dir or the settings it was made with{lines}"
        )


@contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """Yield an open file of a checkpoint.

    Raises:
        CheckpointError: it is not a safetensors file, or a tensor is missing or has another shape. Its hash may fit all
            the same: the manifest may be of the same author.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path.parent.name}: {path.name} cannot be read: {reason}") from None


def load_rows(saved: Saved, table: EntityTable | EngineRows) -> None:
    """Fill this rank's range of the table from the files that hold it.

    Raises:
        CheckpointError: the files do not cover the range.
    """
    with table.filling() as part:
        covered = 0
        for name, entry in needed_files(saved, part.first, part.last).items():
            first = entry.get("first")
            if first is None:
                continue
            begin = max(first, part.first)
            end = min(entry["last"], part.last)
            for at in range(begin, end, _LOADED_ROWS):
                to = min(at + _LOADED_ROWS, end)
                # The file is opened per piece: a slice is a copy, and mapped pages count as this process's until it
                # is closed.
                with _tensors(saved.path / name) as file:
                    for key, target in (("rows", part.rows_rD), *part.state.items()):
                        target[at - part.first : to - part.first].copy_(file.get_slice(key)[at - first : to - first])
            covered += end - begin
        if covered != part.last - part.first:
            raise CheckpointError(f"{saved.path}: parts cover {covered:,} of rows [{part.first:,}, {part.last:,})")
        part.num_updates = int(saved.manifest["table_updates"])


def read_rows(saved: Saved, first: int, last: int) -> Tensor:
    """Return (last - first, D) float32 rows of the entities [first, last).

    Raises:
        CheckpointError: the files do not cover the range.
    """
    pieces = []
    covered = first
    parts = [
        (entry["first"], entry["last"], name)
        for name, entry in saved.manifest["files"].items()
        if entry.get("first") is not None
    ]
    for begin, end, name in sorted(parts):
        if begin <= covered < min(end, last):
            with _tensors(saved.path / name) as file:
                pieces.append(file.get_slice("rows")[covered - begin : min(end, last) - begin].float())
            covered = min(end, last)
    if covered != last:
        raise CheckpointError(f"{saved.path}: parts cover rows [{first:,}, {covered:,}) of [{first:,}, {last:,})")
    return torch.cat(pieces)


def load_dense(saved: Saved) -> dict[str, Tensor]:
    """Return the full dense state by name.

    Raises:
        CheckpointError: the file is not a safetensors file.
    """
    with _tensors(saved.path / DENSE) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
