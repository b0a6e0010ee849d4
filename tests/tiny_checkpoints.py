"""Small checkpoints that are saved without a run, and ways to damage them."""

from __future__ import annotations

from pathlib import Path

import torch

from mocme_dist.parallel.comm import Comm, single
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.saver import Saver
from mocme_dist.training import checkpoint

ROWS, WIDTH = 11, 4


def make_table(
    rank: int, world: int, rows: int = ROWS, optimizer: str = "adam", seed: int = 0, updates: int = 3
) -> EntityTable:
    """A table whose rows have moved, a function of the global row alone; rows of "adagrad" are bfloat16 here."""
    dtype = torch.bfloat16 if optimizer == "adagrad" else torch.float32
    table = EntityTable(
        RowPartition(rows, world), rank, WIDTH, optimizer=optimizer, learning_rate=0.1, seed=seed, dtype=dtype
    )
    for step in range(updates):
        full_ED = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))
        local = torch.arange(table.last - table.first)
        table.update(local, full_ED[table.first : table.last])
    return table


def dense_state(seed: int = 1) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "value/a": torch.randn(3, 5, generator=gen),
        "exp_avg/a": torch.randn(3, 5, generator=gen),
        "buffer/n": torch.tensor(2.0),
    }


def save(
    directory: Path, step: int, metric: float | None = None, seed: int = 0, keep: int = 2, comm: Comm | None = None
) -> Path:
    comm = comm or single()
    manifest = {"metric": metric, "identity": {"width": WIDTH, "seed": seed}}
    saver = Saver(Checkpoints(directory), keep, comm, max_failures=1)
    table = make_table(comm.rank, comm.world_size, seed=seed)
    return Path(str(saver.save(step, table, dense_state(step), manifest)))


def find(directory: Path, resume: str = "auto", best: bool = False, comm: Comm | None = None) -> checkpoint.Saved:
    saved = Checkpoints(directory).find(resume, best, comm=comm)
    assert saved is not None
    return saved


def steps(directory: Path, folder: str = "checkpoints") -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((directory / folder).glob("step_*"))]


def nothing_is_left_over(directory: Path) -> bool:
    return not list(directory.rglob(".tmp-*")) and not list((directory / "unsent").glob("*"))


def truncate(path: Path) -> None:
    file = path / "rows-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray((path / "dense.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "dense.safetensors").write_bytes(bytes(data))


TEARS = {
    "truncated": (truncate, r"rows-00000.safetensors has size \d+, manifest says \d+"),
    "file missing": (lambda path: (path / "dense.safetensors").unlink(), r"dense.safetensors is missing"),
    "bit flipped": (flip, r"dense.safetensors: sha256 differs"),
    "manifest empty": (lambda path: (path / "MANIFEST.json").write_bytes(b""), r"MANIFEST.json is missing or torn"),
    "manifest of nothing": (
        lambda path: (path / "MANIFEST.json").write_text("{}"),
        r"MANIFEST.json is missing or torn",
    ),
    "manifest missing": (lambda path: (path / "MANIFEST.json").unlink(), r"MANIFEST.json is missing or torn"),
}
