"""Exact filtered ranking by counting.

Every rank scores the queries against its own rows, a tile at a time, and counts how many score above the target and
how many score the same, known answers left out; two integers a query are summed over ranks. Nothing is sorted and
nothing of size queries x entities is kept. A tie counts half: rank = 1 + above + equal / 2, the mean of the best and
the worst place the target could take.

Distances come from one kernel with one shape, the target's too, so that equal vectors give equal numbers and ranks
are the same, bit for bit, at every world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mocme_dist.model.rotate import pool_distance, rotate
from mocme_dist.parallel.comm import Comm

# The plain form of the kernel stores (queries, tile, D); so many queries at once bound it.
_PLAIN_QUERIES = 16


class Answers(Protocol):
    """Known answers of queries (data/known.py has it)."""

    def lookup(self, source: np.ndarray, relation: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (Q + 1,) and flat targets of Q queries."""


class Queries(NamedTuple):
    """Q queries with their true answers, int64 arrays of length Q; direction 0 asks for the tail, 1 for the head."""

    source: np.ndarray
    relation: np.ndarray
    direction: np.ndarray
    target: np.ndarray

    @classmethod
    def both_directions(cls, triples_T3: np.ndarray) -> Queries:
        """Two queries of each triple: query 2 i asks for its tail, 2 i + 1 for its head."""
        head, relation, tail = np.asarray(triples_T3, dtype=np.int64).reshape(-1, 3).T
        pair = lambda a, b: np.stack([a, b], 1).ravel()  # noqa: E731
        return cls(pair(head, tail), pair(relation, relation), np.tile([0, 1], len(head)).astype(np.int64), pair(tail, head))

    def take(self, index: np.ndarray | slice) -> Queries:
        """The queries at `index`."""
        return Queries(*(column[index] for column in self))


class RowShard(NamedTuple):
    """One rank's fused vectors: z_rD (r, D) of the entities [first, first + r)."""

    z_rD: Tensor
    first: int


def _distances(query_QD: Tensor, tile_TD: Tensor, compiled: bool) -> Tensor:
    """(Q, T) distances, by the fused kernel or by the plain form in small pieces."""
    if compiled:
        return pool_distance(query_QD[None], tile_TD[None], True)[0]
    pieces = [pool_distance(part[None], tile_TD[None], False)[0] for part in query_QD.split(_PLAIN_QUERIES)]
    return torch.cat(pieces)


def _tiles(shard: RowShard, tile_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first local row, number of rows, padded (tile_rows, D) vectors) over the shard."""
    for start in range(0, len(shard.z_rD), tile_rows):
        rows_TD = shard.z_rD[start : start + tile_rows]
        count = len(rows_TD)
        if count < tile_rows:
            rows_TD = torch.cat([rows_TD, rows_TD.new_zeros(tile_rows - count, rows_TD.shape[1])])
        yield start, count, rows_TD


def _fetch(ids_Q: np.ndarray, shard: RowShard, comm: Comm) -> Tensor:
    """(Q, D) vectors of any entities on every rank: the owner fills its rows, a sum spreads them (x + 0 is x)."""
    out = shard.z_rD.new_zeros(len(ids_Q), shard.z_rD.shape[1])
    local_Q = torch.from_numpy(ids_Q).to(out.device) - shard.first
    mine_Q = (local_Q >= 0) & (local_Q < len(shard.z_rD))
    out[mine_Q] = shard.z_rD[local_Q[mine_Q]]
    return comm.sum(out)


def _excluded(queries: Queries, known: Answers, first: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query, local row) of this shard that do not compete: known answers and the target itself, by row."""
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    query = np.concatenate([np.repeat(np.arange(len(queries.source)), np.diff(offsets)), np.arange(len(queries.source))])
    row = np.concatenate([targets, queries.target]) - first
    inside = (row >= 0) & (row < num_rows)
    pairs = np.unique(row[inside] * len(queries.source) + query[inside])
    return pairs % len(queries.source), pairs // len(queries.source)


def rank_block(
    queries: Queries, phase_QC: Tensor, shard: RowShard, known: Answers, comm: Comm, tile_rows: int, compiled: bool
) -> np.ndarray:
    """(Q,) float64 filtered ranks of one block of queries; collective, the same on every rank.

    Args:
        queries: the block, the same on every rank.
        phase_QC: phases of the queries' relations.
        shard: this rank's vectors.
        known: answers that do not compete with the target.
        tile_rows: entities scored at once; at least Q.
        compiled: fused kernel or plain form.
    """
    Q, device = len(queries.source), shard.z_rD.device
    both_ND = _fetch(np.concatenate([queries.source, queries.target]), shard, comm)
    sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction).to(device, torch.float32)
    query_QD = rotate(both_ND[:Q], phase_QC, sign_Q)
    target_TD = torch.cat([both_ND[Q:], both_ND.new_zeros(tile_rows - Q, both_ND.shape[1])])
    target_Q1 = _distances(query_QD, target_TD, compiled)[:, :Q].diagonal()[:, None]
    skip_query, skip_row = _excluded(queries, known, shard.first, len(shard.z_rD))
    counts_2Q = torch.zeros(2, Q, dtype=torch.int64, device=device)
    for start, count, rows_TD in _tiles(shard, tile_rows):
        distance_QT = _distances(query_QD, rows_TD, compiled)[:, :count]
        # Not "<": where one of the two is NaN the candidate counts as better, so a model that has diverged ranks last.
        counts_2Q[0] += (~(distance_QT >= target_Q1)).sum(1)
        counts_2Q[1] += (distance_QT == target_Q1).sum(1)
        low, high = np.searchsorted(skip_row, [start, start + count])
        at_query = torch.from_numpy(skip_query[low:high]).to(device)
        skipped = distance_QT[at_query, torch.from_numpy(skip_row[low:high] - start).to(device)]
        counts_2Q[0].index_add_(0, at_query, -(~(skipped >= target_Q1[at_query, 0])).long())
        counts_2Q[1].index_add_(0, at_query, -(skipped == target_Q1[at_query, 0]).long())
    above_Q, equal_Q = comm.sum(counts_2Q).cpu().numpy()
    return 1 + above_Q + equal_Q / 2


def rank_queries(
    queries: Queries,
    phase_of: Callable[[Tensor], Tensor],
    shard: RowShard,
    known: Answers,
    comm: Comm,
    *,
    query_block: int = 256,
    tile_rows: int = 1024,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(Q,) float64 filtered ranks of any number of queries, in blocks of one shape; collective.

    Args:
        phase_of: relation ids (n,) to phases (n, C).
        progress: called with (queries done, of how many) after each block.
        The other arguments are those of `rank_block`.
    """
    query_block = min(query_block, tile_rows)
    ranks = []
    total = len(queries.source)
    with torch.inference_mode():
        for start in range(0, total, query_block):
            # The last block is filled up with repeats of its first query: one shape, one compiled kernel.
            index = np.arange(start, start + query_block)
            block = queries.take(np.where(index < total, index, start))
            phase_QC = phase_of(torch.from_numpy(block.relation).to(shard.z_rD.device))
            rank_Q = rank_block(block, phase_QC, shard, known, comm, tile_rows, compiled)
            ranks.append(rank_Q[index < total])
            if progress is not None:
                progress(min(start + query_block, total), total)
    return np.concatenate(ranks) if ranks else np.zeros(0)
