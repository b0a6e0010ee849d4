"""MINE's C++ kernels against its torch form: estimates, loss, moving averages and gradients, in float32 and in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mocme_dist.model import native, statistics
from mocme_dist.model.mine import Mine, MineEstimate, pairs_between, pairs_within
from mocme_dist.model.mocme import alone

# Neighbours of a bfloat16 number are 2^-8 of it apart: rounding moves it by at most half of that.
HALF_DIGIT = 2**-9

pytestmark = pytest.mark.skipif(not statistics.has_kernels(torch.zeros(1), "float32"), reason="no C++ compiler: nothing builds the kernels")
needs_amx = pytest.mark.skipif(not statistics.has_kernels(torch.zeros(1), "bfloat16"), reason="no AMX, or no compiler that knows it")


def case(S: int, V: int, D: int, share: float = 0.8) -> tuple[Tensor, Tensor, Tensor]:
    """Views with a mean and a deviation, who has them, and a random half of the rows."""
    gen = torch.Generator().manual_seed(V)
    return torch.randn(S, V, D, generator=gen) * 2 + 1, torch.rand(S, V, generator=gen) < share, torch.rand(V, generator=gen) < 0.5


def mine(S: int, pairs: list[tuple[int, int]], D: int, H: int, kernels: bool, precision: str = "float32") -> Mine:
    gen = torch.Generator().manual_seed(0)
    module = Mine(S, pairs, D, H, gen, kernels=kernels, precision=precision)
    with torch.no_grad():
        module.networks.last_PH.mul_(10)
        for bias in (module.networks.first_bias_PH, module.networks.second_bias_PH):
            bias.add_(torch.randn(bias.shape, generator=gen) * 0.3)
        module.center_SD.add_(torch.randn(S, D, generator=gen))
        module.deviation_SD.add_(torch.rand(S, D, generator=gen))
    return module


def run(
    module: Mine, view: Tensor, present: Tensor, held_out: Tensor, bounded: bool, clip: float = 1.5
) -> tuple[MineEstimate, dict[str, Tensor]]:
    """The estimate, and gradients and buffers by name."""
    found = module(view, present, held_out, alone, bounded, clip)
    found.loss.backward()
    return found, {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())


def run_twins(
    S: int, pairs: list[tuple[int, int]], V: int, D: int, H: int, bounded: bool, precision: str
) -> list[tuple[MineEstimate, dict[str, Tensor]]]:
    """What `run` gives of the torch form and of the kernels."""
    return [run(mine(S, pairs, D, H, kernels, precision), *case(S, V, D), bounded) for kernels in (False, True)]


PRECISIONS = ["float32", *(pytest.param(name, marks=needs_amx) for name in ("bfloat16x3", "bfloat16"))]
SHAPES = [
    pytest.param(9, pairs_within(3, 3), 257, 37, 64, id="experts"),
    pytest.param(3, pairs_between(3), 100, 16, 5, id="modalities, narrow"),
    pytest.param(4, [(3, 0), (1, 2), (2, 3), (1, 3), (0, 3)], 63, 70, 40, id="pairs in any order"),
    pytest.param(2, [(0, 1)], 3, 4, 8, id="less rows than a block"),
    pytest.param(2, [(0, 1)], 1, 4, 8, id="one row"),
    pytest.param(2, [(0, 1)], 0, 4, 8, id="no row"),
]


@pytest.mark.parametrize("instructions", [None, "AVX2", "portable"])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(("S", "pairs", "V", "D", "H"), SHAPES)
def test_kernels_equal_torch(S, pairs, V, D, H, bounded, instructions, monkeypatch):
    """Ragged presence, a view that hardly anybody has, T beyond the clip, sizes that fill no block."""
    if instructions == "AVX2" and native.instruction_set() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    if instructions:
        found = native.library(statistics._SOURCE, instructions)
        found.mocme_mine_pad.restype = statistics.ctypes.c_int64
        monkeypatch.setattr(statistics, "_kernels", lambda _: found)
    view, present, held_out = case(S, V, D)
    present[-1, 1:] = False
    (plain, expected), (fast, found) = (run(mine(S, pairs, D, H, kernels), view, present, held_out, bounded) for kernels in (False, True))
    for name, value in plain._asdict().items():
        torch.testing.assert_close(getattr(fast, name), value, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Joint and marginal rows pull against each other: what is left may be small beside either.
        atol = 1e-5 * max(1.0, float(value.abs().max())) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@needs_amx
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(("S", "pairs", "V", "D", "H"), SHAPES)
def test_bfloat16_kernels_equal_torch_that_rounds_as_they_do(S, pairs, V, D, H, bounded):
    """Both round views, weights, side products and hidden units; they differ where a sum's last digit tips a rounding."""
    (plain, expected), (fast, found) = run_twins(S, pairs, V, D, H, bounded, "bfloat16")
    torch.testing.assert_close(fast.information_P, plain.information_P, rtol=HALF_DIGIT, atol=HALF_DIGIT)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=HALF_DIGIT, atol=HALF_DIGIT)
    assert torch.equal(fast.valid_P, plain.valid_P)
    for name, value in expected.items():
        # Views, sides, hidden units, weights and slopes are rounded, and a hidden unit near 0 turns on in one of the two.
        assert (found[name].double() - value).norm() <= 16 * HALF_DIGIT * max(float(value.double().norm()), 1.0), name


@needs_amx
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(("S", "pairs", "V", "D", "H"), SHAPES)
def test_products_in_three_parts_equal_float32(S, pairs, V, D, H, bounded):
    """A number loses what is below 2^-17 of it, a product what is below 2^-16."""
    (plain, expected), (fast, found) = run_twins(S, pairs, V, D, H, bounded, "bfloat16x3")
    torch.testing.assert_close(fast.information_P, plain.information_P, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-4, atol=1e-4)
    for name, value in expected.items():
        # A hidden unit nearer to 0 than that turns on in one of the two, and moves its column of a gradient by all of its share.
        apart = (found[name].double() - value).abs().flatten()
        if value.numel():
            assert apart.quantile(0.8) <= 1e-4 * max(float(value.abs().max()), 1.0), name
        assert apart.norm() <= 0.05 * max(float(value.double().norm()), 1.0), name


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_amx)])
def test_bfloat16_estimates_what_float32_does(kernels):
    S, pairs, V, D, H = 9, pairs_within(3, 3), 900, 40, 64
    view, present, held_out = case(S, V, D)
    exact, expected = run(mine(S, pairs, D, H, False), view, present, held_out, True, 10.0)
    rounded, found = run(mine(S, pairs, D, H, kernels, "bfloat16"), view, present, held_out, True, 10.0)
    # T is a sum over hidden units whose rounding errors are independent, and an estimate a mean over 400 rows.
    torch.testing.assert_close(rounded.information_P, exact.information_P, rtol=4 * HALF_DIGIT, atol=4 * HALF_DIGIT)
    torch.testing.assert_close(rounded.log_mean_exp_P, exact.log_mean_exp_P, rtol=4 * HALF_DIGIT, atol=4 * HALF_DIGIT)
    for name, _ in mine(S, pairs, D, H, False).named_parameters():
        # A rounded sum near 0 turns a hidden unit on or off, so gradients differ by more than their digits.
        assert (found[name] - expected[name]).norm() <= 0.1 * expected[name].norm(), name
    for name in ("center_SD", "deviation_SD"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [torch.float32, pytest.param(torch.bfloat16, marks=needs_amx)])
def test_views_and_parameters_may_be_bfloat16(own):
    """As the experts and as DeepSpeed give them."""
    S, pairs, V, D, H = 3, pairs_between(3), 70, 16, 32
    view, present, held_out = case(S, V, D)
    module = mine(S, pairs, D, H, True)
    module.networks.to(own)
    fast, found = run(module, view.bfloat16(), present, held_out, True)
    twin = mine(S, pairs, D, H, False, str(own).removeprefix("torch."))
    with torch.no_grad():
        for p in twin.networks.parameters():
            p.copy_(p.to(own))
    plain, expected = run(twin, view.bfloat16().float(), present, held_out, True)
    close = 1e-5 if own == torch.float32 else 4 * HALF_DIGIT
    torch.testing.assert_close(fast.information_P, plain.information_P, rtol=close, atol=close)
    for name, p in module.named_parameters():
        assert p.grad.dtype == own
        assert (found[name].float() - expected[name]).norm() <= close * 10 * max(1.0, float(expected[name].norm())), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_is_seen(precision):
    for bad in (math.nan, math.inf):
        view, present, held_out = case(3, 50, 8)
        view[1, 20] = bad
        present[1, 20] = True
        found = mine(3, pairs_between(3), 8, 8, True, precision)(view, present, held_out, alone, True, 10.0)
        assert not (torch.isfinite(found.loss) and torch.isfinite(found.information_P).all())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_change_nothing_but_the_order_of_sums(precision):
    view, present, held_out = case(6, 500, 24)
    found = {}
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            found.setdefault(threads, []).append(
                run(mine(6, pairs_within(2, 3), 24, 32, True, precision), view, present, held_out, True)[1]
            )
    finally:
        torch.set_num_threads(1)
    for name, value in found[1][0].items():
        assert torch.equal(found[2][0][name], found[2][1][name]), name
        for threads in (2, 5):
            torch.testing.assert_close(found[threads][0][name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_gradients_are_multiplied_by_that_of_the_loss():
    view, present, held_out = case(3, 50, 8)
    one, three = mine(3, pairs_between(3), 8, 8, True), mine(3, pairs_between(3), 8, 8, True)
    one(view, present, held_out, alone, True, 10.0).loss.backward()
    (3 * three(view, present, held_out, alone, True, 10.0).loss).backward()
    for p, q in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(q.grad, 3 * p.grad)
