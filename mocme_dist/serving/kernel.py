"""The k nearest of many rows to a few queries, in one pass over memory: scan.c, and its plain twin in numpy.

scan.c is compiled once with the C compiler of the machine and kept in the user's cache; ctypes lets go of the
interpreter's lock, so plain threads share the rows. Where no compiler is found, or it fails, numpy does the same
some ten times slower. Nothing here imports torch: a query must answer sooner than torch imports.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.compiled import build, first_of

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("scan.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TILE_NUMBERS = 1 << 18  # the plain twin's differences: 1 MiB of float32 stays in the second cache
_CHUNK_ROWS = 16384  # what a thread takes at once


class Nearest(NamedTuple):
    """The k nearest rows of Q queries, nearest first, equal distances by id; id -1 and distance inf where rows ran out."""

    distance_Qk: NDArray[np.float32]
    id_Qk: NDArray[np.int64]


class _Skip(NamedTuple):
    """Ids that do not come: those of query q are ids[offsets[q]:offsets[q + 1]], ascending."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]


def num_threads() -> int:
    """CPUs that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def nearest(
    parts: Sequence[NDArray[Any]],
    query_QD: NDArray[np.float32],
    k: int,
    compiled: bool = True,
    left_out: Sequence[NDArray[np.int64]] | None = None,
) -> Nearest:
    """The k rows of all parts that are nearest to each query.

    Args:
        parts: (n, D) float32 or float16 each, the rows of consecutive ids from 0; mapped files are read once.
        query_QD: (Q, D) float32, rotated sources.
        k: how many.
        compiled: the C kernel where it can be had, or the plain form.
        left_out: ascending ids for each query that are not to be found.

    Returns:
        min(k, rows) columns. A NaN distance is never among them.
    """
    k = min(k, sum(len(part) for part in parts))
    library = _library() if compiled else None
    pieces = _pieces(parts)
    skip = _flat(left_out if left_out is not None else [np.zeros(0, np.int64)] * len(query_QD))
    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        found = list(pool.map(lambda hand: _scan(library, hand, query_QD, k, skip), _hands(pieces)))
    distance = np.concatenate([heap for heap, _ in found] or [np.zeros((len(query_QD), 0), np.float32)], axis=1)
    ids = np.concatenate([ids for _, ids in found] or [np.zeros((len(query_QD), 0), np.int64)], axis=1)
    order = np.lexsort((ids, distance), axis=1)[:, :k]
    return Nearest(np.take_along_axis(distance, order, 1), np.take_along_axis(ids, order, 1))


def distances(rows_nD: NDArray[Any], query_QD: NDArray[np.float32], compiled: bool = True) -> NDArray[np.float32]:
    """(Q, n) distances of a few rows, by the arithmetic of `nearest`."""
    library = _library() if compiled else None
    if library is None or not library.knows(rows_nD):
        return _plain_distances(rows_nD, query_QD)
    out = np.empty((len(query_QD), len(rows_nD)), np.float32)
    library.distances(rows_nD, query_QD, out)
    return out


def _flat(left_out: Sequence[NDArray[np.int64]]) -> _Skip:
    """All ids in one array, and where those of each query begin."""
    offsets = np.cumsum([0, *map(len, left_out)], dtype=np.int64)
    return _Skip(np.concatenate([np.zeros(0, np.int64), *left_out]).astype(np.int64), offsets)


def _pieces(parts: Sequence[NDArray[Any]]) -> list[tuple[NDArray[Any], int]]:
    """(rows, id of the first) in chunks."""
    pieces, first = [], 0
    for part in parts:
        pieces += [(part[start : start + _CHUNK_ROWS], first + start) for start in range(0, len(part), _CHUNK_ROWS)]
        first += len(part)
    return pieces


def _hands(pieces: list[tuple[NDArray[Any], int]]) -> list[list[tuple[NDArray[Any], int]]]:
    """The chunks dealt to threads as contiguous runs: each then reads its own part of the file in order."""
    share = -(-len(pieces) // num_threads()) if pieces else 1
    return [pieces[start : start + share] for start in range(0, len(pieces), share)]


def _scan(
    library: _Library | None, pieces: list[tuple[NDArray[Any], int]], query_QD: NDArray[np.float32], k: int, skip: _Skip
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One thread's k nearest, unordered; one list runs through all its chunks, so its bound is tight from the second on."""
    Q = len(query_QD)
    heap, ids = np.full((Q, k), np.inf, np.float32), np.full((Q, k), -1, np.int64)
    for rows, first in pieces:
        if library is not None and library.knows(rows):
            library.nearest(rows, query_QD, first, heap, ids, skip)
        else:
            _plain_nearest(rows, query_QD, first, heap, ids, skip)
    return heap, ids


def _plain_distances(rows_nD: NDArray[Any], query_QD: NDArray[np.float32]) -> NDArray[np.float32]:
    C = rows_nD.shape[1] // 2
    out = np.empty((len(query_QD), len(rows_nD)), np.float32)
    step = max(1, _TILE_NUMBERS // max(1, 2 * C))
    for start in range(0, len(rows_nD), step):
        tile = np.asarray(rows_nD[start : start + step], np.float32)
        for q, query in enumerate(query_QD):
            difference = tile - query
            np.square(difference, out=difference)
            moduli = difference[:, :C] + difference[:, C:]
            out[q, start : start + step] = np.sqrt(moduli, out=moduli).sum(1)
    return out


def _plain_nearest(
    rows_nD: NDArray[Any], query_QD: NDArray[np.float32], first: int, heap: NDArray[np.float32], ids: NDArray[np.int64], skip: _Skip
) -> None:
    """What scan.c does, on whole chunks: the same k in any order."""
    distance = _plain_distances(rows_nD, query_QD)
    distance[np.isnan(distance)] = np.inf
    k = heap.shape[1]
    for q in range(len(query_QD)):
        own = skip.ids[skip.offsets[q] : skip.offsets[q + 1]]
        low, high = np.searchsorted(own, [first, first + len(rows_nD)])
        distance[q, own[low:high] - first] = np.inf
        both = np.concatenate([heap[q], distance[q]])
        who = np.concatenate([ids[q], np.where(np.isinf(distance[q]), -1, np.arange(first, first + len(rows_nD)))])
        kept = np.lexsort((who, both))[:k] if k else np.zeros(0, np.int64)
        heap[q], ids[q] = both[kept], who[kept]


# -- the compiled library


class _Library:
    """scan.c, loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.half = hasattr(self._library, "nearest_f16")

    def knows(self, rows: NDArray[Any]) -> bool:
        """Whether these rows can be given to it: contiguous, and of a type that it was built for."""
        return rows.flags.c_contiguous and (rows.dtype == np.float32 or (rows.dtype == np.float16 and self.half))

    def nearest(
        self,
        rows_nD: NDArray[Any],
        query_QD: NDArray[np.float32],
        first: int,
        heap: NDArray[np.float32],
        ids: NDArray[np.int64],
        skip: _Skip,
    ) -> None:
        """Bring a thread's lists up to date with some rows."""
        function = getattr(self._library, f"nearest_{'f32' if rows_nD.dtype == np.float32 else 'f16'}")
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        sizes = [ctypes.c_int64(size) for size in (len(rows_nD), rows_nD.shape[1] // 2)]
        more = [ctypes.c_int64(size) for size in (len(query_QD), heap.shape[1], first)]
        if heap.shape[1]:
            lists = [_address(array) for array in (heap, ids, skip.ids, skip.offsets)]
            function(_address(rows_nD), *sizes, _address(query_QD), *more, *lists)

    def distances(self, rows_nD: NDArray[Any], query_QD: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Fill `out` (Q, n)."""
        function = getattr(self._library, f"distances_{'f32' if rows_nD.dtype == np.float32 else 'f16'}")
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        sizes = [ctypes.c_int64(size) for size in (len(rows_nD), rows_nD.shape[1] // 2)]
        function(_address(rows_nD), *sizes, _address(query_QD), ctypes.c_int64(len(query_QD)), _address(out))


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _library() -> _Library | None:
    """The compiled kernel, built at the first call on this machine; None where it cannot be had."""
    compiler = first_of("cc", "gcc", "clang")
    if compiler is None:
        log.info("no C compiler is found: queries run in numpy, some ten times slower")
        return None
    try:
        return _Library(build(_SOURCE, compiler, _FLAGS, _cpu()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the query kernel cannot be built with %s (%s): queries run in numpy, some ten times slower", compiler, error)
        return None


def _cpu() -> bytes:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
