"""The one partition: contiguous id ranges of entities over shards and over ranks.

Pure arithmetic without state or tensors. Every stage takes row ranges from here, so a tar shard, a feature part, a
rank's rows and a checkpoint part never disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mocme_dist.errors import ShapeError


@dataclass(frozen=True)
class RowPartition:
    """`num_rows` ids over `num_ranks` ranks: contiguous, sizes differ by at most one, the larger ones first."""

    num_rows: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.num_ranks < 1:
            raise ShapeError(
                f"RowPartition: num_rows {self.num_rows} and num_ranks {self.num_ranks}, expected >= 0 and >= 1"
            )

    def bounds(self, rank: int) -> tuple[int, int]:
        """Return the first id and one past the last id of `rank`; equal if it has none."""
        if not 0 <= rank < self.num_ranks:
            raise ShapeError(f"RowPartition: rank {rank} of {self.num_ranks}")
        size, larger = divmod(self.num_rows, self.num_ranks)
        first = rank * size + min(rank, larger)
        return first, first + size + (rank < larger)

    def starts(self) -> list[int]:
        """Return the first id of each rank, then `num_rows`: ascending numbers for a binary search."""
        return [self.bounds(rank)[0] for rank in range(self.num_ranks)] + [self.num_rows]


@dataclass(frozen=True)
class ShardPartition:
    """`num_rows` ids over shards of `shard_rows` ids each; the last shard may be shorter."""

    num_rows: int
    shard_rows: int

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first id and one past the last id of `shard`."""
        if not 0 <= shard < self.num_shards:
            raise ShapeError(f"ShardPartition: shard {shard} of {self.num_shards}")
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows)

    def overlapping(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield the shards with ids of [first, last) as (shard, first id in the range, one past the last)."""
        if first >= last:
            return
        for shard in range(first // self.shard_rows, -(-last // self.shard_rows)):
            start, stop = self.bounds(shard)
            yield shard, max(first, start), min(last, stop)
