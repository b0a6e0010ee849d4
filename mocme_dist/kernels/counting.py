"""Counts the entities that stand before a query's target, over one rank's rows, in three forms.

`count_tiles` is torch: a tile of entities at a time, plain or compiled, on any device. `count_native` is the kernel of
count.cpp for CPUs, `count_on_gpu` that of count_triton. All exclude pairs that do not compete. All compute the target's
distance by the arithmetic of the candidates' distances, so that equal vectors tie. All count a candidate as nearer if
one of the two distances is NaN, so that a diverged model ranks last.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from mocme_dist.kernels.builder import FOLDER, call, library
from mocme_dist.kernels.distance import has_kernels, pool_distance

# Queries per piece of the plain form, which stores (queries, tile, D).
PLAIN_QUERIES = 16


def target_distances(query_QD: Tensor, target_QD: Tensor, tile_rows: int, compiled: bool) -> Tensor:
    """(Q,) distances of the queries to their targets' vectors; arguments as for `count`."""
    kernels = kernels_for(query_QD, compiled)
    if kernels is not None:
        each_Q = torch.arange(len(query_QD))
        return pair_distances(query_QD, target_QD, each_Q, each_Q, kernels)
    if _has_gpu_kernels(query_QD, compiled):
        from mocme_dist.kernels import count_triton

        each_Q = torch.arange(len(query_QD), device=query_QD.device)
        return count_triton.pair_distances(query_QD, target_QD, each_Q, each_Q)
    padded_TD = torch.cat([target_QD, target_QD.new_zeros(tile_rows - len(query_QD), target_QD.shape[1])])
    return tile_distances(query_QD, padded_TD, compiled)[:, : len(query_QD)].diagonal().contiguous()


def count(
    query_QD: Tensor,
    target_Q: Tensor,
    rows_rD: Tensor,
    skip_query: Tensor,
    skip_row: Tensor,
    tile_rows: int,
    compiled: bool,
) -> Tensor:
    """(2, Q) int64: rows nearer to each query than its target, and rows as near; by the fastest form available.

    Args:
        query_QD: (Q, D) rotated sources.
        target_Q: from `target_distances`.
        rows_rD: (r, D) candidates.
        skip_query, skip_row: pairs that do not compete, ascending by row.
        tile_rows: candidates scored at once by `count_tiles`; at least Q.
        compiled: whether kernels may be built.
    """
    kernels = kernels_for(query_QD, compiled)
    if kernels is not None:
        return count_native(query_QD, target_Q, rows_rD, skip_query, skip_row, kernels)
    if _has_gpu_kernels(query_QD, compiled):
        return count_on_gpu(query_QD, target_Q, rows_rD, skip_query, skip_row)
    return count_tiles(query_QD, target_Q, rows_rD, skip_query, skip_row, tile_rows, compiled)


def kernels_for(query_QD: Tensor, compiled: bool) -> ctypes.CDLL | None:
    """Return the kernels of count.cpp if they can take these queries, else None."""
    return native_kernels() if compiled and query_QD.device.type == "cpu" else None


def _has_gpu_kernels(query_QD: Tensor, compiled: bool) -> bool:
    if not (compiled and query_QD.device.type == "cuda" and has_kernels("cuda")):
        return False
    from mocme_dist.kernels import count_triton  # torch's CPU build comes without Triton

    return count_triton.kernels_agree(query_QD.shape[1], query_QD.device)


def native_kernels(instructions: str | None = None) -> ctypes.CDLL | None:
    """Return the library of count.cpp, or None without a compiler. `instructions`: see `library`."""
    return library(FOLDER / "count.cpp", instructions)


def count_native(
    query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor, kernels: ctypes.CDLL
) -> Tensor:
    """`count` by the kernel: no distance is stored, and a sum stops once it is beyond the target."""
    query_QD, rows_rD = query_QD.float().contiguous(), rows_rD.float().contiguous()
    # Adjacent queries share a pass and stop together, so queries with near targets are put together.
    order_Q = target_Q.argsort()
    sorted_QD, sorted_Q = query_QD[order_Q], target_Q[order_Q]
    counts_2Q = torch.zeros(2, len(query_QD), dtype=torch.int64)
    sizes = (len(query_QD), len(rows_rD), query_QD.shape[1] // 2)
    call(kernels, "mocme_count", (sorted_QD, rows_rD, sorted_Q, counts_2Q), sizes, threads=torch.get_num_threads())
    counts_2Q[:, order_Q] = counts_2Q.clone()
    skipped = pair_distances(query_QD, rows_rD, skip_query, skip_row, kernels)
    return _leave_out(counts_2Q, skipped, target_Q, skip_query)


def count_on_gpu(query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor) -> Tensor:
    """`count` by the kernels of count_triton."""
    from mocme_dist.kernels import count_triton

    counts_2Q = count_triton.count_rows(query_QD, target_Q, rows_rD)
    return _leave_out(
        counts_2Q, count_triton.pair_distances(query_QD, rows_rD, skip_query, skip_row), target_Q, skip_query
    )


def pair_distances(query_QD: Tensor, rows_rD: Tensor, query_P: Tensor, row_P: Tensor, kernels: ctypes.CDLL) -> Tensor:
    """(P,) distances of pairs of a query and a row, bit for bit those that the counting kernel compares."""
    return block_pair_distances(query_QD, rows_rD, query_P, row_P, 1, kernels)[:, 0]


def block_pair_distances(
    query_QD: Tensor, rows_rD: Tensor, query_P: Tensor, row_P: Tensor, blocks: int, kernels: ctypes.CDLL
) -> Tensor:
    """(P, blocks) distances per block of the vectors: block i has coordinates [i C / blocks, (i + 1) C / blocks)."""
    query_QD, rows_rD = query_QD.float().contiguous(), rows_rD.float().contiguous()
    out_PC, query_P, row_P = torch.empty(len(query_P), blocks), query_P.contiguous(), row_P.contiguous()
    sizes = (query_QD.shape[1] // 2, blocks, len(query_P))
    arrays = (query_QD, rows_rD, query_P, row_P, out_PC)
    call(kernels, "mocme_pair_distances", arrays, sizes, threads=torch.get_num_threads())
    return out_PC


def _leave_out(counts_2Q: Tensor, skipped_P: Tensor, target_Q: Tensor, query_P: Tensor) -> Tensor:
    """Subtract the counts of pairs that do not compete."""
    counts_2Q[0].index_add_(0, query_P, -_nearer(skipped_P, target_Q[query_P]).long())
    counts_2Q[1].index_add_(0, query_P, -(skipped_P == target_Q[query_P]).long())
    return counts_2Q


def _nearer(distance: Tensor, target: Tensor) -> Tensor:
    return ~(distance >= target)  # and not "<": NaN counts as nearer


def count_tiles(
    query_QD: Tensor,
    target_Q: Tensor,
    rows_rD: Tensor,
    skip_query: Tensor,
    skip_row: Tensor,
    tile_rows: int,
    compiled: bool,
) -> Tensor:
    """`count` in torch. Distances come from one kernel of one shape, the target's too, so that equal vectors tie."""
    counts_2Q = torch.zeros(2, len(query_QD), dtype=torch.int64, device=rows_rD.device)
    skip_row = skip_row.contiguous()
    for start, count, tile_TD in tiles(rows_rD, tile_rows):
        distance_QT = tile_distances(query_QD, tile_TD, compiled)
        counts_2Q += _counts(distance_QT, target_Q, count)
        low, high = torch.searchsorted(skip_row, torch.tensor([start, start + count], device=skip_row.device)).tolist()
        at_query = skip_query[low:high]
        _leave_out(counts_2Q, distance_QT[at_query, skip_row[low:high] - start], target_Q, at_query)
    return counts_2Q


def _counts(distance_QT: Tensor, target_Q: Tensor, count: int) -> Tensor:
    """(2, Q) counts over the first `count` columns; the others are padding."""
    inside_T = torch.arange(distance_QT.shape[1], device=distance_QT.device) < count
    target_Q1 = target_Q[:, None]
    return torch.stack(
        [(_nearer(distance_QT, target_Q1) & inside_T).sum(1), ((distance_QT == target_Q1) & inside_T).sum(1)]
    )


def tile_distances(query_QD: Tensor, tile_TD: Tensor, compiled: bool) -> Tensor:
    """(Q, T) distances, by the fused kernel or by the plain form in small pieces."""
    if compiled:
        return pool_distance(query_QD[None], tile_TD[None], True)[0]
    pieces = [pool_distance(part[None], tile_TD[None], False)[0] for part in query_QD.split(PLAIN_QUERIES)]
    return torch.cat(pieces)


def tiles(rows_rD: Tensor, tile_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, number of rows, padded (tile_rows, D) vectors) over the rows."""
    for start in range(0, len(rows_rD), tile_rows):
        tile_TD = rows_rD[start : start + tile_rows]
        count = len(tile_TD)
        if count < tile_rows:
            tile_TD = torch.cat([tile_TD, tile_TD.new_zeros(tile_rows - count, tile_TD.shape[1])])
        yield start, count, tile_TD
