"""Exact filtered ranking by the blend of the model and the evidence of neighbours.

As in `ranking`, every rank counts over its own rows, and two integers per query are summed. The bias of a pair from its
evidence is computed for a block of queries and a range of rows, counted and dropped: nothing of size queries x entities
is kept. Ranks are equal, bit for bit, at every world size, because terms and distances are the same on every rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import (
    Queries,
    Ranks,
    RowShard,
    Sizes,
    Vectors,
    excluded,
    source_competes,
)
from mocme_dist.evidence.terms import Evidence, Prepared
from mocme_dist.evidence.votes import LAST, Asked
from mocme_dist.kernels.builder import call
from mocme_dist.kernels.counting import PLAIN_QUERIES, block_pair_distances, kernels_for, tile_distances, tiles
from mocme_dist.model.blocks import block_distances
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import Comm

# Queries whose evidence is held at once, and rows whose terms are computed at once: 32 MiB for a block of 256 queries.
PASS_QUERIES, ROWS = 1 << 12, 1 << 15


class CountInputs(NamedTuple):
    """Queries with their weights and biases, the candidates that they rank, and the pairs that do not compete.

    Attributes:
        query_QD: (Q, D) rotated sources.
        weight_QP: (Q, P) weights of the distances of the vectors' P blocks, none negative.
        target_Q: scores of `blended_targets`.
        rows_rD: (r, D) candidates.
        bias_ur: (u, r) float32, finite.
        which_Q: (Q,) which of them each query has.
        skip_query, skip_row: pairs that do not compete, ascending by row.
    """

    query_QD: Tensor
    weight_QP: Tensor
    target_Q: Tensor
    rows_rD: Tensor
    bias_ur: Tensor
    which_Q: Tensor
    skip_query: Tensor
    skip_row: Tensor


def blended_targets(
    query_QD: Tensor, weight_QP: Tensor, target_QD: Tensor, bias_Q: Tensor, tile_rows: int, compiled: bool
) -> Tensor:
    """(Q,) the score of each query's own target; arguments as in `CountInputs`."""
    kernels = kernels_for(query_QD, compiled)
    if kernels is not None:
        each_Q = torch.arange(len(query_QD))
        return _scores(
            block_pair_distances(query_QD, target_QD, each_Q, each_Q, weight_QP.shape[1], kernels), weight_QP, bias_Q
        )
    padded_TD = torch.cat([target_QD, target_QD.new_zeros(tile_rows - len(query_QD), target_QD.shape[1])])
    distance_QTP = _blocks_of_tile(query_QD, padded_TD, weight_QP.shape[1], compiled)
    return _scores(distance_QTP.diagonal().T, weight_QP, bias_Q).contiguous()


def count_blended(given: CountInputs, tile_rows: int, compiled: bool) -> Tensor:
    """(2, Q) int64: rows that score above each query's target, and rows that score the same.

    By the fastest way there is.

    Args:
        tile_rows: candidates scored at once by the torch form; at least Q.
        compiled: whether kernels may be built.
    """
    kernels = kernels_for(given.query_QD, compiled)
    if kernels is not None:
        return count_native_blended(given, kernels)
    return count_tiles_blended(given, tile_rows, compiled)


def count_native_blended(given: CountInputs, kernels: ctypes.CDLL) -> Tensor:
    """`count_blended` by the kernel."""
    target_Q, which_Q, skip_query, skip_row = given.target_Q, given.which_Q, given.skip_query, given.skip_row
    (Q, D), num_blocks = given.query_QD.shape, given.weight_QP.shape[1]
    query_QD, rows_rD, bias_ur, weight_QP = (
        value.float().contiguous() for value in (given.query_QD, given.rows_rD, given.bias_ur, given.weight_QP)
    )
    # Adjacent queries share a pass and stop together, so those that stop at the same distance are put together.
    order_Q = (target_Q / weight_QP.sum(1).clamp_min(1e-30)).argsort(descending=True)
    counts_2Q, sorted_Q = torch.zeros(2, Q, dtype=torch.int64), target_Q[order_Q]
    arrays = (query_QD[order_Q], rows_rD, weight_QP[order_Q], bias_ur, which_Q[order_Q], sorted_Q, counts_2Q)
    call(kernels, "mocme_count_blended", arrays, (Q, len(rows_rD), D // 2, num_blocks), threads=torch.get_num_threads())
    counts_2Q[:, order_Q] = counts_2Q.clone()
    distance_PP = block_pair_distances(query_QD, rows_rD, skip_query, skip_row, num_blocks, kernels)
    skipped = _scores(distance_PP, weight_QP[skip_query], bias_ur[which_Q[skip_query], skip_row])
    return _leave_out(counts_2Q, skipped, target_Q, skip_query)


def count_tiles_blended(given: CountInputs, tile_rows: int, compiled: bool) -> Tensor:
    """`count_blended` in torch.

    Distances come from one kernel of one shape, the target's too, so that equal pairs tie.
    """
    query_QD, weight_QP, target_Q, rows_rD, bias_ur, which_Q, skip_query, skip_row = given
    counts_2Q = torch.zeros(2, len(query_QD), dtype=torch.int64, device=rows_rD.device)
    skip_row = skip_row.contiguous()
    for start, count, tile_TD in tiles(rows_rD, tile_rows):
        distance_QTP = _blocks_of_tile(query_QD, tile_TD, weight_QP.shape[1], compiled)[:, :count]
        score_QT = _scores(distance_QTP, weight_QP[:, None], bias_ur[:, start : start + count][which_Q])
        counts_2Q += torch.stack([_above(score_QT, target_Q[:, None]).sum(1), (score_QT == target_Q[:, None]).sum(1)])
        low, high = torch.searchsorted(skip_row, torch.tensor([start, start + count], device=skip_row.device)).tolist()
        at_query = skip_query[low:high]
        _leave_out(counts_2Q, score_QT[at_query, skip_row[low:high] - start], target_Q, at_query)
    return counts_2Q


def _blocks_of_tile(query_QD: Tensor, tile_TD: Tensor, num_blocks: int, compiled: bool) -> Tensor:
    """(Q, T, P) distances of the blocks of the vectors."""
    if num_blocks == 1:
        return tile_distances(query_QD, tile_TD, compiled)[..., None]
    if compiled:
        return block_distances(query_QD, tile_TD, num_blocks).permute(1, 2, 0)
    # The plain form stores a few queries' differences at a time.
    some = query_QD.split(PLAIN_QUERIES)
    found = [block_distances(some_QD, tile_TD, num_blocks, False).permute(1, 2, 0) for some_QD in some]
    return torch.cat(found)


def _scores(distance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Bias less the weighted distances, whose blocks are the last dimension, added up in order."""
    total = weight[..., 0] * distance[..., 0]
    for block in range(1, distance.shape[-1]):
        total = total + weight[..., block] * distance[..., block]
    return bias - total


def _leave_out(counts_2Q: Tensor, skipped_P: Tensor, target_Q: Tensor, query_P: Tensor) -> Tensor:
    """Subtract the counts of pairs that do not compete."""
    counts_2Q[0].index_add_(0, query_P, -_above(skipped_P, target_Q[query_P]).long())
    counts_2Q[1].index_add_(0, query_P, -(skipped_P == target_Q[query_P]).long())
    return counts_2Q


def _above(score: Tensor, target: Tensor) -> Tensor:
    return ~(score <= target)  # and not ">": NaN counts as above


class BlendInputs(NamedTuple):
    """Inputs of a ranking by the blend, on one rank.

    Attributes:
        phase_of: relation ids (n,) to phases (n, C).
        shard: this rank's vectors.
        known: answers that do not compete with the target.
        evidence: of this rank's entities.
        tables: (places, terms) weights, those of the model's blocks first; each table gives ranks of its own.
        sizes: of blocks.
    """

    phase_of: Callable[[Tensor], Tensor]
    shard: Vectors
    known: KnownAnswers
    evidence: Evidence
    tables: Sequence[Tensor]
    sizes: Sizes


class _Block(NamedTuple):
    """Queries that are scored at once.

    Attributes:
        query_QD: rotated sources.
        at: position of each query in the pass; the last block is filled up with repeats.
        asked: the queries, without repeats.
        index_Q: position of each query among the distinct queries of the pass.
    """

    query_QD: Tensor
    at: Tensor
    asked: Queries
    index_Q: np.ndarray


class _Pass(NamedTuple):
    """The queries of a pass, their evidence, and the weights of each table as (model's blocks, terms).

    `index_N` has the position of each query among the distinct ones.
    """

    blocks: list[_Block]
    index_N: np.ndarray
    both_ND: Tensor
    prepared: Prepared
    tables: list[tuple[Tensor, Tensor]]


def rank_blended(
    queries: Queries, inputs: BlendInputs, comm: Comm, progress: Callable[[int, int], None] | None = None
) -> list[Ranks]:
    """Filtered ranks under each table of weights, the same on every rank; collective.

    Args:
        queries: the same on every rank.
        progress: called with (queries done, of how many) after each pass.
    """
    total = len(queries.source)
    # Queries of one place together: they share the candidates of neighbours, and terms without weight are not computed.
    order = np.lexsort((queries.source, 2 * queries.relation + queries.direction))
    ranks = [Ranks(np.zeros(total), np.zeros(total)) for _ in inputs.tables]
    sizes = inputs.sizes._replace(query_block=min(inputs.sizes.query_block, inputs.sizes.tile_rows))
    inputs = inputs._replace(sizes=sizes)
    with torch.inference_mode():
        for start in range(0, total, PASS_QUERIES):
            some = order[start : start + PASS_QUERIES]
            for rank, found in zip(ranks, _rank_pass(queries.take(some), inputs, comm), strict=True):
                rank.filtered[some] = found.filtered
                rank.without_source[some] = found.without_source
            if progress is not None:
                progress(start + len(some), total)
    return ranks


def _rank_pass(queries: Queries, inputs: BlendInputs, comm: Comm) -> list[Ranks]:
    total, sizes = len(queries.source), inputs.sizes
    work = _make_pass(queries, inputs, comm)
    # Scores of the sources as candidates, and of the targets.
    ids_2N = np.stack([queries.source, queries.target])
    bias_2TN = torch.stack([_own_biases(work, inputs.evidence, ids_N, which) for which, ids_N in enumerate(ids_2N)])
    bias_2TN = comm.sum(bias_2TN)
    score_2TN = torch.empty_like(bias_2TN)
    for block in work.blocks:
        for which, (turn, (model_NP, _)) in product((0, 1), enumerate(work.tables)):
            candidate_QD = work.both_ND[which * total + block.at]
            pairs = (block.query_QD, model_NP[block.at], candidate_QD, bias_2TN[which, turn, block.at])
            score_2TN[which, turn, block.at] = blended_targets(*pairs, sizes.tile_rows, sizes.compiled)
    counts_T2N = torch.zeros(len(work.tables), 2, total, dtype=torch.int64, device=comm.device)
    for piece in inputs.shard.pieces():
        for start in range(0, len(piece.z_rD), ROWS):
            rows = RowShard(piece.z_rD[start : start + ROWS], piece.first + start)
            _count_rows(rows, work, score_2TN[1], inputs, counts_T2N)
    counts = comm.sum(counts_T2N).cpu().numpy()
    before_TN = (
        (_above(score_2TN[0], score_2TN[1]).double() + (score_2TN[0] == score_2TN[1]).double() / 2).cpu().numpy()
    )
    before_TN *= source_competes(queries, inputs.known)
    rank_TN = [np.asarray(1 + above_N + equal_N / 2) for above_N, equal_N in counts]
    return [Ranks(rank_N, rank_N - before_N) for rank_N, before_N in zip(rank_TN, before_TN, strict=True)]


def _make_pass(queries: Queries, inputs: BlendInputs, comm: Comm) -> _Pass:
    """Blocks of rotated sources, the evidence's preparations and each query's weights; collective."""
    both_ND = comm.sum(inputs.shard.pick(np.concatenate([queries.source, queries.target])))
    total, device, size = len(queries.source), both_ND.device, inputs.sizes.query_block
    asked, index_N = Asked.distinct(queries.source, queries.relation, queries.direction)
    blocks = []
    for start in range(0, total, size):
        # The last block is filled up with repeats of its first query: one shape, one compiled kernel.
        at = np.arange(start, start + size)
        at = np.where(at < total, at, start)
        sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction[at]).to(device, torch.float32)
        phase_QC = inputs.phase_of(torch.from_numpy(queries.relation[at]).to(device))
        at_Q = torch.from_numpy(at).to(device)
        query_QD = rotate(both_ND[at_Q], phase_QC, sign_Q)
        blocks.append(_Block(query_QD, at_Q, queries.take(slice(start, start + size)), index_N[at]))
    num_blocks = inputs.tables[0].shape[1] - len(inputs.evidence.terms)
    needed_PT = torch.stack([table[:, num_blocks:] for table in inputs.tables]).any(0).numpy()
    prepared = inputs.evidence.prepare(asked, needed_PT)
    place_N = torch.from_numpy(2 * queries.relation + queries.direction)
    unknown_N = ~both_ND[:total].any(1)
    weights = [table[place_N].to(device) for table in inputs.tables]
    tables = [(_of_model(one[:, :num_blocks], one[:, num_blocks:], unknown_N), one[:, num_blocks:]) for one in weights]
    return _Pass(blocks, index_N, both_ND, prepared, tables)


def _of_model(weight_NP: Tensor, weight_NF: Tensor, unknown_N: Tensor) -> Tensor:
    """Weights of the model's blocks: 0 for sources of which it has no vector, where evidence can answer instead.

    Distances from zeros would rank candidates by their lengths.
    """
    return torch.where((unknown_N & weight_NF.any(1))[:, None], 0.0, weight_NP)


def _own_biases(work: _Pass, evidence: Evidence, ids_N: np.ndarray, which: int) -> Tensor:
    """(T, N) biases of the candidates `ids_N`, one per query, that are this rank's; zeros for the others.

    Args:
        which: 0 where they are the sources, 1 where they are the targets.
    """
    total, device = len(ids_N), work.both_ND.device
    bias_TN = torch.zeros(len(work.tables), total, device=device)
    local_N = ids_N - evidence.first
    mine = np.flatnonzero((local_N >= 0) & (local_N < evidence.num_rows))
    at = torch.from_numpy(mine).to(device)
    row_P = local_N[mine]
    unknown_P = ~work.both_ND[which * total + at].any(1)
    known_P = evidence.known_r[torch.from_numpy(row_P).to(device)]
    for turn, (_, weight_NF) in enumerate(work.tables):
        bias_P = evidence.own_bias(weight_NF[at], work.prepared, work.index_N[mine], row_P)
        by_evidence_P = known_P & weight_NF[at].any(1)
        bias_TN[turn, at] = torch.where(unknown_P & ~by_evidence_P, LAST, bias_P)
    return bias_TN


def _put_last(bias_qn: Tensor, weight_qF: Tensor, unknown_n: Tensor, known_n: Tensor) -> None:
    """Set the biases of candidates that nothing is known of.

    Args:
        unknown_n: whether the model has no vector of the entity, only zeros.
        known_n: whether evidence knows it; that counts for queries whose blend has evidence.
    """
    unknown = torch.nonzero(unknown_n)[:, 0]
    if len(unknown):
        by_evidence_qu = known_n[unknown] & weight_qF.any(1)[:, None]
        bias_qn[:, unknown] = torch.where(by_evidence_qu, bias_qn[:, unknown], LAST)


def _count_rows(shard: RowShard, work: _Pass, target_TN: Tensor, inputs: BlendInputs, counts_T2N: Tensor) -> None:
    """Add the counts of all queries of the pass over some rows, under every table."""
    evidence, device = inputs.evidence, shard.z_rD.device
    rows = np.arange(len(shard.z_rD)) + shard.first - evidence.first
    unknown_r = ~shard.z_rD.any(1)
    known_r = evidence.known_r[shard.first - evidence.first :][: len(shard.z_rD)]
    for block in work.blocks:
        pairs = excluded(block.asked, inputs.known, shard.first, len(shard.z_rD))
        skip_query, skip_row = (torch.from_numpy(pair).to(device) for pair in pairs)
        # Queries of one source and place that ask for several targets share their terms.
        index_u, place_u, inverse_Q = np.unique(block.index_Q, return_index=True, return_inverse=True)
        which_Q = torch.from_numpy(inverse_Q.reshape(-1)).to(device)
        for turn, (model_NP, weight_NF) in enumerate(work.tables):
            weight_uF = weight_NF[block.at[torch.from_numpy(place_u).to(device)]]
            bias_ur = evidence.bias(weight_uF, work.prepared, index_u, rows)
            _put_last(bias_ur, weight_uF, unknown_r, known_r)
            weight_QP, target_Q = model_NP[block.at], target_TN[turn, block.at]
            given = CountInputs(block.query_QD, weight_QP, target_Q, shard.z_rD, bias_ur, which_Q, skip_query, skip_row)
            found_2Q = count_blended(given, inputs.sizes.tile_rows, inputs.sizes.compiled)
            asked = len(block.asked.source)
            counts_T2N[turn, :, block.at[:asked]] += found_2Q[:, :asked]
