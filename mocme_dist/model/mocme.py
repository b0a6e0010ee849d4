"""MoCME: from an entity's row and features to one fused vector, and from queries to the loss.

The parts are in projection, experts, mine, fusion, rotate, entropy and loss; this module puts them in order. It sees
tensors on one device. Ranks, tables and engines are elsewhere; what must be summed over ranks goes through `reduce`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError
from mocme_dist.model.experts import Experts, NoExperts
from mocme_dist.model.fusion import Averages, Fused, Fusion, FusionSettings
from mocme_dist.model.graphs import one_graph, vary
from mocme_dist.model.mine import Reduce
from mocme_dist.model.precision import torch_type
from mocme_dist.model.projection import Projections
from mocme_dist.model.rotate import Relations


class ModelSettings(NamedTuple):
    """Sizes and switches; see the projection, experts and fusion sections of the configuration.

    compiled: training encodes by one compiled graph; evaluation never does, so that its vectors do not depend on it.
    precision: what products of projections and experts multiply in training; evaluation takes float32.
    kernels: experts and estimates run by the C++ kernels where they can.
    """

    width: int = 256
    num_experts: int = 3
    experts: str = "mlp"
    residual: bool = False
    experts_dropout: float = 0.0
    projection_hidden: int | None = None
    projection_dropout: float = 0.0
    structure: str = "mlp"
    gamma: float = 12.0
    fusion: FusionSettings = FusionSettings()
    recompute: bool = False
    precision: str = "float32"
    compiled: bool = False
    kernels: bool = False


def alone(value: Tensor) -> Tensor:
    """The sum over ranks where there is one rank."""
    return value


class MoCME(nn.Module):
    """Mixture of complementary modality experts with RotatE relations.

    Args:
        raw_widths: raw feature width of each modality; its order is the order of M. "structure" is an entity's own
            row and has width D.
        num_relations: R.
        settings: see `ModelSettings`.
        seed: of the initial weights, the same on every rank.
    """

    def __init__(self, raw_widths: Mapping[str, int], num_relations: int, settings: ModelSettings, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        M, K, D = len(raw_widths), settings.num_experts, settings.width
        if raw_widths.get("structure", D) != D:
            raise ShapeError(f"MoCME: structure rows have width {raw_widths['structure']}, expected D = {D}")
        self.modalities, self.settings = tuple(raw_widths), settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # Linear layers initialise from the global generator
            self.projections = Projections(
                raw_widths,
                settings.projection_hidden or D,
                D,
                settings.projection_dropout,
                settings.structure,
                torch_type(settings.precision),
            )
        mixed = settings.experts == "mlp"
        self.experts = (
            Experts(
                M, K, D, settings.experts_dropout, settings.residual, generator, settings.recompute, settings.precision, settings.kernels
            )
            if mixed
            else NoExperts()
        )
        self.fusion = Fusion(M, K, D, settings.fusion._replace(compiled=settings.compiled, kernels=settings.kernels), generator)
        self.relations = Relations(num_relations, D, generator)
        # RotatE's initial range: with parts near 1 the distances of D / 2 moduli start near gamma, not far above.
        self.scale = (settings.gamma + 2) / D

    def encode(
        self,
        raw: Mapping[str, Tensor],
        present_MV: Tensor,
        held_out_V: Tensor | None = None,
        reduce: Reduce = alone,
        estimate: bool = False,
    ) -> Fused:
        """Fuse V entities.

        Args:
            raw: (V, F) features of each modality; rows where it is absent are ignored, whatever finite numbers they hold.
            present_MV: (M, V) bool.
            held_out_V: (V,) entities that only estimate mutual information; needed with `estimate`.
            reduce: adds a tensor over ranks.
            estimate: train and update the information estimates; False in evaluation.

        Raises:
            ShapeError: the modalities are not those of the model.
        """
        if set(raw) != set(self.modalities):
            raise ShapeError(f"MoCME.encode: features of {sorted(raw)}, expected {sorted(self.modalities)}")
        fusion = self.settings.fusion
        flows = estimate and fusion.weight_gradient == "flow"
        # Gradients that pass through the statistics networks need buffers that `estimate` moves: only copies would do.
        plain = fusion.weight_gradient == "stop" and fusion.scope == "global"
        compiled = self.settings.compiled and plain and self.training and torch.is_grad_enabled()
        compiled = compiled and vary(list(raw.values()), 0) and vary([present_MV], 1)
        z_VD, view_MKVD, fused = (self._graph if compiled else _mix)(self, dict(raw), present_MV, self.fusion.averages(), flows)
        if estimate:
            held_out_V = torch.zeros(present_MV.shape[1], dtype=torch.bool, device=present_MV.device) if held_out_V is None else held_out_V
            fused = fused._replace(loss=self.fusion.estimate(view_MKVD, fused.modal_MVD, present_MV, held_out_V, reduce))
        return fused._replace(z_VD=z_VD)

    @cached_property
    def _graph(self) -> Callable[..., tuple[Tensor, Tensor, Fused]]:
        return one_graph(_mix)


def _mix(model: MoCME, raw: dict[str, Tensor], present_MV: Tensor, averages: Averages, flows: bool) -> tuple[Tensor, Tensor, Fused]:
    """What `encode` does before it estimates: scaled vectors (V, D), the experts' views, and what fusion gives."""
    x_MVD = model.projections(raw) * present_MV[..., None]
    view_MKVD = model.experts(x_MVD)
    fused = model.fusion.mix(view_MKVD, present_MV, averages, flows)
    return fused.z_VD.float() * model.scale, view_MKVD.detach(), fused
