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

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.model import statistics
from mocme_dist.model.graphs import one_graph, vary
from mocme_dist.model.precision import torch_type

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


class Found(NamedTuple):
    """What this rank's rows say.

    Attributes:
        sums: flat, float64, added up over ranks: number, sum of T and sum of exp T' of the rows that train, then of those
            that estimate, each (P,); then what `_moments` says.
        finish: from those sums over ranks to the estimate; moves the averages.
    """

    sums: Tensor
    finish: Callable[[Tensor], MineEstimate]


def pairs_within(num_modalities: int, num_experts: int) -> list[tuple[int, int]]:
    """Unordered pairs of experts inside each modality, as indices m * K + k into the views."""
    K = num_experts
    return [(m * K + j, m * K + k) for m in range(num_modalities) for j in range(K) for k in range(j + 1, K)]


def pairs_between(num_modalities: int) -> list[tuple[int, int]]:
    """Unordered pairs of modalities."""
    return [(m, n) for m in range(num_modalities) for n in range(m + 1, num_modalities)]


class Shift(NamedTuple):
    """The marginal sample: for every row of a pair the next and the one before it, cyclically, among the valid rows.

    On the valid rows the two are inverse permutations; next of an invalid row is the first valid one after it.
    Both are the row's own index where no row is valid.
    """

    next_PV: Tensor
    previous_PV: Tensor
    valid_PV: Tensor


def shift_valid(valid_PV: Tensor) -> Shift:
    """By counting, not by searching: row number c among the valid ones is followed by number c + 1.

    Args:
        valid_PV: (P, V) bool.
    """
    V = valid_PV.shape[1]
    place_PV = torch.arange(V, device=valid_PV.device).expand_as(valid_PV)
    seen_PV = valid_PV.long().cumsum(1)  # valid rows up to and with this one
    count_P1 = seen_PV[:, -1:]
    # Place of each valid row by its number; invalid rows write to a slot that nobody reads.
    place_of_PW = place_PV.new_zeros(len(valid_PV), V + 1).scatter(1, torch.where(valid_PV, seen_PV - 1, V), place_PV)
    turn = lambda number_PV: place_of_PW.gather(1, number_PV.remainder(count_P1.clamp_min(1)))  # noqa: E731
    some_P1 = count_P1 > 0
    return Shift(torch.where(some_P1, turn(seen_PV), place_PV), torch.where(some_P1, turn(seen_PV - 2), place_PV), valid_PV)


def shift_halves(train_PV: Tensor, estimate_PV: Tensor, held_out_V: Tensor) -> Shift:
    """Each half of the rows shifted within itself; `held_out_V` says which half a row is in."""
    train, estimate = shift_valid(train_PV), shift_valid(estimate_PV)
    return Shift(*(torch.where(held_out_V, of_estimate, of_train) for of_train, of_estimate in zip(train, estimate, strict=True)))


class _ShiftRows(torch.autograd.Function):
    """Rows at their next ones. Backward is a shift the other way, no scatter: invalid rows must get no gradient."""

    @staticmethod
    def forward(ctx, value_PVH: Tensor, next_PV: Tensor, previous_PV: Tensor, valid_PV: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """(P, V, H)."""
        ctx.save_for_backward(previous_PV, valid_PV)
        return value_PVH.gather(1, next_PV[..., None].expand_as(value_PVH))

    @staticmethod
    def backward(ctx, grad_PVH: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        """(P, V, H)."""
        previous_PV, valid_PV = ctx.saved_tensors
        return grad_PVH.gather(1, previous_PV[..., None].expand_as(grad_PVH)) * valid_PV[..., None], None, None, None


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

    def forward(
        self, view_SVD: Tensor, shift: Shift | None, frozen: bool, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """T on joint rows and, with a shift, on marginal pairs (row i left, the next one right), each (P, V) float32.

        Args:
            view_SVD: (S, V, D) standardised views.
            shift: the marginal sample, or None for the joint rows alone; only its valid rows may get a gradient.
            frozen: no gradient to the networks, only to the views.
            dtype: what products multiply; None is the parameters' own.
        """
        take = (lambda parameter: parameter.detach()) if frozen else (lambda parameter: parameter)
        H, own = self.first_bias_PH.shape[1], self.sides_SDH.dtype
        low = dtype or own
        sides_SVH = torch.bmm(view_SVD.to(low), take(self.sides_SDH).to(low)).to(own)
        left_PVH = sides_SVH[self.left_P, :, :H] + take(self.first_bias_PH)[:, None]
        right_PVH = sides_SVH[self.right_P, :, H:]
        first_PWH = left_PVH + right_PVH
        if shift is not None:
            shuffled_PVH = _ShiftRows.apply(right_PVH, *shift)
            # One product for both: the second layer sees joint and marginal rows side by side.
            first_PWH = torch.cat([first_PWH, left_PVH + shuffled_PVH], 1)
        first_PWH = torch.relu(first_PWH)
        if low == own:
            second_PWH = torch.baddbmm(take(self.second_bias_PH)[:, None], first_PWH, take(self.second_PHH))
        else:
            second_PWH = torch.bmm(first_PWH.to(low), take(self.second_PHH).to(low)).to(own) + take(self.second_bias_PH)[:, None]
        second_PWH = torch.relu(second_PWH)
        value_PW = (second_PWH * take(self.last_PH)[:, None]).sum(-1).float()
        if shift is None:
            return value_PW, None
        joint_PV, marginal_PV = value_PW.chunk(2, 1)
        return joint_PV, marginal_PV


class Mine(nn.Module):
    """Estimates for P pairs of S views: the networks, how they are trained and what is averaged over steps."""

    mean_exp_P: Tensor
    center_SD: Tensor
    deviation_SD: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_views: int,
        pairs: list[tuple[int, int]],
        width: int,
        hidden: int,
        generator: torch.Generator,
        compiled: bool = False,
        kernels: bool = False,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.compiled, self.kernels, self.precision = compiled, kernels, precision
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
        joint_PV, marginal_PV = self.networks(self.standardise(view_SVD), shift_valid(present_PV), frozen=True)
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
        by_kernels = self.kernels and statistics.has_kernels(view_SVD, self.products) and self.center_SD.dtype == torch.float32
        found = (self._by_kernels if by_kernels else self._by_torch)(view_SVD, present_SV, held_out_V, bounded, clip)
        # One reduction for everything that ranks must agree on.
        return found.finish(reduce(found.sums))

    def _by_torch(self, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor, bounded: bool, clip: float) -> Found:
        compiled = self.compiled and vary([view_SVD, present_SV], 1) and vary([held_out_V], 0)
        joint_PV, marginal_PV, exp_PV, train_PV, sums = (self._graph if compiled else _statistics)(
            self, view_SVD, present_SV, held_out_V, bounded=bounded, clip=clip
        )

        def finish(reduced: Tensor) -> MineEstimate:
            with torch.no_grad():
                weight_P, slope_P, *estimate = self._agree(reduced, bounded)
            # The clip bounds the exponential but not its gradient: a T' beyond the clip must still be pushed back, or
            # nothing holds T where the true information is unbounded (without this it passed 1e7 in 4,000 steps).
            pushed_PV = exp_PV * (1 + marginal_PV - marginal_PV.detach())
            loss = ((pushed_PV * train_PV).sum(1) * slope_P - (joint_PV * train_PV).sum(1) * weight_P).sum()
            return MineEstimate(loss.float(), *estimate)

        return Found(sums, finish)

    def _agree(self, reduced: Tensor, bounded: bool) -> tuple[Tensor, ...]:
        """Slopes of the loss on T and on exp T', and MineEstimate's fields behind the loss, from the sums over ranks."""
        P = len(self.mean_exp_P)
        trained_P, _, train_exp_P, count_P, joint_P, exp_P = reduced[: 6 * P].view(6, P)
        self._follow_views(reduced[6 * P :])
        n_P = count_P.clamp_min(1)
        log_mean_exp_P = torch.log((exp_P / n_P).clamp_min(1e-30))
        information_P = (joint_P / n_P - log_mean_exp_P).clamp_min(0)
        if bounded:
            information_P = torch.minimum(information_P, n_P.log())
        self._average(train_exp_P / trained_P.clamp_min(1), trained_P > 0)
        weight_P = 1 / trained_P.clamp_min(1)
        slope_P = weight_P / self.mean_exp_P.clamp_min(1e-30)
        return weight_P, slope_P, information_P.float(), n_P.log().float(), log_mean_exp_P.float(), count_P >= 2

    def _by_kernels(self, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor, bounded: bool, clip: float) -> Found:
        networks, parameters = self.networks, list(self.networks.parameters())
        rows = statistics.forward(
            view_SVD,
            present_SV,
            held_out_V if bounded else None,
            (self.center_SD, self.deviation_SD),
            (networks.left_P, networks.right_P),
            parameters,
            self.products,
            clip if bounded else math.inf,
        )
        averages = (self.mean_exp_P, self.center_SD, self.deviation_SD, self.num_updates)
        return Found(rows.sums, lambda reduced: MineEstimate(*statistics.finish(reduced, rows, averages, bounded, parameters)))

    @property
    def products(self) -> str:
        """What products of the training multiply: `precision`, or the parameters' type where that is lower."""
        own = self.networks.sides_SDH.dtype
        return self.precision if own == torch.float32 else str(own).removeprefix("torch.")

    @cached_property
    def _graph(self) -> Callable[..., tuple[Tensor, ...]]:
        return one_graph(_statistics)

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


def _statistics(
    mine: Mine, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor, *, bounded: bool, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the networks say about this rank's rows: all the work of `Mine.forward` that needs no other rank.

    Returns:
        T on joint and on marginal rows and exp of the latter, clipped with `bounded`, the rows that train, each (P, V);
        and the sums that ranks add up, flat, float64.
    """
    present_PV = present_SV[mine.networks.left_P] & present_SV[mine.networks.right_P]
    train_PV = present_PV & ~held_out_V if bounded else present_PV
    estimate_PV = present_PV & held_out_V if bounded else present_PV
    shift = shift_halves(train_PV, estimate_PV, held_out_V) if bounded else shift_valid(present_PV)
    joint_PV, marginal_PV = mine.networks(mine.standardise(view_SVD), shift, frozen=False, dtype=torch_type(mine.products))
    clipped_PV = marginal_PV.clamp(-clip, clip) if bounded else marginal_PV
    # float64: without the clip, exp of a diverging T must not overflow before anybody has seen it.
    exp_PV = clipped_PV.detach().double().exp()
    estimated_PV = joint_PV.detach()
    sums_P = [
        value_P
        for rows_PV in (train_PV, estimate_PV)
        for value_P in (rows_PV.sum(1), (estimated_PV * rows_PV).sum(1), (exp_PV * rows_PV).sum(1))
    ]
    sums = torch.cat([torch.stack([value.double() for value in sums_P]).flatten(), _moments(view_SVD, present_SV)])
    return joint_PV, marginal_PV, exp_PV, train_PV, sums


def _moments(view_SVD: Tensor, present_SV: Tensor) -> Tensor:
    """Count, column sums and column sums of squares of the present rows of each view, flat, float64."""
    # Products, not masked copies: views are the largest tensors of a step.
    present_S1V = present_SV.to(view_SVD.dtype)[:, None]
    total_SD, square_SD = torch.bmm(present_S1V, view_SVD), torch.bmm(present_S1V, view_SVD.square())
    return torch.cat([present_SV.sum(1).double(), total_SD.double().flatten(), square_SD.double().flatten()])
