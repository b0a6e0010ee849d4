"""Counts the rows that stand before a query's target on CUDA, in Triton; the counterpart of count.cpp.

No distance is stored: a tile of queries stays in registers, and rows that stream by are compared and counted. Equal
vectors tie bit for bit only if both kernels add a pair's numbers in the same order. The compiler chooses that order
by the shape of the loads and by what it knows about addresses and sizes, so both kernels have the same loop, and
neither is told more than the other (`do_not_specialize`, `_aligned`). `kernels_agree` checks that it worked.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocme_dist.kernels.distance_triton import load_complex, sum_of_moduli, tile_of

log = logging.getLogger(__name__)

_TURNS, _UNROLL = 64, 2


@triton.jit(do_not_specialize=["Q", "r"])
def _count_kernel(  # type: ignore[no-untyped-def]
    query_QD,
    target_Q,
    rows_rD,
    counts_2Q,
    Q,
    r,
    C,
    TURNS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # One axis, because the others end at 65,535; neighbours read the same rows.
    turn, tile = tl.program_id(0) // tl.cdiv(Q, BLOCK), tl.program_id(0) % tl.cdiv(Q, BLOCK)
    first = turn.to(tl.int64) * TURNS
    at_Q, at_C = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)[None, :]
    place_Q = tl.minimum(at_Q, Q - 1)
    query_real, query_imag = load_complex(query_QD + place_Q[:, None].to(tl.int64) * 2 * C, C, at_C, EVEN)
    target_of_Q = tl.load(target_Q + place_Q)
    nearer_Q, equal_Q = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    row = rows_rD + first * 2 * C
    for _ in tl.range(first, min(first + TURNS, r), loop_unroll_factor=UNROLL):
        row_real, row_imag = load_complex(row, C, at_C, EVEN)
        found_Q = sum_of_moduli(query_real, query_imag, row_real, row_imag)
        nearer_Q += ((found_Q >= target_of_Q) == 0).to(tl.int32)  # not "<": NaN counts as nearer
        equal_Q += (found_Q == target_of_Q).to(tl.int32)
        row += 2 * C
    tl.atomic_add(counts_2Q + at_Q, nearer_Q, at_Q < Q)
    tl.atomic_add(counts_2Q + Q + at_Q, equal_Q, at_Q < Q)


@triton.jit(do_not_specialize=["P"])
def _pairs_kernel(  # type: ignore[no-untyped-def]
    query_QD,
    rows_rD,
    query_P,
    row_P,
    out_P,
    P,
    C,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # Each row is compared with the whole tile although only one query needs it: pairs are few, and a sum over another
    # shape could have other bits.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at_P, at_C = first + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)[None, :]
    place_Q = tl.load(query_P + tl.minimum(at_P, P - 1))
    query_real, query_imag = load_complex(query_QD + place_Q[:, None] * 2 * C, C, at_C, EVEN)
    for turn in tl.range(first, min(first + BLOCK, P), loop_unroll_factor=UNROLL):
        row_real, row_imag = load_complex(rows_rD + tl.load(row_P + turn) * 2 * C, C, at_C, EVEN)
        tl.store(out_P + at_P, sum_of_moduli(query_real, query_imag, row_real, row_imag), at_P == turn)


def _aligned(value: Tensor) -> Tensor:
    """Return the tensor contiguous and beginning at a multiple of 16 bytes, as newly allocated tensors do."""
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def count_rows(query_QD: Tensor, target_Q: Tensor, rows_rD: Tensor) -> Tensor:
    """(2, Q) int64: rows nearer to each query than its target, and rows as near; on CUDA."""
    query_QD, rows_rD, target_Q = _aligned(query_QD.float()), _aligned(rows_rD.float()), _aligned(target_Q)
    Q, (r, D) = len(query_QD), rows_rD.shape
    counts_2Q = torch.zeros(2, Q, dtype=torch.int32, device=rows_rD.device)
    if Q and r:
        tile = tile_of(D // 2)
        grid = (triton.cdiv(Q, tile["BLOCK"]) * triton.cdiv(r, _TURNS),)
        _count_kernel[grid](query_QD, target_Q, rows_rD, counts_2Q, Q, r, D // 2, TURNS=_TURNS, UNROLL=_UNROLL, **tile)
    return counts_2Q.long()


def pair_distances(query_QD: Tensor, rows_rD: Tensor, query_P: Tensor, row_P: Tensor) -> Tensor:
    """(P,) distances of pairs of a query and a row, bit for bit those that `count_rows` compares."""
    query_QD, rows_rD = _aligned(query_QD.float()), _aligned(rows_rD.float())
    query_P, row_P, D = _aligned(query_P), _aligned(row_P), query_QD.shape[1]
    out_P = query_QD.new_empty(len(query_P))
    if len(out_P):
        tile = tile_of(D // 2)
        grid = (triton.cdiv(len(out_P), tile["BLOCK"]),)
        _pairs_kernel[grid](query_QD, rows_rD, query_P, row_P, out_P, len(out_P), D // 2, UNROLL=_UNROLL, **tile)
    return out_P


@cache
def kernels_agree(width: int, device: torch.device) -> bool:
    """Return whether vectors of this width tie with themselves; another version of the compiler may break that."""
    gen = torch.Generator().manual_seed(0)
    query_QD, rows_rD = (torch.randn(64, width, generator=gen).to(device) for _ in range(2))
    each = torch.arange(64, device=device)
    counts_2Q = count_rows(query_QD, pair_distances(query_QD, rows_rD, each, each), rows_rD)
    agree = bool((counts_2Q[1] >= 1).all())
    if not agree:
        log.warning(
            "Triton %s gives a pair of vectors of width %d two distances: ranking without its kernels",
            triton.__version__,
            width,
        )
    return agree
