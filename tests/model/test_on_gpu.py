"""On a GPU.

Kernels, loss, experts, estimates and the whole model against the CPU's plain forms, values and gradients.
"""

from __future__ import annotations

import pytest
import torch
from plain_settings import FUSION, LOSS, MODEL, WEIGHTING
from torch import Tensor

from mocme_dist.kernels.counting import count, count_tiles, target_distances
from mocme_dist.kernels.distance import pool_distance
from mocme_dist.model.experts import Experts
from mocme_dist.model.loss import LossSettings, completion_loss
from mocme_dist.model.mine import Mine, pairs_within
from mocme_dist.model.mocme import MoCME, alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

NOBODY = torch.zeros(0, dtype=torch.int64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Tensor, digits: float = 1e-5) -> None:
    """Equal up to a share of the largest magnitude."""
    assert found.is_cuda
    assert torch.isfinite(found).all()
    assert (found.cpu().double() - expected.double()).abs().max() <= digits * expected.double().abs().max().clamp_min(
        1e-12
    )


def gradients(query: Tensor, pool: Tensor, grad_out: Tensor, compiled: bool) -> list[Tensor]:
    query, pool = query.detach().clone().requires_grad_(), pool.detach().clone().requires_grad_()
    value = pool_distance(query, pool, compiled)
    (value * grad_out).sum().backward()
    return [value.detach(), query.grad, pool.grad]


SHAPES = [
    (1, 1, 1, 2),
    (3, 5, 33, 6),
    (1, 9, 129, 34),
    (2, 4, 257, 130),
    (8, 128, 256, 256),
    (1, 64, 5000, 250),
    (2, 3, 5, 2500),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_plain_form_in_float64(shape):
    G, b, N, D = shape
    query, pool, grad_out = normal(G, b, D), normal(G, N, D, seed=1), normal(G, b, N, seed=2)
    pool[:, 0] = query[:, 0]  # equal vectors: no direction, and no gradient
    pool[:, -1, : D // 2] = query[:, -1, : D // 2]
    found = gradients(query.cuda(), pool.cuda(), grad_out.cuda(), True)
    real, imaginary = query.double().chunk(2, -1)
    z_query = torch.complex(real, imaginary).requires_grad_()
    z_pool = torch.complex(*pool.double().chunk(2, -1)).requires_grad_()
    value = torch.cat([(z_query[:, :, None] - part[:, None]).abs().sum(-1) for part in z_pool.split(64, 1)], -1)
    (value * grad_out.double()).sum().backward()
    for ours, theirs in zip(
        found, (value.detach(), *(torch.cat([z.grad.real, z.grad.imag], -1) for z in (z_query, z_pool))), strict=True
    ):
        near(ours, theirs)


def test_there_may_be_more_groups_than_a_launch_takes():
    G = 65_537
    query, pool, grad_out = normal(G, 1, 4).cuda(), normal(G, 3, 4, seed=1).cuda(), normal(G, 1, 3, seed=2).cuda()
    for ours, plain in zip(
        gradients(query, pool, grad_out, True), gradients(query, pool, grad_out, False), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_kernels_pass_on_what_is_not_finite():
    query, pool = normal(1, 3, 8).cuda(), normal(1, 4, 8, seed=1).cuda()
    query[0, 1, 2], pool[0, 2, 5] = torch.nan, torch.inf
    bad = torch.zeros(3, 4, dtype=torch.bool, device="cuda")
    bad[1], bad[:, 2] = True, True
    assert torch.equal(torch.isfinite(pool_distance(query, pool, True)[0]), ~bad)


def test_kernels_are_sound_operators_of_torch():
    from mocme_dist.kernels.distance_triton import distance_to_pool

    torch.library.opcheck(
        distance_to_pool, (normal(2, 5, 8).cuda().requires_grad_(), normal(2, 9, 8, seed=1).cuda().requires_grad_())
    )


def loss_of(device: str, settings: LossSettings) -> list[Tensor]:
    G, b, N, D = 4, 32, 64, 32
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    allowed = torch.rand(G, b, N, generator=gen) < 0.9
    allowed[0, 1] = False
    leaves = [draw(G, b, D), draw(G, b, D // 2), draw(G, b, D), draw(G, N, D)]
    leaves[3][0, 0] = leaves[2][0, 0]
    source, phase, target, pool = (value.to(device).requires_grad_() for value in leaves)
    sign, weight = draw(G, b).sign().to(device), torch.ones(G, b, device=device)
    weight[1, 3] = 0
    for _ in range(3):  # a recorded graph is replayed from the third call on
        for leaf in (source, phase, target, pool):
            leaf.grad = None
        loss, stats = completion_loss(source, phase, sign, target, pool, allowed.to(device), weight, settings)
        loss.backward()
    assert isinstance(stats.loss, Tensor)
    return [loss.detach(), stats.classes_3, source.grad, phase.grad, target.grad, pool.grad]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", ["entropy", "self_adversarial", "uniform", "entropy_adversarial", "one_vs_all"])
def test_loss_equals_the_cpus_plain_form(kind, cuda_graphs):
    plain = LOSS._replace(gamma=6.0, kind="one_vs_all" if kind == "one_vs_all" else "contrastive")
    if kind != "one_vs_all":
        plain = plain._replace(weighting=WEIGHTING._replace(kind=kind))
    for found, expected in zip(
        loss_of("cuda", plain._replace(compiled=True, cuda_graphs=cuda_graphs)), loss_of("cpu", plain), strict=True
    ):
        near(found, expected, 2e-4 if "entropy" in kind else 1e-4)


@pytest.mark.parametrize("width", [10, 256, 300])
def test_counts_equal_those_of_whole_distances_and_equal_vectors_tie(width):
    rows, query = normal(3000, width), normal(70, width, seed=1)
    rows[100:120], rows[2999] = rows[7].clone(), rows[7].clone()
    target = torch.arange(70) * 3 + 1
    target[5] = 7
    skip_row = torch.arange(0, 3000, 11)
    skip_query = skip_row % 70
    query_gpu, rows_gpu = query.cuda(), rows.cuda()
    bound = target_distances(query_gpu, rows_gpu[target.cuda()], 1024, True)
    found = count(query_gpu, bound, rows_gpu, skip_query.cuda(), skip_row.cuda(), 1024, True).cpu()
    assert found[1, 5] >= 21  # copies of the target, itself among them, less those that are skipped
    bound_cpu = target_distances(query, rows[target], 1024, False)
    expected = count_tiles(query, bound_cpu, rows, skip_query, skip_row, 1024, False)
    assert (found - expected).abs().max() <= 1  # two float32 sums order what is equal in the last digits differently
    assert (found == expected).float().mean() > 0.97


WIDTHS = [2, 4, 6, 10, 16, 32, 34, 50, 62, 64, 66, 100, 128, 130, 200, 256, 300, 512, 1000, 1026]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pair_has_the_same_distance_in_a_count_and_alone(width):
    """Each query's target stands among the rows.

    It is as near as itself, whatever the place, the numbers of both and where they lie.
    """
    all_rows, all_queries = normal(5004, width).cuda(), normal(258, width, seed=1).cuda()
    for Q, r, first in ((257, 5003, 0), (256, 4096, 1), (1, 5003, 1), (1, 1, 0), (7, 1, 1)):
        rows, query = all_rows[first : first + r], all_queries[first : first + Q]
        target = torch.randperm(5003, generator=torch.Generator().manual_seed(0))[:Q].cuda() % r
        bound = target_distances(query, rows[target], 1024, True)
        found = count(query, bound, rows, NOBODY.cuda(), NOBODY.cuda(), 1024, True)
        assert (found[1] >= 1).all() and (found[0] < r).all(), (Q, r, first)
        row, asker = target.sort()
        left_out = count(query, bound, rows, asker, row, 1024, True)
        assert torch.equal(left_out[1], found[1] - 1) and torch.equal(left_out[0], found[0]), (Q, r, first)


def test_the_kernels_of_a_count_agree_and_nobody_counts_with_those_that_do_not(monkeypatch):
    from mocme_dist.kernels import count_triton

    assert all(count_triton.kernels_agree(width, torch.device("cuda", 0)) for width in WIDTHS)
    alone = count_triton.pair_distances
    monkeypatch.setattr(count_triton, "pair_distances", lambda *args: alone(*args) * (1 + 1e-6))
    assert not count_triton.kernels_agree.__wrapped__(64, torch.device("cuda", 0))
    monkeypatch.setattr(count_triton, "kernels_agree", lambda *_: False)
    rows, query = normal(300, 64).cuda(), normal(20, 64, seed=1).cuda()
    bound = target_distances(query, rows[:20], 64, True)
    assert torch.equal(
        count(query, bound, rows, NOBODY.cuda(), NOBODY.cuda(), 64, True)[1],
        torch.ones(20, dtype=torch.int64, device="cuda"),
    )


def test_a_query_that_is_not_finite_ranks_last():
    rows, query = normal(100, 8).cuda(), normal(3, 8, seed=1).cuda()
    query[1] = torch.nan
    bound = target_distances(query, rows[:3], 16, True)
    assert count(query, bound, rows, NOBODY.cuda(), NOBODY.cuda(), 16, True)[0, 1] == 100


def encoded(device: str, **settings: object) -> list[Tensor]:
    """Vectors, estimates and gradients of a model with two modalities after two training steps' forward passes."""
    wanted = MODEL._replace(width=16, num_experts=3, fusion=FUSION._replace(hidden=8), **settings)
    model = MoCME({"structure": 16, "text": 24}, 5, wanted, seed=1).to(device)
    rows = normal(64, 16).to(device).requires_grad_()
    raw = {"structure": rows, "text": normal(64, 24, seed=3).to(device)}
    present = torch.ones(2, 64, dtype=torch.bool, device=device)
    present[1, ::7] = False
    held_out = torch.arange(64, device=device) % 2 == 1
    for _ in range(2):
        model.zero_grad()
        rows.grad = None
        fused = model.encode(raw, present, held_out, alone, estimate=True)
        (fused.z_VD.square().sum() + fused.loss).backward()
    grads = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    assert len(grads) > 8
    return [fused.z_VD.detach(), fused.loss.detach()[None], rows.grad, *grads]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_whole_model_equals_the_cpus(compiled):
    for found, expected in zip(encoded("cuda", compiled=compiled), encoded("cpu"), strict=True):
        near(found, expected, 1e-3)


def test_bfloat16_stays_near_float32():
    for found, expected in zip(
        encoded("cuda", compiled=True, precision="bfloat16")[:2], encoded("cpu")[:2], strict=True
    ):
        near(found, expected, 0.03)


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_equal_the_cpus(recompute):
    outputs = []
    for device in ("cuda", "cpu"):
        experts = Experts(2, 3, 32, 0.0, True, torch.Generator().manual_seed(0), recompute).to(device)
        x = normal(2, 40, 32).to(device).requires_grad_()
        views = experts(x)
        (views * normal(2, 3, 40, 32, seed=1).to(device)).sum().backward()
        outputs.append([views.detach(), x.grad, *(p.grad for p in experts.parameters())])
    for found, expected in zip(*outputs, strict=True):
        near(found, expected, 1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_estimates_equal_the_cpus(compiled):
    views, held_out = normal(3, 200, 16), torch.arange(200) % 2 == 1
    present = torch.ones(3, 200, dtype=torch.bool)
    present[1, ::5] = False
    outputs = []
    for device in ("cuda", "cpu"):
        mine = Mine(
            3, pairs_within(1, 3), 16, 8, torch.Generator().manual_seed(0), compiled=compiled and device == "cuda"
        ).to(device)
        for _ in range(3):
            mine.zero_grad()
            found = mine(views.to(device), present.to(device), held_out.to(device), alone, True, 10.0)
            found.loss.backward()
        outputs.append(
            [found.information_P, found.loss.detach()[None], *(p.grad for p in mine.parameters()), mine.mean_exp_P]
        )
    for found_value, expected in zip(*outputs, strict=True):
        near(found_value, expected, 1e-3)
