"""The k nearest of many rows to a few queries in one pass over memory: the kernel of scan.cpp, and a plain form.

ctypes releases the interpreter's lock during a call, so plain threads share the rows. Nothing here imports torch
unless no kernel can be built: a query must answer sooner than torch imports. Without a kernel, torch computes the
distances, some ten times slower.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.kernels.builder import FOLDER, call, library

_TILE_NUMBERS = 1 << 18  # the plain form's differences: 1 MiB of float32 stays in the second cache
_CHUNK_ROWS = 16384  # rows per call of the kernel
_TYPES = (np.float32, np.float16)

Chunk = tuple[NDArray[Any], int]  # rows, and the id of the first


class Nearest(NamedTuple):
    """The k nearest rows of Q queries, nearest first, ties by id; id -1 and distance inf where there are no more."""

    distance_Qk: NDArray[np.float32]
    id_Qk: NDArray[np.int64]


class _Skip(NamedTuple):
    """Excluded ids: those of query q are ids[offsets[q]:offsets[q + 1]], ascending."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]


def num_threads() -> int:
    """Return the number of CPUs that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def nearest(
    parts: Sequence[NDArray[Any]],
    query_QD: NDArray[np.float32],
    k: int,
    compiled: bool = True,
    left_out: Sequence[NDArray[np.int64]] | None = None,
) -> Nearest:
    """Return the k rows of all parts that are nearest to each query.

    Args:
        parts: (n, D) float32 or float16 each, the rows of consecutive ids from 0; mapped files are read once.
        query_QD: (Q, D) float32, rotated sources.
        k: rows per query.
        compiled: use the kernel where it can be built, or the plain form.
        left_out: ascending ids to exclude, for each query.

    Returns:
        min(k, rows) columns. A NaN distance is never among them.
    """
    k = min(k, sum(len(part) for part in parts))
    kernels = _kernels(compiled)
    query_QD = np.ascontiguousarray(query_QD, np.float32)
    skip = _flat(left_out if left_out is not None else [np.zeros(0, np.int64)] * len(query_QD))

    def scan(chunks: list[Chunk]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return _scan(kernels, chunks, query_QD, k, skip)

    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        found = list(pool.map(scan, _shares(_chunks(parts))))
    distance = np.concatenate([heap for heap, _ in found] or [np.zeros((len(query_QD), 0), np.float32)], axis=1)
    ids = np.concatenate([ids for _, ids in found] or [np.zeros((len(query_QD), 0), np.int64)], axis=1)
    order = np.lexsort((ids, distance), axis=1)[:, :k]
    return Nearest(np.take_along_axis(distance, order, 1), np.take_along_axis(ids, order, 1))


def distances(rows_nD: NDArray[Any], query_QD: NDArray[np.float32], compiled: bool = True) -> NDArray[np.float32]:
    """Return the (Q, n) distances of a few rows, computed as `nearest` computes them."""
    kernels = _kernels(compiled)
    if kernels is None or not _fits(rows_nD):
        return _plain_distances(rows_nD, query_QD)
    out_Qn = np.empty((len(query_QD), len(rows_nD)), np.float32)
    arrays = (rows_nD, np.ascontiguousarray(query_QD, np.float32), out_Qn)
    sizes = (len(rows_nD), rows_nD.shape[1] // 2, len(query_QD))
    call(kernels, f"mocme_distances_{rows_nD.dtype}", arrays, sizes)
    return out_Qn


def _kernels(compiled: bool) -> ctypes.CDLL | None:
    return library(FOLDER / "scan.cpp") if compiled else None


def _fits(rows: NDArray[Any]) -> bool:
    """Return whether the kernel can take these rows."""
    return rows.flags.c_contiguous and rows.dtype in _TYPES


def _flat(left_out: Sequence[NDArray[np.int64]]) -> _Skip:
    """Return all ids in one array, and where those of each query begin."""
    offsets = np.cumsum([0, *map(len, left_out)], dtype=np.int64)
    return _Skip(np.concatenate([np.zeros(0, np.int64), *left_out]).astype(np.int64), offsets)


def _chunks(parts: Sequence[NDArray[Any]]) -> list[Chunk]:
    chunks, first = list[Chunk](), 0
    for part in parts:
        chunks += [(part[start : start + _CHUNK_ROWS], first + start) for start in range(0, len(part), _CHUNK_ROWS)]
        first += len(part)
    return chunks


def _shares(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Return contiguous runs of chunks, one per thread: each thread reads its part of a file in order."""
    size = -(-len(chunks) // num_threads()) if chunks else 1
    return [chunks[start : start + size] for start in range(0, len(chunks), size)]


def _scan(
    kernels: ctypes.CDLL | None, chunks: list[Chunk], query_QD: NDArray[np.float32], k: int, skip: _Skip
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return one thread's k nearest, unordered; one list for all chunks keeps the bound tight."""
    Q = len(query_QD)
    heap_Qk, ids_Qk = np.full((Q, k), np.inf, np.float32), np.full((Q, k), -1, np.int64)
    for rows, first in chunks:
        if kernels is None or not _fits(rows):
            _plain_nearest(rows, query_QD, first, heap_Qk, ids_Qk, skip)
        elif k:
            arrays = (rows, query_QD, heap_Qk, ids_Qk, skip.ids, skip.offsets)
            call(kernels, f"mocme_nearest_{rows.dtype}", arrays, (len(rows), rows.shape[1] // 2, Q, k, first))
    return heap_Qk, ids_Qk


def _plain_distances(rows_nD: NDArray[Any], query_QD: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch  # slow to import; the kernel does without it

    from mocme_dist.kernels.distance import distance

    query_Q1D = torch.from_numpy(np.ascontiguousarray(query_QD, np.float32))[:, None]
    step = max(1, _TILE_NUMBERS // max(1, query_QD.size))
    pieces = [np.zeros((len(query_QD), 0), np.float32)]
    for start in range(0, len(rows_nD), step):
        tile_nD = torch.from_numpy(np.array(rows_nD[start : start + step], np.float32))
        pieces.append(distance(query_Q1D, tile_nD).numpy())
    return np.concatenate(pieces, axis=1)


def _plain_nearest(
    rows_nD: NDArray[Any],
    query_QD: NDArray[np.float32],
    first: int,
    heap_Qk: NDArray[np.float32],
    ids_Qk: NDArray[np.int64],
    skip: _Skip,
) -> None:
    """Update the lists as the kernel does: the same k in any order."""
    distance_Qn = _plain_distances(rows_nD, query_QD)
    distance_Qn[np.isnan(distance_Qn)] = np.inf
    k = heap_Qk.shape[1]
    for q in range(len(query_QD)):
        excluded = skip.ids[skip.offsets[q] : skip.offsets[q + 1]]
        low, high = np.searchsorted(excluded, [first, first + len(rows_nD)])
        distance_Qn[q, excluded[low:high] - first] = np.inf
        distance = np.concatenate([heap_Qk[q], distance_Qn[q]])
        new = np.where(np.isinf(distance_Qn[q]), -1, np.arange(first, first + len(rows_nD)))
        ids = np.concatenate([ids_Qk[q], new])
        kept = np.lexsort((ids, distance))[:k]
        heap_Qk[q], ids_Qk[q] = distance[kept], ids[kept]
