"""How many entities stand before a query's target: three ways to count them over one rank's rows.

`count_tiles` is torch: a tile of entities at a time, plain or compiled, on any device. `count_native` is the kernel of
count.cpp for CPUs, `count_on_gpu` that of count_triton. All leave out pairs that do not compete, all take the target's
distance from the arithmetic that the candidates' come from, so that equal vectors tie, and all count a candidate as
nearer where one of the two distances is NaN, so that a model that has diverged ranks last.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mocme_dist.model.native import library
from mocme_dist.model.pool import has_kernels, pool_distance

# The plain form of the kernel stores (queries, tile, D); so many queries at once bound it.
_PLAIN_QUERIES = 16


def target_distances(query_QD: Tensor, target_QD: Tensor, tile_rows: int, compiled: bool) -> Tensor:
    """(Q,) the distance of each query to its own target's vector; arguments as `count`."""
    kernels = _kernels_for(query_QD, compiled)
    if kernels is not None:
        each_Q = torch.arange(len(query_QD))
        return pair_distances(query_QD, target_QD, each_Q, each_Q, kernels)
    if _has_gpu_kernels(query_QD, compiled):
        from mocme_dist.evaluation import count_triton

        each_Q = torch.arange(len(query_QD), device=query_QD.device)
        return count_triton.pair_distances(query_QD, target_QD, each_Q, each_Q)
    padded_TD = torch.cat([target_QD, target_QD.new_zeros(tile_rows - len(query_QD), target_QD.shape[1])])
    return _distances(query_QD, padded_TD, compiled)[:, : len(query_QD)].diagonal().contiguous()


def count(
    query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor, tile_rows: int, compiled: bool
) -> Tensor:
    """(2, Q) int64: rows nearer to each query than its target, and rows as near; by the fastest way there is.

    Args:
        query_QD: (Q, D) rotated sources.
        target_Q: what `target_distances` gave.
        rows_rD: (r, D) candidates.
        skip_query, skip_row: pairs that do not compete, ascending by row.
        tile_rows: candidates scored at once by `count_tiles`; at least Q.
        compiled: whether kernels may be built.
    """
    kernels = _kernels_for(query_QD, compiled)
    if kernels is not None:
        return count_native(query_QD, target_Q, rows_rD, skip_query, skip_row, kernels)
    if _has_gpu_kernels(query_QD, compiled):
        return count_on_gpu(query_QD, target_Q, rows_rD, skip_query, skip_row)
    return count_tiles(query_QD, target_Q, rows_rD, skip_query, skip_row, tile_rows, compiled)


def _kernels_for(query_QD: Tensor, compiled: bool) -> ctypes.CDLL | None:
    return native_kernels() if compiled and query_QD.device.type == "cpu" else None


def _has_gpu_kernels(query_QD: Tensor, compiled: bool) -> bool:
    if not (compiled and query_QD.device.type == "cuda" and has_kernels("cuda")):
        return False
    from mocme_dist.evaluation import count_triton  # there is no Triton beside torch's CPU build

    return count_triton.kernels_agree(query_QD.shape[1], query_QD.device)


def native_kernels(instructions: str | None = None) -> ctypes.CDLL | None:
    """The library of count.cpp; None without a compiler. `instructions`: see `library`."""
    return library(Path(__file__).with_name("count.cpp"), instructions)


def count_native(query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor, kernels: ctypes.CDLL) -> Tensor:
    """`count` by the kernel: no distance is stored, and a sum that is beyond the target is not carried on."""
    query_QD, rows_rD = query_QD.float().contiguous(), rows_rD.float().contiguous()
    # Neighbours share a pass and stop together: those that stop early come first.
    order_Q = target_Q.argsort()
    sorted_QD, sorted_Q = query_QD[order_Q], target_Q[order_Q]
    counts_2Q = torch.zeros(2, len(query_QD), dtype=torch.int64)
    kernels.mocme_count(
        _pointer(sorted_QD),
        ctypes.c_int64(len(query_QD)),
        _pointer(rows_rD),
        ctypes.c_int64(len(rows_rD)),
        ctypes.c_int64(query_QD.shape[1] // 2),
        _pointer(sorted_Q),
        ctypes.c_int32(torch.get_num_threads()),
        _pointer(counts_2Q[0]),
        _pointer(counts_2Q[1]),
    )
    counts_2Q[:, order_Q] = counts_2Q.clone()
    skipped = pair_distances(query_QD, rows_rD, skip_query, skip_row, kernels)
    return _leave_out(counts_2Q, skipped, target_Q, skip_query)


def count_on_gpu(query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor) -> Tensor:
    """`count` by the kernels of count_triton."""
    from mocme_dist.evaluation import count_triton

    counts_2Q = count_triton.count_rows(query_QD, target_Q, rows_rD)
    return _leave_out(counts_2Q, count_triton.pair_distances(query_QD, rows_rD, skip_query, skip_row), target_Q, skip_query)


def pair_distances(query_QD: Tensor, rows_rD: Tensor, query_P: Tensor, row_P: Tensor, kernels: ctypes.CDLL) -> Tensor:
    """(P,) distances of pairs of a query and a row, bit for bit those that the counting kernel compares."""
    query_QD, rows_rD = query_QD.float().contiguous(), rows_rD.float().contiguous()
    out_P, query_P, row_P = torch.empty(len(query_P)), query_P.contiguous(), row_P.contiguous()
    kernels.mocme_pair_distances(
        _pointer(query_QD),
        _pointer(rows_rD),
        ctypes.c_int64(query_QD.shape[1] // 2),
        _pointer(query_P),
        _pointer(row_P),
        ctypes.c_int64(len(query_P)),
        ctypes.c_int32(torch.get_num_threads()),
        _pointer(out_P),
    )
    return out_P


def _pointer(value: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(value.data_ptr())


def _leave_out(counts_2Q: Tensor, skipped_P: Tensor, target_Q: Tensor, query_P: Tensor) -> Tensor:
    """Take back what pairs that do not compete have added."""
    counts_2Q[0].index_add_(0, query_P, -_nearer(skipped_P, target_Q[query_P]).long())
    counts_2Q[1].index_add_(0, query_P, -(skipped_P == target_Q[query_P]).long())
    return counts_2Q


def _nearer(distance: Tensor, target: Tensor) -> Tensor:
    return ~(distance >= target)  # and not "<": NaN counts as nearer


def count_tiles(
    query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor, skip_query: Tensor, skip_row: Tensor, tile_rows: int, compiled: bool
) -> Tensor:
    """`count` in torch. Distances come from one kernel of one shape, the target's too, so that equal vectors tie."""
    counts_2Q = torch.zeros(2, len(query_QD), dtype=torch.int64, device=rows_rD.device)
    skip_row = skip_row.contiguous()
    for start, count, tile_TD in _tiles(rows_rD, tile_rows):
        distance_QT = _distances(query_QD, tile_TD, compiled)
        counts_2Q += _counts(distance_QT, target_Q, count)
        low, high = torch.searchsorted(skip_row, torch.tensor([start, start + count], device=skip_row.device)).tolist()
        at_query = skip_query[low:high]
        _leave_out(counts_2Q, distance_QT[at_query, skip_row[low:high] - start], target_Q, at_query)
    return counts_2Q


def _counts(distance_QT: Tensor, target_Q: Tensor, count: int) -> Tensor:
    """(2, Q) counts over the first `count` columns; the others are filling."""
    inside_T = torch.arange(distance_QT.shape[1], device=distance_QT.device) < count
    target_Q1 = target_Q[:, None]
    return torch.stack([(_nearer(distance_QT, target_Q1) & inside_T).sum(1), ((distance_QT == target_Q1) & inside_T).sum(1)])


def _distances(query_QD: Tensor, tile_TD: Tensor, compiled: bool) -> Tensor:
    """(Q, T) distances, by the fused kernel or by the plain form in small pieces."""
    if compiled:
        return pool_distance(query_QD[None], tile_TD[None], True)[0]
    pieces = [pool_distance(part[None], tile_TD[None], False)[0] for part in query_QD.split(_PLAIN_QUERIES)]
    return torch.cat(pieces)


def _tiles(rows_rD: Tensor, tile_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, number of rows, padded (tile_rows, D) vectors) over the rows."""
    for start in range(0, len(rows_rD), tile_rows):
        tile_TD = rows_rD[start : start + tile_rows]
        count = len(tile_TD)
        if count < tile_rows:
            tile_TD = torch.cat([tile_TD, tile_TD.new_zeros(tile_rows - count, tile_TD.shape[1])])
        yield start, count, tile_TD
