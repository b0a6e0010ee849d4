"""The RotatE distance in Triton: distances of queries to a shared pool, and their gradients, on CUDA.

The counterpart of distance.cpp. A distance takes one square root per complex number, a gradient one reciprocal root;
the unit that computes them, an eighth of a multiprocessor's lanes, is the limit. So sums stay in registers, only the
result is written, and backward recomputes the differences, once for the queries and once for the candidates: a single
pass would have to add across threads.

torch.compile sees through these operators, so their kernels are part of its graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mocme_dist.kernels.distance import TINY, save_inputs

_TINY = tl.constexpr(TINY)
# Complex numbers per tile, and queries or rows per program: the fastest of those tried on an H200. One warp per
# program, because more would wait for each other at barriers.
TILE = 512
_TURNS, _UNROLL = 32, 1
_BACKWARD_ROWS, _BACKWARD_COLUMNS, _BACKWARD_UNROLL = 4, 128, 2
# Programs that fill a GPU; with fewer, sums are computed in parts.
_PROGRAMS, _PARTS = 2048, 8
# The largest size of a grid's third axis.
_GROUPS = 65_535


@triton.jit
def sum_of_moduli(left_real, left_imag, right_real, right_imag):  # type: ignore[no-untyped-def]
    """(n,) distances of (n, C) complex numbers; shapes may broadcast. Explicit fma makes bits equal everywhere."""
    real, imag = left_real - right_real, left_imag - right_imag
    return tl.sum(tl.sqrt(tl.fma(imag, imag, real * real)), 1)


@triton.jit
def inverse_modulus(real, imag):  # type: ignore[no-untyped-def]
    """1 / |real + i imag|, elementwise: what the derivative of the modulus by either part is divided by."""
    return tl.rsqrt(tl.fma(imag, imag, tl.fma(real, real, _TINY)))


@triton.jit
def load_complex(start, C, at_C, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Real and imaginary parts at pointers to each row's first column; zeros behind column C. EVEN: no such column."""
    if EVEN:
        return tl.load(start + at_C), tl.load(start + C + at_C)
    return tl.load(start + at_C, at_C < C, 0.0), tl.load(start + C + at_C, at_C < C, 0.0)


def tile_of(C: int) -> dict[str, Any]:
    """Sizes of a tile of BLOCK whole rows of C complex numbers in COLUMNS; EVEN: no column is padding."""
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
    """A tile of candidates stays in registers; queries stream by."""
    group, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * TURNS
    at_N, at_C = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)[None, :]
    # Lanes behind the last candidate read it; their stores are masked.
    pool = pool_GND + (group * N + tl.minimum(at_N, N - 1)[:, None]) * 2 * C
    pool_real, pool_imag = load_complex(pool, C, at_C, EVEN)
    query, out = query_GbD + (group * b + first) * 2 * C, out_GbN + (group * b + first) * N + at_N
    for _ in tl.range(first, min(first + TURNS, b), loop_unroll_factor=UNROLL):
        query_real, query_imag = load_complex(query, C, at_C, EVEN)
        tl.store(out, sum_of_moduli(query_real, query_imag, pool_real, pool_imag), at_N < N)
        query += 2 * C
        out += N


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    here_GRD,
    there_GSD,
    grad_out_GSR,
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
    """Sum over s of grad_out (x - y) / |x - y| for rows x of `here` and y of `there`, in T parts of TURNS rows each."""
    group, part = tl.program_id(2).to(tl.int64), tl.program_id(1) // COLUMN_BLOCKS
    at_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at_C = (tl.program_id(1) % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    # Lanes behind the last row read it; their stores are masked. WHOLE: there are none, and loads can be vectorised.
    row_R, inside_C = at_R if WHOLE else tl.minimum(at_R, R - 1), at_C < C
    place = (group * R + row_R[:, None]) * 2 * C + at_C[None, :]
    here_real, here_imag = (
        tl.load(here_GRD + place, inside_C[None, :], 0.0),
        tl.load(here_GRD + place + C, inside_C[None, :], 0.0),
    )
    first = part * TURNS
    there, grad_out = there_GSD + (group * S + first) * 2 * C, grad_out_GSR + (group * S + first) * R + row_R
    sum_real, sum_imag = tl.zeros((BLOCK, COLUMNS), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for _ in tl.range(first, min(first + TURNS, S), loop_unroll_factor=UNROLL):
        there_real, there_imag = load_complex(there, C, at_C, EVEN)
        real, imag = here_real - there_real[None, :], here_imag - there_imag[None, :]
        scaled = tl.load(grad_out)[:, None] * inverse_modulus(real, imag)
        sum_real = tl.fma(scaled, real, sum_real)
        sum_imag = tl.fma(scaled, imag, sum_imag)
        there += 2 * C
        grad_out += R
    out = out_TGRD + part.to(tl.int64) * tl.num_programs(2) * R * 2 * C + place
    inside = (at_R < R)[:, None] & inside_C[None, :]
    tl.store(out, sum_real, inside)
    tl.store(out + C, sum_imag, inside)


@triton_op("mocme_dist::distance_to_pool_cuda", mutates_args={})
def distance_to_pool(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """(G, b, N) distances of float32 queries (G, b, D) and candidates (G, N, D) on CUDA."""
    (G, b, D), N = query_GbD.shape, pool_GND.shape[1]
    out_GbN = query_GbD.new_empty(G, b, N)
    if out_GbN.numel():
        query_GbD, pool_GND, tile = query_GbD.contiguous(), pool_GND.contiguous(), tile_of(D // 2)
        grid = (triton.cdiv(N, tile["BLOCK"]), triton.cdiv(b, _TURNS), G)
        wrap_triton(_distance_kernel)[grid](
            query_GbD, pool_GND, out_GbN, b, N, D // 2, TURNS=_TURNS, UNROLL=_UNROLL, **tile
        )
    return out_GbN


@triton_op("mocme_dist::distance_to_pool_backward_cuda", mutates_args={})
def distance_to_pool_backward(query_GbD: Tensor, pool_GND: Tensor, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (G, b, D) of the queries and (G, N, D) of the candidates from those of the distances."""
    query_GbD, pool_GND = query_GbD.contiguous(), pool_GND.contiguous()
    grad_query_GbD = _backward_one(query_GbD, pool_GND, grad_out_GbN.mT.contiguous())
    return grad_query_GbD, _backward_one(pool_GND, query_GbD, grad_out_GbN.contiguous())


def _backward_one(here_GRD: Tensor, there_GSD: Tensor, grad_out_GSR: Tensor) -> Tensor:
    """(G, R, D) gradient of `here`, whose rows are adjacent in `grad_out`: a program takes several at once."""
    (G, R, D), S = here_GRD.shape, there_GSD.shape[1]
    if not (R and S):
        return torch.zeros_like(here_GRD)
    C = D // 2
    columns = min(_BACKWARD_COLUMNS, triton.next_power_of_2(C))
    blocks, rows = triton.cdiv(C, columns), triton.cdiv(R, _BACKWARD_ROWS)
    parts = max(1, min(_PARTS, _PROGRAMS // (G * rows * blocks), S // 16))
    turns = triton.cdiv(S, parts)
    out_TGRD = here_GRD.new_empty(triton.cdiv(S, turns), G, R, D)
    sizes = {
        "UNROLL": _BACKWARD_UNROLL,
        "BLOCK": _BACKWARD_ROWS,
        "COLUMNS": columns,
        "EVEN": C % columns == 0,
        "WHOLE": R % _BACKWARD_ROWS == 0,
        "num_warps": 1,
    }
    grid = (rows, len(out_TGRD) * blocks, G)  # neighbours read the same rows of `there`
    wrap_triton(_backward_kernel)[grid](here_GRD, there_GSD, grad_out_GSR, out_TGRD, R, S, C, turns, blocks, **sizes)
    return out_TGRD.sum(0) if len(out_TGRD) > 1 else out_TGRD[0]


def _backward(ctx: Any, grad_out_GbN: Tensor) -> tuple[Tensor, Tensor]:
    return distance_to_pool_backward(*ctx.saved_tensors, grad_out_GbN)


distance_to_pool.register_autograd(_backward, setup_context=save_inputs)


def distance_to_pools(query_GbD: Tensor, pool_GND: Tensor) -> Tensor:
    """`distance_to_pool` for any number of groups; a batch with a pool per query can exceed one launch's limit."""
    if len(query_GbD) <= _GROUPS:
        return distance_to_pool(query_GbD, pool_GND)
    parts = zip(query_GbD.split(_GROUPS), pool_GND.split(_GROUPS), strict=True)
    return torch.cat([distance_to_pool(query_gbD, pool_gND) for query_gbD, pool_gND in parts])
