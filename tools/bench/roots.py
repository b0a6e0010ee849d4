"""How many square roots a second a GPU takes when it does nothing else: the ceiling of distances."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tools.bench.common import DEVICE, measure

_PROGRAMS, _LANES, _TURNS = 16_384, 512, 4096


@triton.jit
def _roots(out, TURNS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.arange(0, LANES).to(tl.float32) + tl.program_id(0)
    for _ in tl.range(0, TURNS, loop_unroll_factor=16):
        value = tl.sqrt(value)
    tl.store(out + tl.program_id(0), tl.sum(value, 0))


def roots_per_s() -> float:
    """Approximate float32 square roots, sixteen independent chains a thread."""
    out = torch.empty(_PROGRAMS, device=DEVICE)
    median_ms, _ = measure(lambda: _roots[(_PROGRAMS,)](out, TURNS=_TURNS, LANES=_LANES, num_warps=1), 2, 20)
    return _PROGRAMS * _LANES * _TURNS / median_ms * 1e3
