"""Mutual information: batched networks against plain ones, the bound against known values, and its averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mocme_dist.model.mine import Mine, Shift, StatisticsNetworks, pairs_between, pairs_within, shift_valid

S, V, D, H = 3, 10, 4, 5
PAIRS = [(0, 1), (0, 2), (1, 2)]


def test_pairs_are_each_once_and_stay_inside_a_modality():
    assert pairs_within(2, 3) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert pairs_within(4, 1) == []
    assert pairs_between(3) == [(0, 1), (0, 2), (1, 2)]
    assert pairs_between(1) == []


@pytest.mark.parametrize("count", [0, 1, 2, 13])
def test_shift_is_what_a_search_finds_and_its_own_inverse(count):
    gen = torch.Generator().manual_seed(count)
    shares = (0.0, 0.1, 0.3, 0.7, 1.0)
    valid = torch.stack([torch.rand(count, generator=gen) < share for share in shares for _ in range(5)])
    found, back, _ = shift_valid(valid)
    assert found.dtype == back.dtype == torch.int64
    for p, row in enumerate(valid.tolist()):
        for place in range(count):
            following = [(place + step) % count for step in range(1, count + 1)]
            expected = next((other for other in following if row[other]), place)
            assert found[p, place] == expected
            if row[place]:
                assert back[p, expected] == place


class PlainNetwork(nn.Module):
    """T(x, y) = w . relu(W relu(A x + B y + b) + c) on concatenated views, with the weights of one pair."""

    def __init__(self, networks: StatisticsNetworks, pair: int) -> None:
        super().__init__()
        left, right = PAIRS[pair]
        take = lambda value: nn.Parameter(value.detach().clone())  # noqa: E731
        self.first = take(torch.cat([networks.sides_SDH[left, :, :H], networks.sides_SDH[right, :, H:]]))
        self.first_bias = take(networks.first_bias_PH[pair])
        self.second, self.second_bias = take(networks.second_PHH[pair]), take(networks.second_bias_PH[pair])
        self.last = take(networks.last_PH[pair])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.relu(torch.cat([x, y], -1) @ self.first + self.first_bias)
        return torch.relu(hidden @ self.second + self.second_bias) @ self.last


def networks() -> StatisticsNetworks:
    gen = torch.Generator().manual_seed(0)
    module = StatisticsNetworks(S, PAIRS, D, H, gen)
    with torch.no_grad():
        for bias in (module.first_bias_PH, module.second_bias_PH):
            bias.add_(torch.randn(bias.shape, generator=gen))
    return module


def test_batched_networks_equal_a_loop_of_plain_ones():
    module = networks()
    gen = torch.Generator().manual_seed(1)
    view = torch.randn(S, V, D, generator=gen).requires_grad_()
    partner = torch.stack([torch.randperm(V, generator=gen) for _ in PAIRS])
    grad_out = torch.randn(2, len(PAIRS), V, generator=gen)
    joint, marginal = module(
        view, Shift(partner, partner.argsort(1), torch.ones_like(partner, dtype=torch.bool)), frozen=False
    )
    ((joint * grad_out[0]).sum() + (marginal * grad_out[1]).sum()).backward()

    view_twin = view.detach().clone().requires_grad_()
    sides = torch.zeros_like(module.sides_SDH)
    for p, (left, right) in enumerate(PAIRS):
        plain = PlainNetwork(module, p)
        joint_twin = plain(view_twin[left], view_twin[right])
        marginal_twin = plain(view_twin[left], view_twin[right][partner[p]])
        torch.testing.assert_close(joint[p], joint_twin)
        torch.testing.assert_close(marginal[p], marginal_twin)
        ((joint_twin * grad_out[0, p]).sum() + (marginal_twin * grad_out[1, p]).sum()).backward()
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(module.first_bias_PH.grad[p], plain.first_bias.grad, **close)
        torch.testing.assert_close(module.second_PHH.grad[p], plain.second.grad, **close)
        torch.testing.assert_close(module.second_bias_PH.grad[p], plain.second_bias.grad, **close)
        torch.testing.assert_close(module.last_PH.grad[p], plain.last.grad, **close)
        sides[left, :, :H] += plain.first.grad[:D]
        sides[right, :, H:] += plain.first.grad[D:]
    torch.testing.assert_close(module.sides_SDH.grad, sides, **close)
    torch.testing.assert_close(view.grad, view_twin.grad, **close)

    alone, nothing = module(view, None, frozen=True)
    torch.testing.assert_close(alone, joint)
    assert nothing is None
    module.zero_grad()
    alone.sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())


def one(value: Tensor) -> Tensor:
    return value


def mine(pairs: list[tuple[int, int]] = PAIRS, num_views: int = S, width: int = D, hidden: int = H) -> Mine:
    return Mine(num_views, pairs, width, hidden, torch.Generator().manual_seed(0))


def random_case(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(S, V, D, generator=gen), torch.rand(S, V, generator=gen) < 0.8, torch.arange(V) % 2 == 1


@pytest.mark.parametrize("bounded", [True, False])
def test_an_estimate_is_the_bound_of_its_rows(bounded):
    """Information, log n, loss and averages against loops over pairs and rows."""
    module = mine()
    view, present, held_out = random_case()
    with torch.no_grad():
        module.networks.last_PH.mul_(60)  # large enough that the clip matters
    result = module(view, present, held_out, one, bounded, 1.5)
    result.loss.backward()
    twins = [PlainNetwork(module.networks, p) for p in range(len(PAIRS))]
    ascent, value, beyond = 0.0, 0.0, 0
    for p, (left, right) in enumerate(PAIRS):
        rows = [v for v in range(V) if present[left, v] and present[right, v]]
        train = [v for v in rows if not held_out[v]] if bounded else rows
        estimate = [v for v in rows if held_out[v]] if bounded else rows

        def sides(chosen: list[int], p: int = p, left: int = left, right: int = right) -> tuple[Tensor, Tensor]:
            # The first step standardises with the buffers' start: mean 0, deviation 1.
            partners = chosen[1:] + chosen[:1]
            return twins[p](view[left, chosen], view[right, chosen]), twins[p](
                view[left, chosen], view[right, partners]
            )

        joint, marginal = sides(estimate)
        log_mean_exp = (marginal.clamp(-1.5, 1.5) if bounded else marginal).exp().mean().log()
        expected = max(0.0, (joint.mean() - log_mean_exp).item())
        expected = min(expected, math.log(len(estimate))) if bounded else expected
        assert result.information_P[p].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert result.log_mean_exp_P[p].item() == pytest.approx(log_mean_exp.item(), rel=1e-4, abs=1e-5)
        assert result.log_n_P[p].item() == pytest.approx(math.log(len(estimate)))
        joint, marginal = sides(train)
        weight = (marginal.clamp(-1.5, 1.5) if bounded else marginal).exp().detach()
        beyond += int((marginal.abs() > 1.5).sum())
        assert module.mean_exp_P[p].item() == pytest.approx(weight.mean().item(), rel=1e-4)
        # The clip holds the weight of a marginal row, not its gradient; the averaged weights cancel in the value.
        value = value + joint.mean() - 1
        ascent = ascent + joint.mean() - (weight * marginal).mean() / weight.mean()
    assert beyond
    assert result.loss.item() == pytest.approx(-value.item(), rel=1e-4)
    (-ascent).backward()
    for p in range(len(PAIRS)):
        torch.testing.assert_close(module.networks.last_PH.grad[p], twins[p].last.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.networks.second_PHH.grad[p], twins[p].second.grad, rtol=1e-4, atol=1e-5)
    assert result.valid_P.all()


def test_an_estimate_gives_the_views_no_gradient_and_differentiable_gives_the_networks_none():
    module = mine()
    view, present, held_out = random_case()
    view.requires_grad_()
    module(view, present, held_out, one, True, 10.0).loss.backward()
    assert view.grad is None
    assert all(parameter.grad is not None for parameter in module.networks.parameters())
    module.zero_grad()
    module.differentiable(view, present, True, 10.0).sum().backward()
    module.pointwise(view).sum().backward()
    assert view.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.networks.parameters())


def test_the_differentiable_estimate_has_the_gradient_of_finite_differences():
    module = mine()
    view, present, _ = random_case()
    with torch.no_grad():
        module.networks.last_PH.mul_(20)
    view.requires_grad_()
    module.differentiable(view, present, True, 3.0)[1].backward()
    for place in [(0, 0, 0), (0, 4, 2), (2, 7, 1)]:
        step = torch.zeros_like(view)
        step[place] = 1e-2
        with torch.no_grad():
            high, low = (module.differentiable(view + sign * step, present, True, 3.0)[1] for sign in (1, -1))
        assert view.grad[place].item() == pytest.approx(((high - low) / 2e-2).item(), rel=0.05, abs=2e-3)
    assert (view.grad[1] == 0).all()  # pair 1 is (0, 2)


def test_views_are_standardised_with_their_moving_averages():
    module = mine()
    view, present, held_out = random_case()
    view = view * 3 + 5
    seen = [view[s, present[s]] for s in range(S)]
    module(view, present, held_out, one, True, 10.0)
    for s in range(S):
        torch.testing.assert_close(module.center_SD[s], seen[s].mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.deviation_SD[s], seen[s].std(0, correction=0), rtol=1e-4, atol=1e-4)
    before = module.center_SD.clone()
    module(view + 1, present, held_out, one, True, 10.0)
    torch.testing.assert_close(module.center_SD, before + 0.1, rtol=1e-4, atol=1e-4)


def test_pairs_with_too_few_rows_are_invalid_and_move_nothing():
    module = mine()
    view, _, held_out = random_case()
    module(view, torch.ones(S, V, dtype=torch.bool), held_out, one, True, 10.0)
    mean_exp = module.mean_exp_P.clone()
    present = torch.ones(S, V, dtype=torch.bool)
    present[2] = False
    present[2, 1] = True  # one held-out row: nothing to train on, too few to estimate from
    for _ in range(60):
        result = module(view, present, held_out, one, True, 10.0)
    result.loss.backward()
    assert result.valid_P.tolist() == [True, False, False]
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.information_P).all()
    # An average of nothing is no average: the pairs' correction of the gradient must not fade to 0.
    assert torch.equal(module.mean_exp_P[1:], mean_exp[1:])
    assert (module.networks.last_PH.grad[1:] == 0).all()


def test_no_rows_at_all_give_finite_numbers():
    module = mine()
    before = {name: value.clone() for name, value in module.named_buffers() if name != "num_updates"}
    view = torch.zeros(S, 0, D)
    none = torch.zeros(S, 0, dtype=torch.bool)
    result = module(view, none, none[0], one, True, 10.0)
    result.loss.backward()
    assert result.loss == 0
    assert not result.valid_P.any()
    for name, value in before.items():
        assert torch.equal(dict(module.named_buffers())[name], value), name


def correlated(rho: float, count: int, seed: int) -> Tensor:
    """(2, count, 2): two views of two columns, each column of one correlated with its own of the other."""
    gen = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 2, generator=gen)
    return torch.stack([x, rho * x + math.sqrt(1 - rho**2) * noise])


def trained_estimate(rho: float, steps: int) -> tuple[float, Mine]:
    """Mean of the last 40 estimates, after training on fresh samples of 1,024 rows (half of them estimate)."""
    module = mine([(0, 1)], 2, 2, 32)
    adam = torch.optim.Adam(module.parameters(), lr=5e-3)
    held_out = torch.arange(1024) % 2 == 1
    found = []
    for step in range(steps):
        result = module(correlated(rho, 1024, step), torch.ones(2, 1024, dtype=torch.bool), held_out, one, True, 10.0)
        adam.zero_grad()
        result.loss.backward()
        adam.step()
        found.append(result.information_P.item())
    return sum(found[-40:]) / 40, module


# Tolerances: an estimate from 512 rows deviates by some 0.05; the rest is what 32 hidden units have not learned yet.
@pytest.mark.parametrize(("rho", "tolerance"), [(0.0, 0.03), (0.5, 0.06), (0.9, 0.25)])
def test_the_bound_approaches_the_information_of_gaussians(rho, tolerance):
    expected = -0.5 * math.log(1 - rho**2) * 2
    estimate, module = trained_estimate(rho, 300)
    assert estimate == pytest.approx(expected, abs=tolerance)
    # The pointwise terms of fresh rows average to the same.
    fresh = correlated(rho, 4096, 10**6)
    joint = module.pointwise(fresh).mean()
    marginal = module.pointwise(torch.stack([fresh[0], fresh[1].roll(1, 0)])).exp().mean().log()
    assert (joint - marginal).item() == pytest.approx(expected, abs=tolerance + 0.05)


def test_statistics_beyond_the_clip_are_pushed_back():
    """Where every T lies beyond the clip, raising all of them alike must gain nothing.

    The bound does not know shifts.
    """
    module = mine([(0, 1)], 2)
    view, present, held_out = random_case()
    with torch.no_grad():
        module.networks.last_PH.fill_(1.0)
        module.networks.second_bias_PH.fill_(50.0)  # all hidden units are on, so that these biases shift T
    result = module(view[:2], present[:2], held_out, one, True, 10.0)
    result.loss.backward()
    assert module.pointwise(view[:2]).min() > 10
    assert module.networks.second_bias_PH.grad.abs().max() < 1e-5


def test_copies_reach_the_cap_and_not_more():
    """A view and itself: the true information is infinite, n rows certify log n."""
    module = mine([(0, 1)], 2, 2, 32)
    adam = torch.optim.Adam(module.parameters(), lr=1e-2)
    held_out = torch.arange(64) % 2 == 1
    present = torch.ones(2, 64, dtype=torch.bool)
    best = 0.0
    for step in range(200):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
        result = module(torch.stack([x, x]), present, held_out, one, True, 10.0)
        adam.zero_grad()
        result.loss.backward()
        adam.step()
        assert result.information_P.item() <= math.log(32) + 1e-6
        best = max(best, result.information_P.item())
    assert best > 1.5
    with torch.no_grad():
        module.networks.last_PH.mul_(100)
    assert module(torch.stack([x, x]), present, held_out, one, True, 10.0).information_P.item() == pytest.approx(
        math.log(32)
    )
    assert module(torch.stack([x, x]), present, held_out, one, False, 10.0).information_P.item() > math.log(64)
