"""Exact filtered ranking by counting.

Every rank scores the queries against its own rows and counts how many score above the target and how many score the
same, known answers left out (`counting`); two integers a query are summed over ranks. Nothing is sorted and nothing of
size queries x entities is kept. A tie counts half: rank = 1 + above + equal / 2, the mean of the best and
the worst place the target could take. A rank's rows may come whole or piece by piece: counts add up.

The distance of an entity has the same bits on every rank, the target's included, so ranks are equal, bit for bit, at
every world size.

A vector of zeros means that the model knows nothing of the entity: it has neither a training fact nor features. As a
candidate it is farther than any other, so it ranks last; zeros themselves would be near to every query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mocme_dist.data.known import KnownAnswers
from mocme_dist.kernels.counting import count, target_distances
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import Comm

# Queries whose vectors are held at once, with their targets': 128 MiB at D 256.
_PASS_QUERIES = 1 << 16
# Seed of the fixed sample of queries that is ranked while training.
_SAMPLE_SEED = 20240607
# Coordinates of an unknown candidate: its distances are finite in float32, and equal for all unknown candidates.
_FAR = 1e18


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
        source, target = np.stack([head, tail], 1).ravel(), np.stack([tail, head], 1).ravel()
        return cls(source, relation.repeat(2), np.tile(np.array([0, 1], np.int64), len(head)), target)

    def take(self, index: np.ndarray | slice) -> Queries:
        """The queries at `index`."""
        return Queries(*(column[index] for column in self))


def split_queries(triples_T3: np.ndarray, limit: int = 0) -> Queries:
    """Both queries of every triple, or of a fixed sample when there are more than `limit` queries.

    The sample is the same at every call, so a curve over epochs compares like with like; both directions of a
    drawn triple are in it.
    """
    if limit and 2 * len(triples_T3) > limit:
        chosen = np.random.default_rng(_SAMPLE_SEED).choice(len(triples_T3), max(1, limit // 2), replace=False)
        triples_T3 = np.asarray(triples_T3)[np.sort(chosen)]
    return Queries.both_directions(triples_T3)


class Sizes(NamedTuple):
    """Sizes of the blocks that are scored at once.

    Attributes:
        query_block: queries; at most `tile_rows` count.
        tile_rows: entities that the torch forms score at once.
        compiled: whether kernels may be built, or the plain form runs.
    """

    query_block: int = 256
    tile_rows: int = 1024
    compiled: bool = False


class Ranks(NamedTuple):
    """Filtered ranks of Q queries, float64: with every entity as a candidate, and with all but the query's source."""

    filtered: np.ndarray
    without_source: np.ndarray


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
    """Queries that are scored at once.

    Attributes:
        query_QD: rotated sources.
        target_Q: distance of the target.
        asked: the queries, without those that only fill up the block.
        source_q: contribution of the source as a candidate to the rank of each query in `asked`: 1, 1/2 or 0.
    """

    query_QD: Tensor
    target_Q: Tensor
    asked: Queries
    source_q: np.ndarray


def as_candidates(z_nD: Tensor) -> Tensor:
    """Vectors as candidates: unknown entities, whose vectors are zeros, are moved far away."""
    unknown_n = ~z_nD.any(1)
    return torch.where(unknown_n[:, None], _FAR, z_nD) if bool(unknown_n.any()) else z_nD


def source_competes(queries: Queries, known: KnownAnswers) -> np.ndarray:
    """(Q,) whether each query's source is a candidate: it is neither the target nor a known answer."""
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    query = np.repeat(np.arange(len(queries.source)), np.diff(offsets))
    is_answer = np.bincount(query[targets == queries.source[query]], minlength=len(queries.source)) > 0
    return np.asarray(~is_answer & (queries.source != queries.target))


def excluded(queries: Queries, known: KnownAnswers, first: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query, local row) of these rows that do not compete: known answers and the target itself, by row."""
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    query = np.concatenate(
        [np.repeat(np.arange(len(queries.source)), np.diff(offsets)), np.arange(len(queries.source))]
    )
    row = np.concatenate([targets, queries.target]) - first
    inside = (row >= 0) & (row < num_rows)
    pairs = np.sort(row[inside] * len(queries.source) + query[inside])
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique would hash, four times as slow
    return pairs % len(queries.source), pairs // len(queries.source)


def _make_block(
    queries: Queries, asked: int, phase_QC: Tensor, both_2QD: Tensor, known: KnownAnswers, sizes: Sizes
) -> _Block:
    """One block of queries, the first `asked` no filling; both_2QD: its sources, then its targets."""
    Q = len(queries.source)
    sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction).to(both_2QD.device, torch.float32)
    query_QD = rotate(both_2QD[:Q], phase_QC, sign_Q)
    both_2QD = as_candidates(both_2QD)
    target_Q = target_distances(query_QD, both_2QD[Q:], sizes.tile_rows, sizes.compiled)
    source_Q = target_distances(query_QD, both_2QD[:Q], sizes.tile_rows, sizes.compiled)
    before_Q = (~(source_Q >= target_Q)).double() + (source_Q == target_Q).double() / 2
    some = queries.take(slice(asked))
    return _Block(query_QD, target_Q, some, before_Q[:asked].cpu().numpy() * source_competes(some, known))


def count_block(block: _Block, piece: RowShard, known: KnownAnswers, sizes: Sizes) -> Tensor:
    """(2, Q) how many rows of `piece` score above and equal to each query's target, those that do not compete left out.

    Args:
        block: the queries.
        piece: vectors.
        known: answers that do not compete. Their pairs are made per block, because a hub has many.
        sizes: see `Sizes`.
    """
    pairs = excluded(block.asked, known, piece.first, len(piece.z_rD))
    skip_query, skip_row = (torch.from_numpy(part).to(piece.z_rD.device) for part in pairs)
    return count(block.query_QD, block.target_Q, piece.z_rD, skip_query, skip_row, sizes.tile_rows, sizes.compiled)


def _rank_pass(
    queries: Queries,
    phase_of: Callable[[Tensor], Tensor],
    shard: Vectors,
    known: KnownAnswers,
    comm: Comm,
    sizes: Sizes,
    show: Callable[[int], None],
) -> Ranks:
    """Ranks of as many queries as fit in memory: their vectors first, then one pass over the rows."""
    total, query_block = len(queries.source), sizes.query_block
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
        blocks.append(_make_block(queries.take(index), asked, phase_QC, both_2QD, known, sizes))
    counts_2N = torch.zeros(2, len(blocks) * query_block, dtype=torch.int64, device=both_ND.device)
    for number, piece in enumerate(shard.pieces()):
        piece = piece._replace(z_rD=as_candidates(piece.z_rD))
        for turn, block in enumerate(blocks):
            at = slice(turn * query_block, (turn + 1) * query_block)
            counts_2N[:, at] += count_block(block, piece, known, sizes)
            show(total * number // shard.num_pieces + min(at.stop, total) // shard.num_pieces)
    above_N, equal_N = comm.sum(counts_2N)[:, :total].cpu().numpy()
    rank_N = np.asarray(1 + above_N + equal_N / 2)
    return Ranks(rank_N, rank_N - np.concatenate([block.source_q for block in blocks]))


def rank_queries(
    queries: Queries,
    phase_of: Callable[[Tensor], Tensor],
    shard: Vectors,
    known: KnownAnswers,
    comm: Comm,
    sizes: Sizes,
    progress: Callable[[int, int], None] | None = None,
) -> Ranks:
    """Filtered ranks of any number of queries with and without their sources, the same on every rank; collective.

    Args:
        queries: the same on every rank.
        phase_of: relation ids (n,) to phases (n, C).
        shard: this rank's vectors.
        known: answers that do not compete with the target.
        sizes: see `Sizes`.
        progress: called with (queries done, of how many) after each block.
    """
    sizes = sizes._replace(query_block=min(sizes.query_block, sizes.tile_rows))
    ranks, total = list[Ranks](), len(queries.source)
    with torch.inference_mode():
        for start in range(0, total, _PASS_QUERIES):

            def show(done: int, before: int = start) -> None:
                if progress is not None:
                    progress(before + done, total)

            some = queries.take(slice(start, start + _PASS_QUERIES))
            ranks.append(_rank_pass(some, phase_of, shard, known, comm, sizes, show))
    columns = zip(*ranks, strict=True) if ranks else ((), ())
    return Ranks(*(np.concatenate([np.zeros(0), *parts]) for parts in columns))
