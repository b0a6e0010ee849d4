"""The table as an ordinary parameter of the engine (entities.sharding=zero): for small graphs, and as a control.

Every step then updates, averages and, under ZeRO, gathers all E rows, while the row-sharded table touches only those of
the batch. Checkpoints are those of the row-sharded table under Adam, so each can resume the other's.

Each rank writes only its rows. The engine decides what a rank holds: the whole parameter at stages 0 to 2, and at stage
3 while a forward pass needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocme_dist.parallel.table import RowPart, initial_rows
from mocme_dist.partition import RowPartition
from mocme_dist.training.engine import Engine

# Checkpoints name Adam's moments as the row-sharded table does.
_NAMES = {"value": "rows", "exp_avg": "first_moment", "exp_avg_sq": "second_moment"}


def row_parameter(
    partition: RowPartition, width: int, init_range: float, seed: int, device: torch.device
) -> nn.Embedding:
    """Return all rows as a module, padded so that ZeRO divides it into equal parts of whole rows."""
    filling = -partition.num_rows % partition.num_ranks
    rows_ED = initial_rows(0, partition.num_rows, width, init_range, seed, device=device)
    return nn.Embedding.from_pretrained(nn.functional.pad(rows_ED, (0, 0, 0, filling)), freeze=False)


class EngineRows:
    """The table, as loop and checkpoints use it, if the engine holds the rows."""

    optimizer = "adam"

    def __init__(self, engine: Engine, rows: nn.Embedding, partition: RowPartition, rank: int) -> None:
        self.engine, self.rows, self.partition, self.width = engine, rows, partition, rows.embedding_dim
        self._updates = torch.zeros((), dtype=torch.float64, device=rows.weight.device)
        self.offset = partition.bounds(rank)[0]
        begin, end = (place // self.width for place in engine.apart_range())
        self._begin, self._end = begin, min(end, partition.num_rows)
        whole = (self._begin, self._end) == (0, partition.num_rows)
        # If all ranks hold all rows, each writes its share.
        self.first, self.last = partition.bounds(rank) if whole else (min(self._begin, self._end), self._end)

    def look_up(self, rows_V: Tensor) -> Tensor:
        """Return (V, D) float32 copies of local rows; collective under ZeRO-3."""
        return self.rows(rows_V + self.offset).float()

    def gather(self, rows_V: Tensor) -> Tensor:
        """Return (V,) ids of local rows, by which the engine's forward pass looks them up."""
        return rows_V + self.offset

    def scale_rates(self, factor: float) -> None:
        """Do nothing: the engine scales the rate of its group."""

    @property
    def num_updates(self) -> int:
        """Number of updates that were applied; the host waits for the device."""
        return int(self._updates)

    def update(self, rows_V: Tensor, grad_VD: Tensor, factor: Tensor) -> None:
        """Count the engine's step, which has updated the rows unless its factor is 0."""
        self._updates += factor > 0

    @property
    def rows_rD(self) -> Tensor:
        """Return (last - first, D) float32 values of the rows that this rank writes."""
        return self._mine()["rows"]

    @property
    def state(self) -> dict[str, Tensor]:
        """Return Adam's moments of the same rows."""
        return {name: value for name, value in self._mine().items() if name != "rows"}

    def _mine(self) -> dict[str, Tensor]:
        here = slice(self.first - self._begin, self.last - self._begin)
        return {_NAMES[name]: value.view(-1, self.width)[here] for name, value in self.engine.apart_state().items()}

    @contextmanager
    def filling(self) -> Iterator[RowPart]:
        """Yield all rows that this rank holds, to be overwritten; the engine receives them at the end. Collective."""
        held = {name: value.clone() for name, value in self.engine.apart_state().items()}
        named = {_NAMES[name]: value.view(-1, self.width)[: self._end - self._begin] for name, value in held.items()}
        part = RowPart(min(self._begin, self._end), self._end, named.pop("rows"), named, self.num_updates)
        yield part
        self._updates.fill_(part.num_updates)
        self.engine.set_apart(held)
