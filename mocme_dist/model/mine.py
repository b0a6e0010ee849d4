"""Mutual information between views of entities, by the Donsker-Varadhan bound I >= E[T] - log E[exp T'].

All P pairs are estimated in one graph. A pair's statistics network is additive in its first layer, so each view is
projected once for its left and once for its right side, whatever the number of pairs, and pairs only add. Marginal
samples pair row i with the next row that has both views and is in the same half.

Facts that shaped this (a trial on 15,000 entities): experts that read one input are deterministic views of it, their
true information is unbounded and the raw estimate grew to 50 nats in 20 epochs, though n samples cannot certify more
than log n. So with `bounded` the estimate comes from a half of the entities that the networks are not trained on,
T is clipped inside the exponential (SMILE), and the result is capped at log n. Without it the paper's raw estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Sums over ranks; the identity where there is one. The model knows no ranks, the caller passes this in.
Reduce = Callable[[Tensor], Tensor]


class MineEstimate(NamedTuple):
    """What one pass gives.

    Attributes:
        loss: scalar whose gradient ascends the bound of every pair (networks only).
        information_P: estimates in nats over all ranks, at least 0 and capped with `bounded`.
        log_n_P: log of the number of rows behind each estimate; nothing above it can be certified.
        log_mean_exp_P: log E[exp T'] over all ranks.
        valid_P: pairs with at least two rows to estimate from.
    """

    loss: Tensor
    information_P: Tensor
    log_n_P: Tensor
    log_mean_exp_P: Tensor
    valid_P: Tensor


def pairs_within(num_modalities: int, num_experts: int) -> list[tuple[int, int]]:
    """Unordered pairs of experts inside each modality, as indices m * K + k into the views."""
    K = num_experts
    return [(m * K + j, m * K + k) for m in range(num_modalities) for j in range(K) for k in range(j + 1, K)]


def pairs_between(num_modalities: int) -> list[tuple[int, int]]:
    """Unordered pairs of modalities."""
    return [(m, n) for m in range(num_modalities) for n in range(m + 1, num_modalities)]


def next_valid(valid_PV: Tensor) -> Tensor:
    """For every row the next valid row after it, cyclically; its own index where no row is valid.

    Args:
        valid_PV: (P, V) bool.

    Returns:
        (P, V) int64.
    """
    V = valid_PV.shape[1]
    place = torch.arange(V, device=valid_PV.device).expand_as(valid_PV)
    own = torch.where(valid_PV, place, V)
    # Smallest valid place at or after each position, by a running minimum from the right.
    at_or_after = own.flip(1).cummin(1).values.flip(1)
    first = at_or_after[:, :1]
    after = torch.cat([at_or_after[:, 1:], torch.full_like(first, V)], 1)
    following = torch.where(after < V, after, first)
    return torch.where(following < V, following, place)


class StatisticsNetworks(nn.Module):
    """P networks on pairs of S views: T(x, y) = w . relu(W relu(A x + B y + b) + c)."""

    left_P: Tensor
    right_P: Tensor

    def __init__(self, num_views: int, pairs: list[tuple[int, int]], width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        S, P, D, H = num_views, len(pairs), width, hidden
        normal = lambda std, *shape: nn.Parameter(torch.randn(*shape, generator=generator) * std)  # noqa: E731
        self.sides_SDH = normal(D**-0.5, S, D, 2 * H)
        self.first_bias_PH = nn.Parameter(torch.zeros(P, H))
        self.second_PHH = normal((2 / H) ** 0.5, P, H, H)
        self.second_bias_PH = nn.Parameter(torch.zeros(P, H))
        self.last_PH = normal(H**-0.5 * 0.1, P, H)
        left, right = zip(*pairs, strict=True)
        self.register_buffer("left_P", torch.tensor(left, dtype=torch.long), persistent=False)
        self.register_buffer("right_P", torch.tensor(right, dtype=torch.long), persistent=False)

    def forward(self, view_SVD: Tensor, partner_PV: Tensor | None, frozen: bool) -> tuple[Tensor, Tensor | None]:
        """T on joint rows and, with partners, on marginal pairs (row i left, its partner right), each (P, V) float32.

        Args:
            view_SVD: (S, V, D) standardised views.
            partner_PV: (P, V) rows to pair with, or None for the joint rows alone.
            frozen: no gradient to the networks, only to the views.
        """
        take = (lambda parameter: parameter.detach()) if frozen else (lambda parameter: parameter)
        H = self.first_bias_PH.shape[1]
        sides_SVH = torch.bmm(view_SVD.to(self.sides_SDH.dtype), take(self.sides_SDH))
        left_PVH = sides_SVH[self.left_P, :, :H] + take(self.first_bias_PH)[:, None]
        right_PVH = sides_SVH[self.right_P, :, H:]
        first_PWH = left_PVH + right_PVH
        if partner_PV is not None:
            shuffled_PVH = right_PVH.gather(1, partner_PV[..., None].expand_as(right_PVH))
            # One product for both: the second layer sees joint and marginal rows side by side.
            first_PWH = torch.cat([first_PWH, left_PVH + shuffled_PVH], 1)
        second_PWH = torch.relu(torch.baddbmm(take(self.second_bias_PH)[:, None], torch.relu(first_PWH), take(self.second_PHH)))
        value_PW = (second_PWH * take(self.last_PH)[:, None]).sum(-1).float()
        if partner_PV is None:
            return value_PW, None
        joint_PV, marginal_PV = value_PW.chunk(2, 1)
        return joint_PV, marginal_PV


class Mine(nn.Module):
    """Estimates for P pairs of S views: the networks, how they are trained and what is averaged over steps."""

    mean_exp_P: Tensor
    center_SD: Tensor
    deviation_SD: Tensor
    num_updates: Tensor

    def __init__(self, num_views: int, pairs: list[tuple[int, int]], width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.networks = StatisticsNetworks(num_views, pairs, width, hidden, generator)
        # Moving average of E[exp T'] of the training half: MINE's correction of the gradient's bias.
        self.register_buffer("mean_exp_P", torch.zeros(len(pairs)))
        # Moving mean and deviation of each view's columns, over all ranks: views are standardised with those of the
        # steps before, so a row's T depends on the row alone, in training and in evaluation, at any world size.
        self.register_buffer("center_SD", torch.zeros(num_views, width))
        self.register_buffer("deviation_SD", torch.ones(num_views, width))
        self.register_buffer("num_updates", torch.zeros(1))

    def standardise(self, view_SVD: Tensor) -> Tensor:
        """Views with zero mean and unit deviation by column: information does not change, training does."""
        # Copies, because `forward` moves the buffers before autograd has used them.
        return (view_SVD.float() - self.center_SD[:, None].clone()) / self.deviation_SD[:, None].clone()

    def pointwise(self, view_SVD: Tensor) -> Tensor:
        """(P, V) T of each entity's own pair of views, with a gradient to the views only."""
        return self.networks(self.standardise(view_SVD), None, frozen=True)[0]

    def differentiable(self, view_SVD: Tensor, present_SV: Tensor, bounded: bool, clip: float) -> Tensor:
        """(P,) this rank's estimate from all its rows, with a gradient to the views only."""
        present_PV = present_SV[self.networks.left_P] & present_SV[self.networks.right_P]
        joint_PV, marginal_PV = self.networks(self.standardise(view_SVD), next_valid(present_PV), frozen=True)
        marginal_PV = marginal_PV.clamp(-clip, clip) if bounded else marginal_PV
        n_P = present_PV.sum(1).clamp_min(1)
        log_mean_exp_P = torch.logsumexp(marginal_PV.masked_fill(~present_PV, -1e9), 1) - n_P.log()
        return (joint_PV * present_PV).sum(1) / n_P - log_mean_exp_P

    def forward(self, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor, reduce: Reduce, bounded: bool, clip: float) -> MineEstimate:
        """Train on one half of the rows, estimate on the other.

        Args:
            view_SVD: (S, V, D) views; they get no gradient.
            present_SV: (S, V) which entities have the view.
            held_out_V: (V,) the half whose rows only estimate. Unused without `bounded`: all rows do both.
            reduce: adds a tensor over ranks.
            bounded, clip: see the mine section of the configuration.
        """
        view_SVD = view_SVD.detach()
        present_PV = present_SV[self.networks.left_P] & present_SV[self.networks.right_P]
        train_PV = present_PV & ~held_out_V if bounded else present_PV
        estimate_PV = present_PV & held_out_V if bounded else present_PV
        partner_PV = torch.where(held_out_V, next_valid(estimate_PV), next_valid(train_PV)) if bounded else next_valid(present_PV)
        joint_PV, marginal_PV = self.networks(self.standardise(view_SVD), partner_PV, frozen=False)
        with torch.no_grad():
            clipped_PV = marginal_PV.clamp(-clip, clip) if bounded else marginal_PV
            # float64: without the clip, exp of a diverging T must not overflow before anybody has seen it.
            exp_PV = clipped_PV.double().exp()
            sums = [
                train_PV.sum(1),
                (exp_PV * train_PV).sum(1),
                estimate_PV.sum(1),
                (joint_PV * estimate_PV).sum(1),
                (exp_PV * estimate_PV).sum(1),
            ]
            moments = _moments(view_SVD, present_SV)
            # One reduction for everything that ranks must agree on.
            reduced = reduce(torch.cat([torch.stack([value.double() for value in sums]).flatten(), moments]))
            trained_P, train_exp_P, count_P, joint_P, exp_P = reduced[: -len(moments)].view(5, -1)
            self._follow_views(reduced[-len(moments) :])
            n_P = count_P.clamp_min(1)
            log_mean_exp_P = torch.log((exp_P / n_P).clamp_min(1e-30))
            information_P = (joint_P / n_P - log_mean_exp_P).clamp_min(0)
            if bounded:
                information_P = torch.minimum(information_P, n_P.log())
            self._average(train_exp_P / trained_P.clamp_min(1), trained_P > 0)
        weight_PV = train_PV / trained_P.clamp_min(1)[:, None]
        # The clip bounds the exponential but not its gradient: a T' beyond the clip must still be pushed back, or
        # nothing holds T where the true information is unbounded (without this it passed 1e7 in 4,000 steps).
        pushed_PV = exp_PV * (1 + marginal_PV - marginal_PV.detach())
        ascent_P = (joint_PV * weight_PV).sum(1) - (pushed_PV * weight_PV).sum(1) / self.mean_exp_P.clamp_min(1e-30)
        return MineEstimate(-ascent_P.sum().float(), information_P.float(), n_P.log().float(), log_mean_exp_P.float(), count_P >= 2)

    def _follow_views(self, moments: Tensor) -> None:
        """Move the columns' mean and deviation towards this step's, which `_moments` summed over ranks."""
        S, D = self.center_SD.shape
        count_S1 = moments[:S, None]
        mean_SD = moments[S : S + S * D].view(S, D) / count_S1.clamp_min(1)
        variance_SD = moments[S + S * D :].view(S, D) / count_S1.clamp_min(1) - mean_SD.square()
        keep = torch.where((self.num_updates > 0).expand(S)[:, None], 0.9, 0.0)
        keep = torch.where(count_S1 >= 2, keep, 1.0)
        self.center_SD.copy_(keep * self.center_SD + (1 - keep) * mean_SD)
        self.deviation_SD.copy_(keep * self.deviation_SD + (1 - keep) * variance_SD.clamp_min(1e-12).sqrt())
        self.num_updates += 1

    def _average(self, mean_exp_P: Tensor, moves_P: Tensor) -> None:
        """Move the averages of the pairs that had rows to train on."""
        moved_P = torch.where(self.mean_exp_P == 0, mean_exp_P, 0.9 * self.mean_exp_P + 0.1 * mean_exp_P)
        # Averaged in, a step without rows would count as E[exp T'] = 0, and the gradient is divided by the average.
        self.mean_exp_P.copy_(torch.where(moves_P, moved_P, self.mean_exp_P))


def _moments(view_SVD: Tensor, present_SV: Tensor) -> Tensor:
    """Count, column sums and column sums of squares of the present rows of each view, flat, float64."""
    # Products, not masked copies: views are the largest tensors of a step.
    present_S1V = present_SV.to(view_SVD.dtype)[:, None]
    total_SD, square_SD = torch.bmm(present_S1V, view_SVD), torch.bmm(present_S1V, view_SVD.square())
    return torch.cat([present_SV.sum(1).double(), total_SD.double().flatten(), square_SD.double().flatten()])
