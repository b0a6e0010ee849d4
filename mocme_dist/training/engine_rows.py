"""The table as an ordinary parameter of the engine (entities.sharding=zero): for small graphs, and as a control.

Every step then moves, averages and, under ZeRO, gathers all E rows, where the row-sharded table touches those of the
batch. Its checkpoints are those of the row-sharded table under Adam: each may resume the other's.

No rank writes more than its part. Reading and, at stages 0 to 2, holding follow the engine: the parameter is whole on
every rank there, and at stage 3 while a forward pass needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocme_dist.parallel.table import RowPart, initial_rows
from mocme_dist.partition import RowPartition
from mocme_dist.training.plain_engine import Engine

# Checkpoints name Adam's moments as the row-sharded table does.
_NAMES = {"value": "rows", "exp_avg": "first_moment", "exp_avg_sq": "second_moment"}


def row_parameter(partition: RowPartition, width: int, init_range: float, seed: int, device: torch.device) -> nn.Embedding:
    """All rows as a module; filled up so that ZeRO cuts it at the ends of rows, into equal parts."""
    filling = -partition.num_rows % partition.num_parts
    rows_ED = initial_rows(0, partition.num_rows, width, init_range, seed, device=device)
    return nn.Embedding.from_pretrained(nn.functional.pad(rows_ED, (0, 0, 0, filling)), freeze=False)


class EngineRows:
    """What the loop and the checkpoints ask of a table, answered by the engine that holds it."""

    optimizer = "adam"

    def __init__(self, engine: Engine, rows: nn.Embedding, partition: RowPartition, rank: int) -> None:
        self.engine, self.rows, self.partition, self.width, self.num_updates = engine, rows, partition, rows.embedding_dim, 0
        self.offset = partition.bounds(rank)[0]
        begin, end = (place // self.width for place in engine.apart_range())
        self._begin, self._end = begin, min(end, partition.num_rows)
        whole = (self._begin, self._end) == (0, partition.num_rows)
        # Where all ranks hold all rows each writes its share of them.
        self.first, self.last = partition.bounds(rank) if whole else (min(self._begin, self._end), self._end)

    def look_up(self, rows_V: Tensor) -> Tensor:
        """(V, D) float32 copies of rows, by place in this rank's range; collective under ZeRO-3."""
        return self.rows(rows_V + self.offset).float()

    def gather(self, rows_V: Tensor) -> Tensor:
        """(V,) what the engine's forward pass looks rows up by: their ids."""
        return rows_V + self.offset

    def update(self, rows_V: Tensor, grad_VD: Tensor) -> None:
        """Count the engine's step; it has moved the rows."""
        self.num_updates += 1

    @property
    def rows_rD(self) -> Tensor:
        """(last - first, D) float32 values of the rows this rank writes."""
        return self._mine()["rows"]

    @property
    def state(self) -> dict[str, Tensor]:
        """Adam's moments of the same rows."""
        return {name: value for name, value in self._mine().items() if name != "rows"}

    def _mine(self) -> dict[str, Tensor]:
        here = slice(self.first - self._begin, self.last - self._begin)
        return {_NAMES[name]: value.view(-1, self.width)[here] for name, value in self.engine.apart_state().items()}

    @contextmanager
    def filling(self) -> Iterator[RowPart]:
        """All rows that this rank holds, to be overwritten; they go to the engine at the end. Collective."""
        held = {name: value.clone() for name, value in self.engine.apart_state().items()}
        named = {_NAMES[name]: value.view(-1, self.width)[: self._end - self._begin] for name, value in held.items()}
        part = RowPart(min(self._begin, self._end), self._end, named.pop("rows"), named, self.num_updates)
        yield part
        self.num_updates = part.num_updates
        self.engine.set_apart(held)
