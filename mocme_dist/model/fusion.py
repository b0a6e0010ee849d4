"""Complementarity fusion: what shares least with its siblings weighs most.

Inside modality m the K views are mixed with w_mk = softmax_k(-mean_{j != k} I(v_mk; v_mj)); then the modalities that
an entity has are mixed with w_m = softmax_m(-mean_{n != m} I(z_m; z_n)). The information comes from `mine`, or from a
control: cosine (mean cosine similarity in its place), uniform (no weights), attention (a learned score per view).
Weights use moving averages held in buffers, those of the steps before, so evaluation uses what training used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mocme_dist.model.mine import Mine, MineEstimate, Reduce, pairs_between, pairs_within


class FusionSettings(NamedTuple):
    """Fields as in the fusion and mine sections of the configuration.

    compiled: the estimates as one graph. kernels: by the C++ kernels where they can run.
    """

    estimator: str = "mine"
    scope: str = "global"
    weight_gradient: str = "stop"
    temperature: float = 1.0
    normalize: bool = True
    hidden: int = 64
    ema: float = 0.95
    bounded: bool = True
    clip: float = 10.0
    rows: int = 0
    precision: str = "float32"
    compiled: bool = False
    kernels: bool = False


class Fused(NamedTuple):
    """What fusion gives.

    Attributes:
        z_VD: (V, D) fused entities.
        loss: the statistics networks' own loss, 0 for the controls.
        intra_MK: mean weight of each expert. inter_M: mean weight of each modality over the entities that have it.
        inter_VM: the modality weights of each entity.
        modal_MVD: what each modality says of each entity, its views mixed, without a gradient; scale as inside fusion.
    """

    z_VD: Tensor
    loss: Tensor
    intra_MK: Tensor
    inter_M: Tensor
    inter_VM: Tensor
    modal_MVD: Tensor


# information_P, log_n_P and log_mean_exp_P of PairInformation; of the experts' pairs and of the modalities', None without pairs.
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
        self, num_views: int, pairs: list[tuple[int, int]], width: int, settings: FusionSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.settings, self.num_pairs = settings, len(pairs)
        if settings.estimator == "mine" and pairs:
            how = (settings.compiled, settings.kernels, settings.precision)
            self.mine = Mine(num_views, pairs, width, settings.hidden, generator, *how)
        left, right = zip(*pairs, strict=True) if pairs else ((), ())
        self.register_buffer("left_P", torch.tensor(left, dtype=torch.long), persistent=False)
        self.register_buffer("right_P", torch.tensor(right, dtype=torch.long), persistent=False)
        for name in ("information_P", "log_n_P", "log_mean_exp_P", "seen_P"):
            self.register_buffer(name, torch.zeros(len(pairs)))

    def redundancy(self, information: Tensor, log_n_P: Tensor) -> Tensor:
        """What enters the softmax: information, divided by log n when normalised (mine only), over the temperature.

        Args:
            information: (P,) or (P, V).
            log_n_P: (P,).
        """
        if self.settings.estimator == "mine":
            log_n = log_n_P if information.dim() == 1 else log_n_P[:, None]
            if self.settings.normalize:
                information = information / log_n.clamp_min(1e-6)
            # Before a pair's first estimate its log n is 0 and its network untrained: it says nothing about anybody.
            information = torch.where(log_n > 0, information, 0.0)
        return information / self.settings.temperature

    def estimate(self, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor, reduce: Reduce) -> MineEstimate | None:
        """Update the averages from this step's rows, or from an even sample of them; the estimate of `mine`, None for cosine."""
        if 0 < self.settings.rows < view_SVD.shape[1]:
            # Odd, so that a batch of consecutive ids keeps both halves of the entities.
            stride = -(-view_SVD.shape[1] // self.settings.rows) | 1
            view_SVD, present_SV, held_out_V = view_SVD[:, ::stride], present_SV[:, ::stride], held_out_V[::stride]
        if self.settings.estimator == "cosine":
            present_PV = present_SV[self.left_P] & present_SV[self.right_P]
            with torch.no_grad():
                cosine_PV = self.cosine(view_SVD)
                total_P, count_P = reduce(torch.stack([(cosine_PV * present_PV).sum(1), present_PV.sum(1)]).double())
            self._average(
                count_P > 0, (total_P / count_P.clamp_min(1)).float(), count_P.clamp_min(1).log().float(), torch.zeros_like(self.seen_P)
            )
            return None
        result = self.mine(view_SVD, present_SV, held_out_V, reduce, self.settings.bounded, self.settings.clip)
        self._average(result.valid_P, result.information_P, result.log_n_P, result.log_mean_exp_P)
        return result

    def cosine(self, view_SVD: Tensor) -> Tensor:
        """(P, V) cosine similarity of each pair's two views, entity by entity."""
        unit_SVD = functional.normalize(view_SVD.float(), dim=-1)
        return (unit_SVD[self.left_P] * unit_SVD[self.right_P]).sum(-1)

    def pointwise(self, view_SVD: Tensor, log_mean_exp_P: Tensor) -> Tensor:
        """(P, V) T(x, y) - log E[exp T'] of each entity, or its cosine."""
        if self.settings.estimator == "cosine":
            return self.cosine(view_SVD)
        return self.mine.pointwise(view_SVD) - log_mean_exp_P[:, None]

    def differentiable(self, view_SVD: Tensor, present_SV: Tensor) -> Tensor:
        """(P,) this rank's estimate with a gradient to the views."""
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
    """For every view the mean of a pair's value over the pairs it is in, counting pairs that are present.

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

    def __init__(self, num_modalities: int, num_experts: int, width: int, settings: FusionSettings, generator: torch.Generator) -> None:
        super().__init__()
        M, K = num_modalities, num_experts
        self.shape, self.settings = (M, K), settings
        if settings.estimator in ("mine", "cosine"):
            self.intra = PairInformation(M * K, pairs_within(M, K), width, settings, generator)
            self.inter = PairInformation(M, pairs_between(M), width, settings, generator)
        if settings.estimator == "attention":
            self.intra_query_MKD = nn.Parameter(torch.randn(M, K, width, generator=generator) * width**-0.5)
            self.inter_query_MD = nn.Parameter(torch.randn(M, width, generator=generator) * width**-0.5)

    def forward(self, view_MKVD: Tensor, present_MV: Tensor, held_out_V: Tensor, reduce: Reduce, estimate: bool) -> Fused:
        """Mix experts, then modalities.

        Args:
            view_MKVD: (M, K, V, D) experts' views.
            present_MV: (M, V) bool; an entity without any modality gives 0 and no NaN.
            held_out_V: (V,) entities whose rows only estimate, see `mine`.
            reduce: adds a tensor over ranks.
            estimate: update the estimates and train their networks (training steps only).
        """
        mixed = self.mix(view_MKVD, present_MV, self.averages(), flows=estimate and self.settings.weight_gradient == "flow")
        if not estimate:
            return mixed
        return mixed._replace(loss=self.estimate(view_MKVD, mixed.modal_MVD, present_MV, held_out_V, reduce))

    def estimate(self, view_MKVD: Tensor, z_MVD: Tensor, present_MV: Tensor, held_out_V: Tensor, reduce: Reduce) -> Tensor:
        """Update the estimates from this step's rows; the networks' own loss, 0 for the controls.

        After `mix`, which uses the averages of the steps before. Arguments as in `forward`; no gradient to the views.
        """
        K, loss = self.shape[1], z_MVD.new_zeros((), dtype=torch.float32)
        views = ((self._intra, view_MKVD.flatten(0, 1), present_MV.repeat_interleave(K, 0)), (self._inter, z_MVD, present_MV))
        for pairs, view_SVD, present_SV in views:
            result = pairs.estimate(view_SVD.detach(), present_SV, held_out_V, reduce) if pairs is not None else None
            loss = loss if result is None else loss + result.loss
        return loss

    @property
    def _intra(self) -> PairInformation | None:
        return self.intra if self.settings.estimator in ("mine", "cosine") and self.shape[1] > 1 else None

    @property
    def _inter(self) -> PairInformation | None:
        return self.inter if self.settings.estimator in ("mine", "cosine") and self.shape[0] > 1 else None

    def averages(self) -> Averages:
        """Those of the steps before, as copies: `estimate` moves the buffers before autograd has used them."""
        copy = lambda pairs: None if pairs is None else (pairs.information_P.clone(), pairs.log_n_P.clone(), pairs.log_mean_exp_P.clone())  # noqa: E731
        return copy(self._intra), copy(self._inter)

    def mix(self, view_MKVD: Tensor, present_MV: Tensor, averages: Averages, flows: bool) -> Fused:
        """The weights and what they make; a pure function of views, parameters and averages.

        Args:
            averages: see there.
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
        zero = z_VD.new_zeros((), dtype=torch.float32)
        return Fused(z_VD, zero, mean_MK, mean_M, inter_MV.T, z_MVD.detach())

    def _weigh_experts(self, view_SVD: Tensor, present_SV: Tensor, average: PairAverages | None, flows: bool) -> Tensor:
        """(S, V), summing to 1 over the experts of a modality."""
        (M, K), V = self.shape, view_SVD.shape[1]
        if K > 1 and self.settings.estimator == "attention":
            score_SV = torch.einsum("svd,sd->sv", torch.tanh(view_SVD), self.intra_query_MKD.flatten(0, 1)).float()
            return score_SV.view(M, K, V).softmax(1)
        if self._intra is None or average is None:
            return torch.full((M * K, V), 1 / K, device=view_SVD.device)
        return (-self._redundancy(self._intra, view_SVD, present_SV, average, flows)).view(M, K, V).softmax(1)

    def _weigh_modalities(self, z_MVD: Tensor, present_MV: Tensor, average: PairAverages | None, flows: bool) -> Tensor:
        """(M, V), summing to 1 over the modalities that an entity has; 0 without any."""
        score_MV = z_MVD.new_zeros(z_MVD.shape[:2], dtype=torch.float32)
        if self.settings.estimator == "attention":
            score_MV = torch.einsum("mvd,md->mv", torch.tanh(z_MVD), self.inter_query_MD).float()
        elif self._inter is not None and average is not None:
            score_MV = -self._redundancy(self._inter, z_MVD, present_MV, average, flows)
        # -1e9 and not -inf: a row without any modality then gives finite weights, which the mask turns to 0.
        return score_MV.masked_fill(~present_MV, -1e9).softmax(0) * present_MV

    def _redundancy(self, pairs: PairInformation, view_SVD: Tensor, present_SV: Tensor, average: PairAverages, flows: bool) -> Tensor:
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
