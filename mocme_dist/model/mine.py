"""Mutual information between views of entities, by the Donsker-Varadhan bound I >= E[T] - log E[exp T'].

All P pairs are estimated in one graph. A pair's statistics network is additive in its first layer, so each view is
projected once for its left and once for its right side, whatever the number of pairs, and pairs only add. Marginal
samples pair row i with the next row that has both views and is in the same half; the half that estimates has no
gradient.

Measured on 15,000 entities: experts that read one input are deterministic views of it, so their true information is
unbounded, and the raw estimate grew to 50 nats in 20 epochs, although n samples cannot certify more than log n. So with
`bounded` the estimate comes from the half of the entities that the networks are not trained on, T is clipped inside the
exponential (SMILE), and the result is capped at log n. Without `bounded` it is the paper's raw estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.model.compile import one_graph, vary

# Sums a tensor over ranks; the identity for one rank. The model does not know ranks, so the caller passes it in.
Reduce = Callable[[Tensor], Tensor]


class Halves(NamedTuple):
    """Which rows train the networks and which only estimate, as positions, so that a device is not asked how many.

    Attributes:
        stride: every so many rows of V take part, from row 0 on; 1 takes all.
        train_T, held_out_H: positions among those rows.
    """

    stride: int
    train_T: Tensor
    held_out_H: Tensor

    def moved(self, send: Callable[[Tensor], Tensor]) -> Halves:
        """Return the halves with their tensors moved by `send`."""
        return Halves(self.stride, send(self.train_T), send(self.held_out_H))


def find_halves(held_out_V: Tensor, rows: int = 0) -> Halves:
    """Return the halves of V rows; on a GPU this waits for the device, so it is called on the host, one step ahead.

    Args:
        held_out_V: (V,) bool, rows used only to estimate.
        rows: number of rows in an even sample that takes part; 0 takes all.
    """
    V = len(held_out_V)
    # Odd, so that a batch of consecutive ids keeps both halves of the entities.
    stride = -(-V // rows) | 1 if 0 < rows < V else 1
    sampled_N = held_out_V[::stride]
    return Halves(stride, torch.nonzero(~sampled_N).flatten(), torch.nonzero(sampled_N).flatten())


class MineEstimate(NamedTuple):
    """Result of one pass.

    Attributes:
        loss: scalar whose gradient ascends the bound of every pair (networks only).
        information_P: estimates in nats over all ranks, at least 0 and capped with `bounded`.
        log_n_P: log of the number of rows behind each estimate, the most that they can certify.
        log_mean_exp_P: log E[exp T'] over all ranks.
        valid_P: pairs with at least two rows to estimate from.
    """

    loss: Tensor
    information_P: Tensor
    log_n_P: Tensor
    log_mean_exp_P: Tensor
    valid_P: Tensor


def pairs_within(num_modalities: int, num_experts: int) -> list[tuple[int, int]]:
    """Return unordered pairs of experts inside each modality, as indices m * K + k into the views."""
    K = num_experts
    return [(m * K + j, m * K + k) for m in range(num_modalities) for j in range(K) for k in range(j + 1, K)]


def pairs_between(num_modalities: int) -> list[tuple[int, int]]:
    """Return unordered pairs of modalities."""
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
    """Return the marginal sample by counting: valid row number c is followed by number c + 1.

    Args:
        valid_PV: (P, V) bool.
    """
    V = valid_PV.shape[1]
    place_PV = torch.arange(V, device=valid_PV.device).expand_as(valid_PV)
    seen_PV = valid_PV.long().cumsum(1)  # valid rows up to and with this one
    count_P1 = seen_PV[:, -1:]
    # Place of each valid row by its number; invalid rows write to a slot that is never read.
    number_PV = torch.where(valid_PV, seen_PV - 1, V)
    place_by_number = place_PV.new_zeros(len(valid_PV), V + 1).scatter(1, number_PV, place_PV)

    def place_of(number_PV: Tensor) -> Tensor:
        found_PV = place_by_number.gather(1, number_PV.remainder(count_P1.clamp_min(1)))
        return torch.where(count_P1 > 0, found_PV, place_PV)

    return Shift(place_of(seen_PV), place_of(seen_PV - 2), valid_PV)


class _ShiftRows(torch.autograd.Function):
    """Takes each row's next row. Backward shifts the other way without a scatter; invalid rows get no gradient."""

    @staticmethod
    def forward(ctx: Any, value_PVH: Tensor, next_PV: Tensor, previous_PV: Tensor, valid_PV: Tensor) -> Tensor:
        """Shift (P, V, H)."""
        ctx.save_for_backward(previous_PV, valid_PV)
        return _rows_at(value_PVH, next_PV)

    @staticmethod
    def backward(ctx, grad_PVH: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        """Shift the gradient (P, V, H) back."""
        previous_PV, valid_PV = ctx.saved_tensors
        return _rows_at(grad_PVH, previous_PV).mul_(valid_PV[..., None]), None, None, None


def _rows_at(value_PVH: Tensor, place_PV: Tensor) -> Tensor:
    """Return (P, N, H) rows from the (P, N) places of (P, V, H).

    Whole rows are copied, where `gather` would read an index per number.
    """
    P, V, H = value_PVH.shape
    flat_N = place_PV + V * torch.arange(P, device=place_PV.device)[:, None]
    return value_PVH.flatten(0, 1).index_select(0, flat_N.flatten()).view(*place_PV.shape, H)


class StatisticsNetworks(nn.Module):
    """P networks on pairs of S views: T(x, y) = w . relu(W relu(A x + B y + b) + c)."""

    left_P: Tensor
    right_P: Tensor

    def __init__(
        self, num_views: int, pairs: list[tuple[int, int]], width: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        S, P, D, H = num_views, len(pairs), width, hidden

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * std)

        self.sides_SDH = normal(D**-0.5, S, D, 2 * H)
        self.first_bias_PH = nn.Parameter(torch.zeros(P, H))
        self.second_PHH = normal((2 / H) ** 0.5, P, H, H)
        self.second_bias_PH = nn.Parameter(torch.zeros(P, H))
        self.last_PH = normal(H**-0.5 * 0.1, P, H)
        left, right = zip(*pairs, strict=True)
        self.register_buffer("left_P", torch.tensor(left, dtype=torch.long), persistent=False)
        self.register_buffer("right_P", torch.tensor(right, dtype=torch.long), persistent=False)

    def forward(self, view_SVD: Tensor, shift: Shift | None, frozen: bool) -> tuple[Tensor, Tensor | None]:
        """Return T on joint rows and, with a shift, on marginal pairs (row i left, the next right), each (P, V)
        float32.

        Args:
            view_SVD: (S, V, D) standardised views.
            shift: the marginal sample, or None for the joint rows alone; only its valid rows may get a gradient.
            frozen: no gradient to the networks, only to the views.
        """

        def take(parameter: Tensor) -> Tensor:
            return parameter.detach() if frozen else parameter

        H = self.first_bias_PH.shape[1]
        sides_SVH = torch.bmm(view_SVD.to(self.sides_SDH.dtype), take(self.sides_SDH))
        left_PVH = sides_SVH[..., :H].index_select(0, self.left_P) + take(self.first_bias_PH)[:, None]
        right_PVH = sides_SVH[..., H:].index_select(0, self.right_P)
        first_PNH = left_PVH + right_PVH
        if shift is not None:
            shuffled_PVH = _ShiftRows.apply(right_PVH, *shift)
            # One product for both: the second layer takes N = 2 V rows, the joint and then the marginal ones.
            first_PNH = torch.cat([first_PNH, left_PVH + shuffled_PVH], 1)
        first_PNH = torch.relu_(first_PNH)
        second_PNH = torch.baddbmm(take(self.second_bias_PH)[:, None], first_PNH, take(self.second_PHH))
        value_PN = torch.bmm(torch.relu_(second_PNH), take(self.last_PH)[..., None])[..., 0].float()
        if shift is None:
            return value_PN, None
        joint_PV, marginal_PV = value_PN.chunk(2, 1)
        return joint_PV, marginal_PV


class Mine(nn.Module):
    """Estimates for P pairs of S views: the networks, their training, and averages over steps."""

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
    ) -> None:
        super().__init__()
        self.compiled = compiled
        self.networks = StatisticsNetworks(num_views, pairs, width, hidden, generator)
        # Moving average of E[exp T'] of the training half: MINE's correction of the gradient's bias.
        self.register_buffer("mean_exp_P", torch.zeros(len(pairs)))
        # Moving mean and deviation of each view's columns over all ranks. Views are standardised with those of earlier
        # steps, so a row's T depends on the row alone, in training and in evaluation, at any world size.
        self.register_buffer("center_SD", torch.zeros(num_views, width))
        self.register_buffer("deviation_SD", torch.ones(num_views, width))
        self.register_buffer("num_updates", torch.zeros(1))

    def standardise(self, view_SVD: Tensor) -> Tensor:
        """Return views with zero mean and unit deviation per column: it helps training and keeps the information."""
        # Copies, because `forward` updates the buffers before autograd has used them.
        return (view_SVD.float() - self.center_SD[:, None].clone()).div_(self.deviation_SD[:, None].clone())

    def pointwise(self, view_SVD: Tensor) -> Tensor:
        """Return (P, V) T of each entity's own pair of views, with a gradient to the views only."""
        return self.networks(self.standardise(view_SVD), None, frozen=True)[0]

    def differentiable(self, view_SVD: Tensor, present_SV: Tensor, bounded: bool, clip: float) -> Tensor:
        """Return (P,) this rank's estimate from all its rows, with a gradient to the views only."""
        present_PV = present_SV[self.networks.left_P] & present_SV[self.networks.right_P]
        joint_PV, marginal_PV = self.networks(self.standardise(view_SVD), shift_valid(present_PV), frozen=True)
        marginal_PV = marginal_PV.clamp(-clip, clip) if bounded else marginal_PV
        n_P = present_PV.sum(1).clamp_min(1)
        log_mean_exp_P = torch.logsumexp(marginal_PV.masked_fill(~present_PV, -1e9), 1) - n_P.log()
        return (joint_PV * present_PV).sum(1) / n_P - log_mean_exp_P

    def forward(
        self, view_SVD: Tensor, present_SV: Tensor, halves: Halves | Tensor, reduce: Reduce, bounded: bool, clip: float
    ) -> MineEstimate:
        """Train on one half of the rows, estimate on the other.

        Args:
            view_SVD: (S, V, D) views; they get no gradient.
            present_SV: (S, V) bool, whether an entity has the view.
            halves: of the rows, or (V,) bool, True for rows used only to estimate. Without `bounded` all rows both
                train and estimate.
            reduce: adds a tensor over ranks.
            bounded, clip: see the mine section of the configuration.
        """
        # float32 for the views' sums too: in bfloat16 the square of a mean would hide a small variance.
        view_SVD = view_SVD.detach().to(torch.promote_types(view_SVD.dtype, torch.float32))
        clip = clip if bounded else math.inf
        if not isinstance(halves, Halves):
            halves = find_halves(halves)
        trained = self._on_rows(view_SVD, present_SV, halves.train_T if bounded else None, clip)
        with torch.no_grad():
            estimated = self._on_rows(view_SVD, present_SV, halves.held_out_H, clip) if bounded else trained
            # One reduction for all values that ranks must agree on.
            reduced = reduce(torch.cat([trained.sums, estimated.sums, _moments(view_SVD, present_SV)]))
            weight_P, exp_weight_P, *estimate = self._agree(reduced, bounded)
        joint_PV, marginal_PV, exp_PV, train_PV, _ = trained
        # The clip bounds the exponential but not its gradient. A T' beyond the clip must still be pushed back, or T is
        # unbounded where the true information is (without this it exceeded 1e7 in 4,000 steps).
        pushed_PV = exp_PV * (1 + marginal_PV - marginal_PV.detach())
        loss = ((pushed_PV * train_PV).sum(1) * exp_weight_P - (joint_PV * train_PV).sum(1) * weight_P).sum()
        return MineEstimate(loss.float(), *estimate)

    def _agree(self, reduced: Tensor, bounded: bool) -> tuple[Tensor, ...]:
        """Return the loss's weights of T and of exp T', and MineEstimate's other fields, from the sums over ranks."""
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
        exp_weight_P = weight_P / self.mean_exp_P.clamp_min(1e-30)
        return weight_P, exp_weight_P, information_P.float(), n_P.log().float(), log_mean_exp_P.float(), count_P >= 2

    def _on_rows(self, view_SVD: Tensor, present_SV: Tensor, rows_T: Tensor | None, clip: float) -> Statistics:
        """Return the statistics of some rows, None for all."""
        if rows_T is not None:
            S = len(view_SVD)
            view_SVD, present_SV = _rows_at(view_SVD, rows_T.expand(S, -1)), present_SV.index_select(1, rows_T)
        compiled = self.compiled and not torch.compiler.is_compiling() and vary([view_SVD, present_SV], 1)
        return (self._graph if compiled else _statistics)(self, view_SVD, present_SV, clip=clip)

    @cached_property
    def _graph(self) -> Callable[..., Statistics]:
        return one_graph(_statistics)

    def _follow_views(self, moments: Tensor) -> None:
        """Update the moving mean and deviation of the columns by this step's, which `_moments` summed over ranks."""
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
        """Update the averages of the pairs that had rows to train on."""
        moved_P = torch.where(self.mean_exp_P == 0, mean_exp_P, 0.9 * self.mean_exp_P + 0.1 * mean_exp_P)
        # A step without rows would count as E[exp T'] = 0, and the gradient is divided by the average.
        self.mean_exp_P.copy_(torch.where(moves_P, moved_P, self.mean_exp_P))


class Statistics(NamedTuple):
    """Outputs of the networks on rows that are shifted among themselves.

    Attributes:
        joint_PV, marginal_PV: T on joint and on marginal rows.
        exp_PV: exp of the clipped T on marginal rows, float64, without a gradient.
        present_PV: rows that have both views.
        sums: number of those rows and their sums of T and of exp T', each (P,); flat, float64.
    """

    joint_PV: Tensor
    marginal_PV: Tensor
    exp_PV: Tensor
    present_PV: Tensor
    sums: Tensor


def _statistics(mine: Mine, view_SVD: Tensor, present_SV: Tensor, *, clip: float) -> Statistics:
    """Do the work of `Mine.forward` on one half of the rows that needs no other rank."""
    present_PV = present_SV[mine.networks.left_P] & present_SV[mine.networks.right_P]
    joint_PV, marginal_PV = mine.networks(mine.standardise(view_SVD), shift_valid(present_PV), frozen=False)
    # float64: without the clip, exp of a diverging T must not overflow before anybody has seen it.
    exp_PV = marginal_PV.detach().clamp(-clip, clip).double().exp()
    sums_P = present_PV.sum(1), (joint_PV.detach() * present_PV).sum(1), (exp_PV * present_PV).sum(1)
    return Statistics(joint_PV, marginal_PV, exp_PV, present_PV, torch.cat([value_P.double() for value_P in sums_P]))


def _moments(view_SVD: Tensor, present_SV: Tensor) -> Tensor:
    """Count, column sums and column sums of squares of the present rows of each view, flat, float64."""
    # Products, not masked copies: views are the largest tensors of a step.
    present_S1V = present_SV.to(view_SVD.dtype)[:, None]
    total_SD, square_SD = torch.bmm(present_S1V, view_SVD), torch.bmm(present_S1V, view_SVD.square())
    return torch.cat([present_SV.sum(1).double(), total_SD.double().flatten(), square_SD.double().flatten()])
