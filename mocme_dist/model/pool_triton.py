"""Distances of queries to a shared pool, and their gradients, on CUDA: what pool.cpp does on a CPU, in Triton.

A distance takes one square root a complex number, a gradient one reciprocal root: the unit that makes them, an eighth of
a multiprocessor's lanes, is the limit. So sums stay in registers, nothing but the result is written, and backward makes
the differences again, once for the queries and once for the candidates: a single pass would have to add across threads.

The operators are such that torch.compile sees through them: their kernels stand in its graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mocme_dist.model.rotate import TINY

_TINY = tl.constexpr(TINY)
# Complex numbers of a tile, and queries or rows that a program goes through: the fastest of those tried on an H200
# (tools/bench/RESULTS.md). One warp a program: more would meet at barriers.
TILE = 512
_TURNS, _UNROLL = 32, 1
_PULL_ROWS, _PULL_COLUMNS, _PULL_UNROLL = 4, 128, 2
# Programs enough to fill a GPU; with fewer, sums are made in parts.
_PROGRAMS, _PARTS = 2048, 8
# The axis of groups ends here on every GPU.
_GROUPS = 65_535


@triton.jit
def sum_of_moduli(left_real, left_imag, right_real, right_imag):  # type: ignore[no-untyped-def]
    """(n,) distances of (n, C) complex numbers, or of those that broadcast; fused where it says so, for equal bits everywhere."""
    real, imag = left_real - right_real, left_imag - right_imag
    return tl.sum(tl.sqrt(tl.fma(imag, imag, real * real)), 1)


@triton.jit
def load_complex(start, C, at_C, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Real and imaginary parts at pointers to the first column of each row; zeros behind column C, of which EVEN has none."""
    if EVEN:
        return tl.load(start + at_C), tl.load(start + C + at_C)
    return tl.load(start + at_C, at_C < C, 0.0), tl.load(start + C + at_C, at_C < C, 0.0)


def tile_of(C: int) -> dict[str, Any]:
    """Sizes of a tile of whole rows of C complex numbers: BLOCK rows, COLUMNS of them, EVEN where none is filling; one warp."""
    columns = triton.next_power_of_2(C)
    return {"BLOCK": max(1, TILE // columns), "COLUMNS": columns, "EVEN": columns == C, "num_warps": 1}


@triton.jit
def _distance_kernel(  # type: ignore[no-untyped-def]
    query_GbD,
    pool_GND,
    out_GbN,
    b,
    N,
    C,
    TURNS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of candidates stays in registers; queries pass by it."""
    group, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * TURNS
    at_N, at_C = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)[None, :]
    # Who is behind the last candidate takes its place, and writes nothing.
    pool = pool_GND + (group * N + tl.minimum(at_N, N - 1)[:, None]) * 2 * C
    pool_real, pool_imag = load_complex(pool, C, at_C, EVEN)
    query, out = query_GbD + (group * b + first) * 2 * C, out_GbN + (group * b + first) * N + at_N
    for _ in tl.range(first, min(first + TURNS, b), loop_unroll_factor=UNROLL):
        query_real, query_imag = load_complex(query, C, at_C, EVEN)
        tl.store(out, sum_of_moduli(query_real, query_imag, pool_real, pool_imag), at_N < N)
        query += 2 * C
        out += N


@triton.jit
def _pull_kernel(  # type: ignore[no-untyped-def]
    here_GRD,
    there_GSD,
    slope_GSR,
    out_TGRD,
    R,
    S,
    C,
    TURNS,
    COLUMN_BLOCKS,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Sum over s of slope * (x - y) / |x - y| for rows x of `here` and y of `there`; out has T parts of the sum, TURNS rows each."""
    group, part = tl.program_id(2).to(tl.int64), tl.program_id(1) // COLUMN_BLOCKS
    at_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at_C = (tl.program_id(1) % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows behind the last one take its place, and write nothing; where there are none, their slopes are loaded together.
    row_R, inside_C = at_R if WHOLE else tl.minimum(at_R, R - 1), at_C < C
    place = (group * R + row_R[:, None]) * 2 * C + at_C[None, :]
    here_real, here_imag = tl.load(here_GRD + place, inside_C[None, :], 0.0), tl.load(here_GRD + place + C, inside_C[None, :], 0.0)
    first = part * TURNS
    there, slope = there_GSD + (group * S + first) * 2 * C, slope_GSR + (group * S + first) * R + row_R
    sum_real, sum_imag = tl.zeros((BLOCK, COLUMNS), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for _ in tl.range(first, min(first + TURNS, S), loop_unroll_factor=UNROLL):
        there_real, there_imag = load_complex(there, C, at_C, EVEN)
        real, imag = here_real - there_real[None, :], here_imag - there_imag[None, :]
        scaled = tl.load(slope)[:, None] * tl.rsqrt(tl.fma(imag, imag, tl.fma(real, real, _TINY)))
        sum_real = tl.fma(scaled, real, sum_real)
        sum_imag = tl.fma(scaled, imag, sum_imag)
        there += 2 * C
        slope += R
    out = out_TGRD + part.to(tl.int64) * tl.num_programs(2) * R * 2 * C + place
    inside = (at_R < R)[:, None] & inside_C[None, :]
    tl.store(out, sum_real, inside)
    tl.store(out + C, sum_imag, inside)


@triton_op("mocme_dist::pool_distance_cuda", mutates_args={})
def distance_to_pool(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances of float32 queries (G, b, D) and candidates (G, N, D) on CUDA."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    out_GbN = query_GbD.new_empty(G, b, N)
    if out_GbN.numel():
        query_GbD, pool_GND, tile = query_GbD.contiguous(), pool_GND.contiguous(), tile_of(D // 2)
        grid = (triton.cdiv(N, tile["BLOCK"]), triton.cdiv(b, _TURNS), G)
        wrap_triton(_distance_kernel)[grid](query_GbD, pool_GND, out_GbN, b, N, D // 2, TURNS=_TURNS, UNROLL=_UNROLL, **tile)
    return out_GbN


@triton_op("mocme_dist::pool_pull_cuda", mutates_args={})
def pull(query_GbD: Tensor, pool_GND: Tensor, slope_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (G, b, D) of the queries and (G, N, D) of the candidates from those of the distances."""
    query_GbD, pool_GND = query_GbD.contiguous(), pool_GND.contiguous()
    return _pull_one(query_GbD, pool_GND, slope_GbN.mT.contiguous()), _pull_one(pool_GND, query_GbD, slope_GbN.contiguous())


def _pull_one(here_GRD: Tensor, there_GSD: Tensor, slope_GSR: Tensor) -> Tensor:
    """(G, R, D) gradient of `here`, whose rows are next to each other in the slopes: a program takes several at once."""
    (G, R, D), S = here_GRD.shape, there_GSD.shape[1]
    if not (R and S):
        return torch.zeros_like(here_GRD)
    C = D // 2
    columns = min(_PULL_COLUMNS, triton.next_power_of_2(C))
    blocks, rows = triton.cdiv(C, columns), triton.cdiv(R, _PULL_ROWS)
    parts = max(1, min(_PARTS, _PROGRAMS // (G * rows * blocks), S // 16))
    turns = triton.cdiv(S, parts)
    out_TGRD = here_GRD.new_empty(triton.cdiv(S, turns), G, R, D)
    sizes = {
        "UNROLL": _PULL_UNROLL,
        "BLOCK": _PULL_ROWS,
        "COLUMNS": columns,
        "EVEN": C % columns == 0,
        "WHOLE": R % _PULL_ROWS == 0,
        "num_warps": 1,
    }
    grid = (rows, len(out_TGRD) * blocks, G)  # neighbours read the same rows of `there`
    wrap_triton(_pull_kernel)[grid](here_GRD, there_GSD, slope_GSR, out_TGRD, R, S, C, turns, blocks, **sizes)
    return out_TGRD.sum(0) if len(out_TGRD) > 1 else out_TGRD[0]


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


distance_to_pool.register_autograd(lambda ctx, slope_GbN: pull(*ctx.saved_tensors, slope_GbN), setup_context=_save_inputs)


def distance_to_pools(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """`distance_to_pool` of any number of groups: a large batch with a pool for each query has more than one launch takes."""
    if len(query_GbD) <= _GROUPS:
        return distance_to_pool(query_GbD, pool_GND)
    parts = zip(query_GbD.split(_GROUPS), pool_GND.split(_GROUPS), strict=True)
    return torch.cat([distance_to_pool(query_gbD, pool_gND) for query_gbD, pool_gND in parts])
