"""Mutual information over ranks: the estimate at any world size is a draw of the one-rank estimate over its pairings.

A rank pairs marginal samples among its own rows, so the pairing, and nothing else, depends on the number of ranks. With
the networks held fixed the law is exact: E[T] over joint rows is the same number at every world size, and log E[exp T']
is one draw from its distribution over random pairings of the same rows. That distribution is sampled (400 pairings),
and each estimate must lie within four of its standard deviations: by chance one of these 36 comparisons would fail once
in 400 data sets. The seed is fixed.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mocme_dist.model.mine import Mine
from mocme_dist.model.mocme import alone
from mocme_dist.parallel.comm import Comm
from mocme_dist.partition import RowPartition

S, V, D = 4, 900, 8
PAIRS = [(i, j) for i in range(S) for j in range(i + 1, S)]
CLIP = 10.0


def views(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian views with correlations 0 to 0.8 to a common factor, who has them, and the half that only estimates."""
    gen = torch.Generator().manual_seed(seed)
    common = torch.randn(V, D, generator=gen)
    share = torch.tensor([0.0, 0.3, 0.6, 0.8])[:, None, None]
    view_SVD = share * common + (1 - share**2).sqrt() * torch.randn(S, V, D, generator=gen)
    return view_SVD, torch.rand(S, V, generator=gen) < 0.9, torch.arange(V) % 2 == 1


def trained_networks() -> Mine:
    """Networks after 150 steps on fresh samples of one rank."""
    mine = Mine(S, PAIRS, D, 16, torch.Generator().manual_seed(0))
    adam = torch.optim.Adam(mine.parameters(), lr=5e-3)
    for step in range(150):
        adam.zero_grad()
        mine(*views(1000 + step), alone, True, CLIP).loss.backward()
        adam.step()
    return mine


def estimate(comm: Comm, mine: Mine) -> tuple[Tensor, Tensor]:
    """This world's estimate and its log E[exp T'], each rank with its range of the rows."""
    view_SVD, present_SV, held_out_V = views(7)
    first, last = RowPartition(V, comm.world_size).bounds(comm.rank)
    here = slice(first, last)
    found = copy.deepcopy(mine)(view_SVD[:, here], present_SV[:, here], held_out_V[here], comm.sum, True, CLIP)
    return found.information_P, found.log_mean_exp_P


def pairings(mine: Mine, count: int) -> Tensor:
    """(count, P) log E[exp T'] of the held-out rows, their right sides permuted at random."""
    view_SVD, present_SV, held_out_V = views(7)
    gen = torch.Generator().manual_seed(3)
    drawn = torch.empty(count, len(PAIRS))
    with torch.no_grad():
        standard_SVD = mine.standardise(view_SVD)
        for p, (left, right) in enumerate(PAIRS):
            rows = torch.nonzero(present_SV[left] & present_SV[right] & held_out_V).flatten()
            for draw in range(count):
                shuffled_SVD = standard_SVD[:, rows].clone()
                shuffled_SVD[right] = shuffled_SVD[right, torch.randperm(len(rows), generator=gen)]
                value_V = mine.networks(shuffled_SVD, None, frozen=True)[0][p].clamp(-CLIP, CLIP)
                drawn[draw, p] = torch.logsumexp(value_V, 0) - math.log(len(rows))
    return drawn


@pytest.fixture(scope="module")
def trained() -> Mine:
    return trained_networks()


def test_estimates_at_any_world_size_are_draws_of_the_one_rank_estimate(run_ranks, trained):
    by_world = {world: run_ranks(world, estimate, trained) for world in (1, 2, 3, 4)}
    for ranks in by_world.values():
        assert all(torch.equal(information, ranks[0][0]) for information, _ in ranks)
    information, log_mean_exp = by_world[1][0]
    joint_P = information + log_mean_exp
    drawn = pairings(trained, 400)
    mean_P, deviation_P = drawn.mean(0), drawn.std(0)
    # The estimates tell pairs apart far beyond the sampling error; else the comparison would say little.
    assert information[PAIRS.index((2, 3))] > 0.4 and deviation_P.max() < 0.1
    compared = torch.arange(len(PAIRS))[
        information > 0.01
    ]  # estimates are cut at 0: of those nothing is left to compare
    assert len(compared) >= 3
    for ranks in by_world.values():
        found, log_found = ranks[0]
        assert ((log_found - mean_P).abs() <= 4 * deviation_P).all()
        torch.testing.assert_close((found + log_found)[compared], joint_P[compared], rtol=1e-5, atol=1e-6)
    # The law is sharp enough to find a wrong pairing: rows paired with themselves are far outside.
    with torch.no_grad():
        view_SVD, _, held_out_V = views(7)
        own_PV = trained.networks(trained.standardise(view_SVD[:, held_out_V]), None, frozen=True)[0].clamp(-CLIP, CLIP)
        wrong_P = torch.logsumexp(own_PV, 1) - math.log(int(held_out_V.sum()))
    assert ((wrong_P - mean_P).abs() > 4 * deviation_P)[compared].all()
