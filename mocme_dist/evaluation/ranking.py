"""Exact filtered ranking by counting.

Every rank scores the queries against its own rows and counts how many score above the target and how many score the
same, known answers left out (`counting`); two integers a query are summed over ranks. Nothing is sorted and nothing of
size queries x entities is kept. A tie counts half: rank = 1 + above + equal / 2, the mean of the best and
the worst place the target could take. A rank's rows may come whole or piece by piece: counts add up.

An entity's distance is the same number wherever it stands, the target's too, so ranks are the same, bit for bit, at
every world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mocme_dist.evaluation.counting import count, target_distances
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import Comm

# Vectors of so many queries and targets are held at once: 128 MiB of D 256.
_PASS_QUERIES = 1 << 16


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


class Vectors(Protocol):
    """One rank's fused vectors, whole or a piece at a time; both methods are called by all ranks together."""

    @property
    def first(self) -> int:
        """Id of this rank's first entity."""

    @property
    def num_rows(self) -> int:
        """How many entities it has."""

    @property
    def num_pieces(self) -> int:
        """How many pieces there are, the same on every rank."""

    def pick(self, ids_Q: np.ndarray) -> Tensor:
        """(Q, D) vectors of any entities: this rank's own, zeros for the others'."""

    def pieces(self) -> Iterator[RowShard]:
        """Contiguous runs of the rows in ascending order; some perhaps empty."""


class RowShard(NamedTuple):
    """Fused vectors that are held whole: z_rD (r, D) of the entities [first, first + r)."""

    z_rD: Tensor
    first: int

    @property
    def num_rows(self) -> int:
        """How many entities."""
        return len(self.z_rD)

    @property
    def num_pieces(self) -> int:
        """It is one piece."""
        return 1

    def pick(self, ids_Q: np.ndarray) -> Tensor:
        """See `Vectors`."""
        out = self.z_rD.new_zeros(len(ids_Q), self.z_rD.shape[1])
        local_Q = torch.from_numpy(ids_Q).to(out.device) - self.first
        mine_Q = (local_Q >= 0) & (local_Q < len(self.z_rD))
        out[mine_Q] = self.z_rD[local_Q[mine_Q]]
        return out

    def pieces(self) -> Iterator[RowShard]:
        """Itself."""
        yield self


class _Block(NamedTuple):
    """Queries that are scored at once: rotated sources, the target's distance, and the queries without those that only fill up."""

    query_QD: Tensor
    target_Q: Tensor
    asked: Queries


def _excluded(queries: Queries, known: Answers, first: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query, local row) of these rows that do not compete: known answers and the target itself, by row."""
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    query = np.concatenate([np.repeat(np.arange(len(queries.source)), np.diff(offsets)), np.arange(len(queries.source))])
    row = np.concatenate([targets, queries.target]) - first
    inside = (row >= 0) & (row < num_rows)
    pairs = np.unique(row[inside] * len(queries.source) + query[inside])
    return pairs % len(queries.source), pairs // len(queries.source)


def _make_block(queries: Queries, asked: int, phase_QC: Tensor, both_2QD: Tensor, tile_rows: int, compiled: bool) -> _Block:
    """One block, at most `tile_rows` queries, the first `asked` no filling; both_2QD: vectors of its sources, then of its targets."""
    Q = len(queries.source)
    sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction).to(both_2QD.device, torch.float32)
    query_QD = rotate(both_2QD[:Q], phase_QC, sign_Q)
    target_Q = target_distances(query_QD, both_2QD[Q:], tile_rows, compiled)
    return _Block(query_QD, target_Q, queries.take(slice(asked)))


def count_block(block: _Block, piece: RowShard, known: Answers, tile_rows: int, compiled: bool) -> Tensor:
    """(2, Q) how many rows of `piece` score above and equal to each query's target, those that do not compete left out.

    Args:
        block: the queries.
        piece: vectors.
        known: answers that do not compete. Their pairs are made here and dropped: a hub's are many, and a pass has many blocks.
        tile_rows: entities that the torch forms score at once.
        compiled: whether kernels may be built, or the plain form.
    """
    pairs = _excluded(block.asked, known, piece.first, len(piece.z_rD))
    skip_query, skip_row = (torch.from_numpy(part).to(piece.z_rD.device) for part in pairs)
    return count(block.query_QD, block.target_Q, piece.z_rD, skip_query, skip_row, tile_rows, compiled)


def _rank_pass(
    queries: Queries,
    phase_of: Callable[[Tensor], Tensor],
    shard: Vectors,
    known: Answers,
    comm: Comm,
    sizes: tuple[int, int, bool],
    show: Callable[[int], None],
) -> np.ndarray:
    """Ranks of as many queries as fit in memory: their vectors first, then one pass over the rows."""
    (query_block, tile_rows, compiled), total = sizes, len(queries.source)
    # An owner fills its rows, a sum spreads them (x + 0 is x).
    both_ND = comm.sum(shard.pick(np.concatenate([queries.source, queries.target])))
    blocks = []
    for start in range(0, total, query_block):
        # The last block is filled up with repeats of its first query: one shape, one compiled kernel.
        index = np.arange(start, start + query_block)
        index = np.where(index < total, index, start)
        phase_QC = phase_of(torch.from_numpy(queries.relation[index]).to(both_ND.device))
        both_2QD = both_ND[torch.from_numpy(np.concatenate([index, total + index])).to(both_ND.device)]
        asked = min(query_block, total - start)
        blocks.append(_make_block(queries.take(index), asked, phase_QC, both_2QD, tile_rows, compiled))
    counts_2N = torch.zeros(2, len(blocks) * query_block, dtype=torch.int64, device=both_ND.device)
    for number, piece in enumerate(shard.pieces()):
        for turn, block in enumerate(blocks):
            at = slice(turn * query_block, (turn + 1) * query_block)
            counts_2N[:, at] += count_block(block, piece, known, tile_rows, compiled)
            show(total * number // shard.num_pieces + min(at.stop, total) // shard.num_pieces)
    above_N, equal_N = comm.sum(counts_2N)[:, :total].cpu().numpy()
    return np.asarray(1 + above_N + equal_N / 2)


def rank_queries(
    queries: Queries,
    phase_of: Callable[[Tensor], Tensor],
    shard: Vectors,
    known: Answers,
    comm: Comm,
    *,
    query_block: int = 256,
    tile_rows: int = 1024,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(Q,) float64 filtered ranks of any number of queries, the same on every rank; collective.

    Args:
        queries: the same on every rank.
        phase_of: relation ids (n,) to phases (n, C).
        shard: this rank's vectors.
        known: answers that do not compete with the target.
        query_block: queries scored at once; at most tile_rows count.
        tile_rows: entities that the torch forms score at once.
        compiled: whether kernels may be built, or the plain form.
        progress: called with (queries done, of how many) after each block.
    """
    query_block = min(query_block, tile_rows)
    ranks, total = [], len(queries.source)
    with torch.inference_mode():
        for start in range(0, total, _PASS_QUERIES):

            def show(done: int, before: int = start) -> None:
                if progress is not None:
                    progress(before + done, total)

            some = queries.take(slice(start, start + _PASS_QUERIES))
            ranks.append(_rank_pass(some, phase_of, shard, known, comm, (query_block, tile_rows, compiled), show))
    return np.concatenate(ranks) if ranks else np.zeros(0)
