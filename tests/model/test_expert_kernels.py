"""The experts' C++ kernels against their torch form: views and all gradients, in float32 and in bfloat16."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from mocme_dist.model import expert_kernels, native
from mocme_dist.model.experts import Experts

# Neighbours of a bfloat16 number are 2^-8 of it apart: rounding moves it by at most half of that.
HALF_DIGIT = 2**-9

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler: nothing builds the kernels")
needs_amx = pytest.mark.skipif(
    not expert_kernels.has_kernels(torch.zeros(1, 1, 32), "bfloat16"), reason="no AMX, or no compiler that knows it"
)

SHAPES = [(2, 3, 600, 32), (1, 1, 33, 64), (3, 2, 1, 32), (2, 2, 0, 32), (1, 2, 32, 96)]


def experts(M: int, K: int, D: int, residual: bool, **how: object) -> Experts:
    gen = torch.Generator().manual_seed(0)
    module = Experts(M, K, D, 0.0, residual, gen, **how)  # type: ignore[arg-type]
    with torch.no_grad():  # biases, and the second layers of residual experts, start at 0 and would hide a mistake
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=gen) * 0.1)
    return module


def run(module: Experts, U: int) -> list[Tensor]:
    """Views, and gradients of the inputs and of the parameters."""
    M, D, wide = module.first_MDH.shape
    gen = torch.Generator().manual_seed(1)
    leaf = torch.randn(M, U, D, generator=gen).requires_grad_()
    views = module(leaf)
    assert views.dtype == torch.float32
    (views * torch.randn(M, wide // D, U, D, generator=gen)).sum().backward()
    return [views.detach(), leaf.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2", "portable"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("M", "K", "U", "D"), SHAPES)
def test_built_for_float32_kernels_equal_torch(M, K, U, D, residual, instructions, monkeypatch):
    """The same code with float32 products: every index and every sum, without rounding in the way."""
    if instructions != "portable" and native.instruction_set() not in (instructions, "AVX512"):
        pytest.skip(f"this CPU has no {instructions}")
    found = native.library(expert_kernels._SOURCE, instructions)
    found.mocme_experts_pad.restype = ctypes.c_int64
    monkeypatch.setattr(expert_kernels, "_kernels", lambda precision: found)
    fast = run(experts(M, K, D, residual, precision="bfloat16", kernels=True), U)
    for value, expected in zip(fast, run(experts(M, K, D, residual), U), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@needs_amx
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("M", "K", "U", "D"), SHAPES)
def test_bfloat16_kernels_equal_torch_that_rounds_as_they_do(M, K, U, D, residual):
    plain, fast = (run(experts(M, K, D, residual, precision="bfloat16", kernels=how), U) for how in (False, True))
    for value, expected in zip(fast, plain, strict=True):
        # Torch rounds biases and outputs too, and a hidden unit near 0 turns on in one of the two.
        assert (value - expected).norm() <= 16 * HALF_DIGIT * expected.norm()


@needs_amx
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("M", "K", "U", "D"), SHAPES)
def test_products_in_three_parts_equal_float32(M, K, U, D, residual):
    plain, fast = (run(experts(M, K, D, residual, precision="bfloat16x3", kernels=how), U) for how in (False, True))
    assert (fast[0] - plain[0]).norm() <= 2e-5 * plain[0].norm()
    for value, expected in zip(fast, plain, strict=True):
        # A hidden unit nearer to 0 than the sums' last digit turns on in one of the two, and moves a gradient by all of its share.
        assert (value - expected).norm() <= 5e-3 * expected.norm()


@needs_amx
def test_threads_do_not_show():
    found = {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found[threads] = run(experts(2, 3, 32, True, precision="bfloat16", kernels=True), 700)
    finally:
        torch.set_num_threads(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(found[threads], found[1], strict=True))


def test_where_they_cannot_run_torch_does(monkeypatch):
    """Dropout, widths that fill no tile, evaluation, and float32."""
    monkeypatch.setattr(expert_kernels, "call", None)
    assert run(experts(1, 2, 6, False, precision="bfloat16", kernels=True), 5)
    assert run(experts(1, 2, 32, False, kernels=True), 5)
    assert run(experts(1, 2, 32, False, precision="bfloat16", kernels=True).eval(), 5)
    module = experts(1, 2, 32, False, precision="bfloat16", kernels=True)
    module.dropout.p = 0.5
    assert run(module, 5)
