"""Complementarity fusion: a view weighs more the less information it shares with its siblings.

Inside modality m the K views are mixed with w_mk = softmax_k(-mean_{j != k} I(v_mk; v_mj)); then the modalities that
an entity has are mixed with w_m = softmax_m(-mean_{n != m} I(z_m; z_n)). The information comes from `mine`, or from a
control: cosine (mean cosine similarity in its place), uniform (no weights), attention (a learned score per view).
Weights use moving averages of earlier steps, held in buffers, so evaluation uses the values that training used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mocme_dist.model.mine import Halves, Mine, MineEstimate, Reduce, find_halves, pairs_between, pairs_within


class FusionSettings(NamedTuple):
    """The fields of the fusion and mine sections of the configuration. compiled: compute estimates as one graph."""

    estimator: str
    scope: str
    weight_gradient: str
    temperature: float
    normalize: bool
    hidden: int
    ema: float
    bounded: bool
    clip: float
    rows: int
    compiled: bool = False


class Fused(NamedTuple):
    """Result of fusion.

    Attributes:
        z_VD: (V, D) fused entities.
        loss: the statistics networks' own loss, 0 for the controls.
        intra_MK: mean weight of each expert. inter_M: mean weight of each modality over the entities that have it.
        shared_M: the same over those entities that have another one beside it.
        inter_VM: the modality weights of each entity.
        modal_MVD: each modality's vector of each entity, its views mixed, in fusion's own scale.
    """

    z_VD: Tensor
    loss: Tensor
    intra_MK: Tensor
    inter_M: Tensor
    shared_M: Tensor
    inter_VM: Tensor
    modal_MVD: Tensor


# information_P, log_n_P and log_mean_exp_P of PairInformation, for pairs of experts and of modalities; None without
# pairs.
PairAverages = tuple[Tensor, Tensor, Tensor]
Averages = tuple[PairAverages | None, PairAverages | None]


class PairInformation(nn.Module):
    """The similarity of P pairs of S views, smoothed over steps: networks of `mine`, or cosine, behind one form.

    Buffers: information_P (nats, or mean cosine), log_n_P (its cap), log_mean_exp_P, seen_P (whether ever estimated).
    """

    left_P: Tensor
    right_P: Tensor
    information_P: Tensor
    log_n_P: Tensor
    log_mean_exp_P: Tensor
    seen_P: Tensor

    def __init__(
        self,
        num_views: int,
        pairs: list[tuple[int, int]],
        width: int,
        settings: FusionSettings,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings, self.num_pairs = settings, len(pairs)
        if settings.estimator == "mine" and pairs:
            self.mine = Mine(num_views, pairs, width, settings.hidden, generator, settings.compiled)
        left, right = zip(*pairs, strict=True) if pairs else ((), ())
        self.register_buffer("left_P", torch.tensor(left, dtype=torch.long), persistent=False)
        self.register_buffer("right_P", torch.tensor(right, dtype=torch.long), persistent=False)
        for name in ("information_P", "log_n_P", "log_mean_exp_P", "seen_P"):
            self.register_buffer(name, torch.zeros(len(pairs)))

    def redundancy(self, information: Tensor, log_n_P: Tensor) -> Tensor:
        """Return the softmax's argument: information, divided by log n if normalised (mine only), over the temperature.

        Args:
            information: (P,) or (P, V).
            log_n_P: (P,).
        """
        if self.settings.estimator == "mine":
            log_n = log_n_P if information.dim() == 1 else log_n_P[:, None]
            if self.settings.normalize:
                information = information / log_n.clamp_min(1e-6)
            # Before a pair's first estimate its log n is 0 and its network is untrained, so its information is ignored.
            information = torch.where(log_n > 0, information, 0.0)
        return information / self.settings.temperature

    def estimate(self, view_SVD: Tensor, present_SV: Tensor, halves: Halves, reduce: Reduce) -> MineEstimate | None:
        """Update the averages from this step's rows or an even sample; return `mine`'s estimate, None for cosine."""
        if halves.stride > 1:
            view_SVD, present_SV = view_SVD[:, :: halves.stride], present_SV[:, :: halves.stride]
        if self.settings.estimator == "cosine":
            present_PV = present_SV[self.left_P] & present_SV[self.right_P]
            with torch.no_grad():
                cosine_PV = self.cosine(view_SVD)
                total_P, count_P = reduce(torch.stack([(cosine_PV * present_PV).sum(1), present_PV.sum(1)]).double())
            self._average(
                count_P > 0,
                (total_P / count_P.clamp_min(1)).float(),
                count_P.clamp_min(1).log().float(),
                torch.zeros_like(self.seen_P),
            )
            return None
        result = self.mine(view_SVD, present_SV, halves, reduce, self.settings.bounded, self.settings.clip)
        self._average(result.valid_P, result.information_P, result.log_n_P, result.log_mean_exp_P)
        return result

    def cosine(self, view_SVD: Tensor) -> Tensor:
        """Return (P, V) cosine similarities of each pair's two views per entity."""
        unit_SVD = functional.normalize(view_SVD.float(), dim=-1)
        return (unit_SVD[self.left_P] * unit_SVD[self.right_P]).sum(-1)

    def pointwise(self, view_SVD: Tensor, log_mean_exp_P: Tensor) -> Tensor:
        """Return (P, V) T(x, y) - log E[exp T'] of each entity, or its cosine."""
        if self.settings.estimator == "cosine":
            return self.cosine(view_SVD)
        return self.mine.pointwise(view_SVD) - log_mean_exp_P[:, None]

    def differentiable(self, view_SVD: Tensor, present_SV: Tensor) -> Tensor:
        """Return (P,) this rank's estimate with a gradient to the views."""
        if self.settings.estimator == "mine":
            return self.mine.differentiable(view_SVD, present_SV, self.settings.bounded, self.settings.clip)
        present_PV = present_SV[self.left_P] & present_SV[self.right_P]
        return (self.cosine(view_SVD) * present_PV).sum(1) / present_PV.sum(1).clamp_min(1)

    def _average(self, valid_P: Tensor, information_P: Tensor, log_n_P: Tensor, log_mean_exp_P: Tensor) -> None:
        keep: Tensor = torch.where(self.seen_P > 0, self.settings.ema, 0.0)
        keep = torch.where(valid_P, keep, 1.0)
        for name, new in (("information_P", information_P), ("log_n_P", log_n_P), ("log_mean_exp_P", log_mean_exp_P)):
            buffer = getattr(self, name)
            buffer.copy_(keep * buffer + (1 - keep) * new.to(buffer.dtype))
        self.seen_P.copy_(torch.where(valid_P, 1.0, self.seen_P))


def mean_over_siblings(value: Tensor, left_P: Tensor, right_P: Tensor, num_views: int, present: Tensor) -> Tensor:
    """Return for every view the mean value of the present pairs that contain it.

    Args:
        value: (P, V) values of pairs.
        left_P, right_P: the pairs' views.
        num_views: S.
        present: (P, V) bool, which pairs count for an entity.

    Returns:
        (S, V); 0 for a view without a present pair.
    """
    shape = (num_views, *value.shape[1:])
    masked, counted = value * present, present.to(value.dtype)
    total = value.new_zeros(shape).index_add(0, left_P, masked).index_add(0, right_P, masked)
    count = value.new_zeros(shape).index_add(0, left_P, counted).index_add(0, right_P, counted)
    return total / count.clamp_min(1)


class Fusion(nn.Module):
    """Views (M, K, V, D) to fused entities (V, D)."""

    def __init__(
        self, num_modalities: int, num_experts: int, width: int, settings: FusionSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        M, K = num_modalities, num_experts
        self.shape, self.settings = (M, K), settings
        if settings.estimator in ("mine", "cosine"):
            self.intra = PairInformation(M * K, pairs_within(M, K), width, settings, generator)
            self.inter = PairInformation(M, pairs_between(M), width, settings, generator)
        if settings.estimator == "attention":
            self.intra_query_MKD = nn.Parameter(torch.randn(M, K, width, generator=generator) * width**-0.5)
            self.inter_query_MD = nn.Parameter(torch.randn(M, width, generator=generator) * width**-0.5)

    def forward(
        self, view_MKVD: Tensor, present_MV: Tensor, halves: Halves | Tensor, reduce: Reduce, estimate: bool
    ) -> Fused:
        """Mix experts, then modalities.

        Args:
            view_MKVD: (M, K, V, D) experts' views.
            present_MV: (M, V) bool; an entity without any modality gives 0 and no NaN.
            halves: entities that train the networks and those used only to estimate, see `mine`; or (V,) bool, True for
                the latter, of which an even sample of `FusionSettings.rows` takes part.
            reduce: adds a tensor over ranks.
            estimate: update the estimates and train their networks (training steps only).
        """
        mixed = self.mix(
            view_MKVD, present_MV, self.averages(), flows=estimate and self.settings.weight_gradient == "flow"
        )
        if not estimate:
            return mixed
        return mixed._replace(loss=self.estimate(view_MKVD, mixed.modal_MVD, present_MV, halves, reduce))

    def estimate(
        self, view_MKVD: Tensor, z_MVD: Tensor, present_MV: Tensor, halves: Halves | Tensor, reduce: Reduce
    ) -> Tensor:
        """Update the estimates from this step's rows; return the networks' own loss, 0 for the controls.

        It is called after `mix`, which uses the averages of earlier steps. Arguments as in `forward`; views get no
        gradient.
        """
        K, loss = self.shape[1], z_MVD.new_zeros((), dtype=torch.float32)
        if self._intra is None and self._inter is None:
            return loss
        if not isinstance(halves, Halves):
            halves = find_halves(halves, self.settings.rows)
        views = (
            (self._intra, view_MKVD.flatten(0, 1), present_MV.repeat_interleave(K, 0)),
            (self._inter, z_MVD, present_MV),
        )
        for pairs, view_SVD, present_SV in views:
            result = pairs.estimate(view_SVD.detach(), present_SV, halves, reduce) if pairs is not None else None
            loss = loss if result is None else loss + result.loss
        return loss

    @property
    def _intra(self) -> PairInformation | None:
        return self.intra if self.settings.estimator in ("mine", "cosine") and self.shape[1] > 1 else None

    @property
    def _inter(self) -> PairInformation | None:
        return self.inter if self.settings.estimator in ("mine", "cosine") and self.shape[0] > 1 else None

    def averages(self) -> Averages:
        """Return copies of the averages: `estimate` updates the buffers before autograd has used them."""

        def copy(pairs: PairInformation | None) -> PairAverages | None:
            if pairs is None:
                return None
            return pairs.information_P.clone(), pairs.log_n_P.clone(), pairs.log_mean_exp_P.clone()

        return copy(self._intra), copy(self._inter)

    def mix(self, view_MKVD: Tensor, present_MV: Tensor, averages: Averages, flows: bool) -> Fused:
        """Compute the weights and mix; a pure function of views, parameters and averages.

        Args:
            averages: see `averages`.
            flows: the weights carry a gradient of this step's estimates to the views.
        """
        M, K, V, D = view_MKVD.shape
        present_SV = present_MV.repeat_interleave(K, 0)
        intra_MKV = self._weigh_experts(view_MKVD.reshape(M * K, V, D), present_SV, averages[0], flows).view(M, K, V)
        z_MVD = (intra_MKV.to(view_MKVD.dtype)[..., None] * view_MKVD).sum(1) if K > 1 else view_MKVD[:, 0]
        inter_MV = self._weigh_modalities(z_MVD, present_MV, averages[1], flows)
        z_VD = (inter_MV.to(z_MVD.dtype)[..., None] * z_MVD).sum(0)
        with torch.no_grad():
            count_M = present_MV.sum(1).clamp_min(1)
            mean_MK = (intra_MKV * present_MV[:, None]).sum(2) / count_M[:, None]
            mean_M = (inter_MV * present_MV).sum(1) / count_M
            shared_MV = present_MV & (present_MV.sum(0) > 1)
            shared_M = (inter_MV * shared_MV).sum(1) / shared_MV.sum(1).clamp_min(1)
        zero = z_VD.new_zeros((), dtype=torch.float32)
        return Fused(z_VD, zero, mean_MK, mean_M, shared_M, inter_MV.T, z_MVD)

    def _weigh_experts(self, view_SVD: Tensor, present_SV: Tensor, average: PairAverages | None, flows: bool) -> Tensor:
        """Return (S, V) weights, which sum to 1 over the experts of a modality."""
        (M, K), V = self.shape, view_SVD.shape[1]
        if K > 1 and self.settings.estimator == "attention":
            score_SV = torch.einsum("svd,sd->sv", torch.tanh(view_SVD), self.intra_query_MKD.flatten(0, 1)).float()
            return score_SV.view(M, K, V).softmax(1)
        if self._intra is None or average is None:
            return torch.full((M * K, V), 1 / K, device=view_SVD.device)
        return (-self._redundancy(self._intra, view_SVD, present_SV, average, flows)).view(M, K, V).softmax(1)

    def _weigh_modalities(self, z_MVD: Tensor, present_MV: Tensor, average: PairAverages | None, flows: bool) -> Tensor:
        """Return (M, V) weights, which sum to 1 over the modalities of an entity; 0 if it has none."""
        score_MV = z_MVD.new_zeros(z_MVD.shape[:2], dtype=torch.float32)
        if self.settings.estimator == "attention":
            score_MV = torch.einsum("mvd,md->mv", torch.tanh(z_MVD), self.inter_query_MD).float()
        elif self._inter is not None and average is not None:
            score_MV = -self._redundancy(self._inter, z_MVD, present_MV, average, flows)
        # -1e9 instead of -inf: a row without any modality then gives finite weights, which the mask turns to 0.
        return score_MV.masked_fill(~present_MV, -1e9).softmax(0) * present_MV

    def _redundancy(
        self, pairs: PairInformation, view_SVD: Tensor, present_SV: Tensor, average: PairAverages, flows: bool
    ) -> Tensor:
        """(S, V) mean redundancy of each view with its siblings."""
        used_P, log_n_P, log_mean_exp_P = average
        present_PV = present_SV[pairs.left_P] & present_SV[pairs.right_P]
        views = view_SVD if self.settings.weight_gradient == "flow" else view_SVD.detach()
        if self.settings.scope == "entity":
            information_PV = pairs.pointwise(views, log_mean_exp_P)
        else:
            if flows:
                # The value is the average's, the gradient this step's estimate on this rank's rows.
                fresh_P = pairs.differentiable(views, present_SV)
                used_P = used_P + (fresh_P - fresh_P.detach())
            information_PV = used_P[:, None].expand(-1, view_SVD.shape[1])
        redundancy_PV = pairs.redundancy(information_PV, log_n_P)
        return mean_over_siblings(redundancy_PV, pairs.left_P, pairs.right_P, view_SVD.shape[0], present_PV)
