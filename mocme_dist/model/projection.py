"""Projections from each modality's raw width to D: Linear-ReLU-Linear, one per modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Rows of a bfloat16 product on a CPU are padded to a multiple of this: each new shape is compiled for milliseconds.
_ROWS = 256


class Projection(nn.Module):
    """One modality's projection; raw features are standardised first with fixed statistics.

    Statistics are those of the present entities, set once before training (`set_statistics`); the structure
    modality has none. In training, inputs of products are cast to `precision`; everything else stays float32.
    """

    mean_F: Tensor
    scale_F: Tensor

    def __init__(
        self, raw_width: int, hidden: int, width: int, dropout: float, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.precision = precision
        self.first = nn.Linear(raw_width, hidden)
        self.second = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean_F", torch.zeros(raw_width))
        self.register_buffer("scale_F", torch.ones(raw_width))

    def set_statistics(self, mean_F: Tensor, std_F: Tensor) -> None:
        """Set the statistics of standardisation; nearly constant columns are only centred."""
        self.mean_F.copy_(mean_F)
        self.scale_F.copy_(torch.where(std_F > 1e-6, 1 / std_F.clamp_min(1e-6), torch.ones_like(std_F)))

    def forward(self, raw_UF: Tensor) -> Tensor:
        """Map (U, F) raw features to (U, D)."""
        own, U = self.first.weight.dtype, len(raw_UF)
        low = self.precision if self.training and own == torch.float32 else own
        standard_UF = (raw_UF.float() - self.mean_F.float()) * self.scale_F.float()
        if low == torch.bfloat16 and standard_UF.device.type == "cpu":
            standard_UF = nn.functional.pad(standard_UF, (0, 0, 0, -U % _ROWS))
        return self.dropout(_linear(self.second, torch.relu(_linear(self.first, standard_UF.to(low))))[:U].to(own))


def _linear(layer: nn.Linear, x_UF: Tensor) -> Tensor:
    """Apply the layer in the type of its input."""
    if x_UF.dtype == layer.weight.dtype:
        return layer(x_UF)  # type: ignore[no-any-return]
    return nn.functional.linear(x_UF, layer.weight.to(x_UF.dtype), layer.bias.to(x_UF.dtype))


class Projections(nn.Module):
    """The projections of all modalities; the order of `raw_widths` is the order of M everywhere."""

    def __init__(
        self,
        raw_widths: Mapping[str, int],
        hidden: int,
        width: int,
        dropout: float,
        structure: str,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict(
            {
                name: nn.Identity()
                if name == "structure" and structure == "identity"
                else Projection(raw, hidden, width, dropout, precision)
                for name, raw in raw_widths.items()
            }
        )

    def forward(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Map raw features (U, F) of each modality to (M, U, D)."""
        projected = [projection(raw[name]) for name, projection in self.by_modality.items()]
        return torch.stack([x_UD.to(projected[-1].dtype) for x_UD in projected])
