"""Distances to a shared pool: the C++ kernels and the compiler's form against the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch

from mocme_dist.kernels import builder, distance
from mocme_dist.kernels.distance import pool_distance

FORMS = [pytest.param("kernels"), pytest.param("compiler", marks=pytest.mark.slow)]


@pytest.fixture
def form(request, monkeypatch):
    """Which of the two fused forms pool_distance takes."""
    if request.param == "compiler":
        monkeypatch.setattr(distance, "has_kernels", lambda _: False)
    elif not distance.has_kernels("cpu"):
        pytest.skip("no C++ compiler: nothing builds the kernels")
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_complex(value: torch.Tensor) -> torch.Tensor:
    real, imaginary = value.double().chunk(2, -1)
    return torch.complex(real, imaginary)


def pools(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (2, 5, 8) and pools (2, 19, 8), some of them equal to a query, and gradients (2, 5, 19)."""
    query, pool = normal(2, 5, 8), normal(2, 19, 8, seed=1)
    pool[:, 3] = query[:, 2]
    pool[:, 18] = query[:, 2]
    pool[1, 0, 4:] = query[1, 0, 4:]  # some coordinates coincide in their imaginary part only
    pool[0, 1, [0, 4]] = query[0, 1, [0, 4]]  # one complex coordinate coincides
    return query.to(dtype), pool.to(dtype), normal(2, 5, 19, seed=2)


def gradients(query: torch.Tensor, pool: torch.Tensor, grad_out: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
    query, pool = query.clone().requires_grad_(), pool.clone().requires_grad_()
    value = pool_distance(query, pool, compiled)
    (value * grad_out).sum().backward()
    return [value.detach(), query.grad, pool.grad]


def complex_gradients(query: torch.Tensor, pool: torch.Tensor, grad_out: torch.Tensor) -> list[torch.Tensor]:
    query, pool = query.double().requires_grad_(), pool.double().requires_grad_()
    value = (as_complex(query)[:, :, None] - as_complex(pool)[:, None]).abs().sum(-1)  # abs has gradient 0 at 0
    (value * grad_out).sum().backward()
    return [value.detach(), query.grad, pool.grad]


def test_plain_pool_distance_equals_complex_arithmetic_where_points_coincide_too():
    for found, expected in zip(gradients(*pools(), compiled=False), complex_gradients(*pools()), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_fused_distance_equals_plain(form):
    plain, fused = gradients(*pools(), compiled=False), gradients(*pools(), compiled=True)
    for found, expected in zip(fused, plain, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instructions", [None, "AVX2", "portable"])
@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (3, 5, 33, 6), (1, 9, 129, 34), (2, 4, 257, 130), (2, 3, 0, 4)], ids=str
)
def test_kernels_equal_plain_at_any_shape(form, shape, instructions, monkeypatch):
    """One of everything, remainders of every block, more than one tile of each kind, no candidate at all."""
    if instructions is not None:
        if instructions == "AVX2" and builder.instruction_set() not in ("AVX2", "AVX512"):
            pytest.skip("this CPU has no AVX2")
        monkeypatch.setattr(distance, "library", lambda source: builder.library(source, instructions))
    G, b, N, D = shape
    query, candidates, grad_out = normal(G, b, D), normal(G, N, D, seed=1), normal(G, b, N, seed=2)
    for found, expected in zip(
        gradients(query, candidates, grad_out, True), gradients(query, candidates, grad_out, False), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_kernels_give_the_same_bits_wherever_query_and_candidate_stand(form):
    query, candidates = normal(1, 13, 42), normal(1, 77, 42, seed=1)
    whole = pool_distance(query, candidates, True)
    for first, count in ((0, 5), (3, 31), (40, 37)):
        assert torch.equal(
            pool_distance(query, candidates[:, first : first + count], True), whole[:, :, first : first + count]
        )
    assert torch.equal(pool_distance(query[:, 6:9], candidates, True), whole[:, 6:9])


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_kernels_pass_on_what_is_not_finite(form):
    query, candidates = normal(1, 3, 8), normal(1, 4, 8, seed=1)
    query[0, 1, 2], candidates[0, 2, 5] = torch.nan, torch.inf
    found = pool_distance(query, candidates, True)[0]
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1], bad[:, 2] = True, True
    assert torch.equal(torch.isfinite(found), ~bad)


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_kernels_are_sound_operators_of_torch(form):
    query, candidates, _ = pools()
    torch.library.opcheck(
        torch.ops.mocme_dist.distance_to_pool.default, (query.requires_grad_(), candidates.requires_grad_())
    )


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_fused_distance_takes_bfloat16_and_gives_float32(form):
    query, candidates, grad_out = pools(torch.bfloat16)
    for found, expected in zip(
        gradients(query, candidates, grad_out, True), gradients(query, candidates, grad_out, False), strict=True
    ):
        assert found.dtype == expected.dtype
        # Distances are float32 sums; gradients are rounded to bfloat16's 8 bits on their way out.
        torch.testing.assert_close(
            found, expected, **({"rtol": 1e-5, "atol": 1e-5} if found.dtype == torch.float32 else {})
        )


@pytest.mark.parametrize("form", FORMS[:1], indirect=True)
def test_fused_distance_gives_only_the_gradients_that_are_asked_for(form):
    query, candidates, grad_out = pools()
    expected = gradients(query, candidates, grad_out, False)
    leaf = query.clone().requires_grad_()
    (pool_distance(leaf, candidates, True) * grad_out).sum().backward()
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-5, atol=1e-5)
    leaf = candidates.clone().requires_grad_()
    (pool_distance(query, leaf, True) * grad_out).sum().backward()
    torch.testing.assert_close(leaf.grad, expected[2], rtol=1e-5, atol=1e-5)
