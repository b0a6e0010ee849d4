"""MoCME: encodes an entity's row and features as one fused vector.

The parts are in projection, experts, mine, fusion and rotate; this module puts them in order. It handles tensors on one
device. Ranks, tables and engines are elsewhere; values that must be summed over ranks go through `reduce`.

Source: "Complementarity-driven Representation Learning for Multi-modal Knowledge Graph Completion", arXiv:2507.20620.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError
from mocme_dist.model.blocks import LateFusion, make_blocks
from mocme_dist.model.compile import one_graph, vary
from mocme_dist.model.experts import Experts, NoExperts
from mocme_dist.model.fusion import Averages, Fused, Fusion, FusionSettings
from mocme_dist.model.mine import Halves, Reduce
from mocme_dist.model.projection import Projections
from mocme_dist.model.rotate import Relations


class ModelSettings(NamedTuple):
    """Sizes and switches; see the projection, experts and fusion sections of the configuration.

    Attributes:
        width: of a whole vector.
        form: "sum", the fused vector, or "blocks", the modalities' vectors beside it (see `blocks`).
        precision: torch's name of the type of products of projections and experts in training; evaluation uses float32.
        compiled: training encodes by one compiled graph; evaluation never does, so its vectors do not depend on it.
    """

    width: int
    num_experts: int
    experts: str
    residual: bool
    experts_dropout: float
    projection_hidden: int | None
    projection_dropout: float
    structure: str
    gamma: float
    form: str
    fusion: FusionSettings
    recompute: bool
    precision: str
    compiled: bool = False


def alone(value: Tensor) -> Tensor:
    """Return `value`: the sum over ranks if there is one rank."""
    return value


class MoCME(nn.Module):
    """Mixture of complementary modality experts with RotatE relations.

    Args:
        raw_widths: raw feature width of each modality; its order is the order of M. "structure" is an entity's own
            row and has the width of a block: D, except for the form "blocks".
        num_relations: R.
        settings: see `ModelSettings`.
        seed: of the initial weights, the same on every rank.
    """

    def __init__(
        self, raw_widths: Mapping[str, int], num_relations: int, settings: ModelSettings, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = make_blocks(settings.form, len(raw_widths), settings.width)
        M, K, D = len(raw_widths), settings.num_experts, self.blocks.width
        precision: torch.dtype = getattr(torch, settings.precision)
        if raw_widths.get("structure", D) != D:
            raise ShapeError(f"MoCME: structure rows have width {raw_widths['structure']}, expected D = {D}")
        self.modalities, self.settings = tuple(raw_widths), settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # Linear layers initialise from the global generator
            self.projections = Projections(
                raw_widths,
                settings.projection_hidden or settings.width,
                D,
                settings.projection_dropout,
                settings.structure,
                precision,
            )
        self.experts: nn.Module = NoExperts()
        if settings.experts == "mlp":
            dropout, residual, recompute = settings.experts_dropout, settings.residual, settings.recompute
            self.experts = Experts(M, K, D, dropout, residual, generator, recompute, precision)
        self.fusion = Fusion(M, K, D, settings.fusion._replace(compiled=settings.compiled), generator)
        self.late = LateFusion(M, D) if self.blocks.num > 1 else None
        self.relations = Relations(num_relations, self.blocks.total, generator)
        # RotatE's initial range: with parts near 1 the distances of D / 2 moduli start near gamma, not far above.
        self.scale = (settings.gamma + 2) / D

    def encode(
        self,
        raw: Mapping[str, Tensor],
        present_MV: Tensor,
        halves: Halves | Tensor | None = None,
        reduce: Reduce = alone,
        estimate: bool = False,
    ) -> Fused:
        """Fuse V entities.

        Args:
            raw: (V, F) features of each modality; rows of absent features are ignored, but must be finite.
            present_MV: (M, V) bool.
            halves: entities that train the statistics networks and those used only to estimate, or (V,) bool, True for
                the latter; needed with `estimate`.
            reduce: adds a tensor over ranks.
            estimate: train and update the information estimates; False in evaluation.

        Raises:
            ShapeError: the modalities are not those of the model.
        """
        if set(raw) != set(self.modalities):
            raise ShapeError(f"MoCME.encode: features of {sorted(raw)}, expected {sorted(self.modalities)}")
        fusion = self.settings.fusion
        flows = estimate and fusion.weight_gradient == "flow"
        # With gradients through the statistics networks the graph would read buffers that `estimate` updates.
        plain = fusion.weight_gradient == "stop" and fusion.scope == "global"
        compiled = self.settings.compiled and plain and self.training and torch.is_grad_enabled()
        compiled = compiled and not torch.compiler.is_compiling()  # a larger graph contains this one
        compiled = compiled and vary(list(raw.values()), 0) and vary([present_MV], 1)
        z_VD, view_MKVD, fused = (self._graph if compiled else _mix)(
            self, dict(raw), present_MV, self.fusion.averages(), flows
        )
        if estimate:
            if halves is None:
                halves = torch.zeros(present_MV.shape[1], dtype=torch.bool, device=present_MV.device)
            loss = self.fusion.estimate(view_MKVD, fused.modal_MVD, present_MV, halves, reduce)
            fused = fused._replace(loss=loss)
        return fused._replace(z_VD=z_VD)

    @cached_property
    def _graph(self) -> Callable[..., tuple[Tensor, Tensor, Fused]]:
        return one_graph(_mix)


def _mix(
    model: MoCME, raw: dict[str, Tensor], present_MV: Tensor, averages: Averages, flows: bool
) -> tuple[Tensor, Tensor, Fused]:
    """Return scaled vectors (V, D), the experts' views and the result of fusion: `encode` without the estimates."""
    x_MVD = model.projections(raw) * present_MV[..., None]
    view_MKVD = model.experts(x_MVD)
    fused = model.fusion.mix(view_MKVD, present_MV, averages, flows)
    z_VD = fused.z_VD if model.late is None else model.late(fused.modal_MVD, present_MV, fused.z_VD)
    return z_VD.float() * model.scale, view_MKVD.detach(), fused._replace(modal_MVD=fused.modal_MVD.detach())
