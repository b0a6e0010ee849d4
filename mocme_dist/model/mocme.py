"""MoCME: from an entity's row and features to one fused vector, and from queries to the loss.

The parts are in projection, experts, mine, fusion, rotate, entropy and loss; this module puts them in order. It sees
tensors on one device. Ranks, tables and engines are elsewhere; what must be summed over ranks goes through `reduce`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocme_dist.errors import ShapeError
from mocme_dist.model.experts import Experts, NoExperts
from mocme_dist.model.fusion import Fused, Fusion, FusionSettings
from mocme_dist.model.mine import Reduce
from mocme_dist.model.projection import Projections
from mocme_dist.model.rotate import Relations


class ModelSettings(NamedTuple):
    """Sizes and switches; see the projection, experts and fusion sections of the configuration."""

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
            self.projections = Projections(raw_widths, settings.projection_hidden or D, D, settings.projection_dropout, settings.structure)
        mixed = settings.experts == "mlp"
        self.experts = Experts(M, K, D, settings.experts_dropout, settings.residual, generator) if mixed else NoExperts()
        self.fusion = Fusion(M, K, D, settings.fusion, generator)
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
        x_MVD = self.projections(raw) * present_MV[..., None]
        view_MKVD = self.experts(x_MVD)
        if held_out_V is None:
            held_out_V = torch.zeros(present_MV.shape[1], dtype=torch.bool, device=present_MV.device)
        fused = self.fusion(view_MKVD, present_MV, held_out_V, reduce, estimate)
        return fused._replace(z_VD=fused.z_VD.float() * self.scale)
