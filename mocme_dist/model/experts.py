"""K experts in each of M modalities, with independent parameters and no gate, as two batched products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocme_dist.errors import ShapeError


class NoExperts(nn.Module):
    """The projection itself as a modality's one view: a control, and with structure alone plain RotatE."""

    def forward(self, x_MUD: Tensor) -> Tensor:
        """(M, U, D) to views (M, 1, U, D)."""
        return x_MUD[:, None]


class Experts(nn.Module):
    """Views (M, K, U, D) of projected entities (M, U, D): expert k of modality m is Linear-ReLU-Linear.

    The K first layers of a modality read the same input, so they are one (D, K D) product per modality; the second
    layers are M K products of (D, D). `residual` adds the input to each view. With `recompute` the backward pass
    computes the hidden layers again, with the same dropout, instead of storing M K U D numbers, for a third more
    products. In training, inputs of products are cast to `precision`; parameters and views stay float32.
    """

    def __init__(
        self,
        num_modalities: int,
        num_experts: int,
        width: int,
        dropout: float,
        residual: bool,
        generator: torch.Generator,
        recompute: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        M, K, D = num_modalities, num_experts, width
        bound = (6 / D) ** 0.5  # Kaiming uniform for ReLU: views keep the inputs' scale

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * bound)

        self.first_MDH = uniform(M, D, K * D)
        self.first_bias_MH = nn.Parameter(torch.zeros(M, K * D))
        # A residual expert starts as the identity; first layers differ, so the experts diverge with the first gradient.
        self.second_LDD = nn.Parameter(uniform(M * K, D, D).data * (0.0 if residual else 2**-0.5))
        self.second_bias_LD = nn.Parameter(torch.zeros(M * K, D))
        self.dropout = nn.Dropout(dropout)
        self.residual, self.num_experts, self.recompute = residual, num_experts, recompute
        self.precision = precision

    def divided(self) -> DividedExperts:
        """Return the same experts with a module per modality; the parameters are copies."""
        num_modalities, width = self.first_MDH.shape[:2]
        by_modality = []
        for m in range(num_modalities):
            with torch.device("meta"):
                own = Experts(
                    1,
                    self.num_experts,
                    width,
                    self.dropout.p,
                    self.residual,
                    torch.Generator(),
                    self.recompute,
                    self.precision,
                )
            for name, p in self.named_parameters():
                setattr(own, name, nn.Parameter(p.detach().chunk(num_modalities)[m].clone()))
            by_modality.append(own)
        return DividedExperts(by_modality)

    def forward(self, x_MUD: Tensor) -> Tensor:
        """(M, U, D) to views (M, K, U, D).

        Raises:
            ShapeError: the number of modalities or the width of the input is wrong.
        """
        M, U, D = x_MUD.shape
        if self.first_MDH.shape[:2] != (M, D):
            raise ShapeError(
                f"Experts: x_MUD is ({M}, {U}, {D}), expected M and D of {tuple(self.first_MDH.shape[:2])}"
            )
        x_MUD = x_MUD.to(self.first_MDH.dtype)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._views, x_MUD, use_reentrant=False)
        return self._views(x_MUD)

    def _views(self, x_MUD: Tensor) -> Tensor:
        (M, U, D), K = x_MUD.shape, self.num_experts
        low = self.precision if self.training and x_MUD.dtype == torch.float32 else x_MUD.dtype
        first_bias_MH, first_MDH, second_bias_LD, second_LDD = (
            p.to(low) for p in (self.first_bias_MH, self.first_MDH, self.second_bias_LD, self.second_LDD)
        )
        hidden_MUH = torch.relu(torch.baddbmm(first_bias_MH[:, None], x_MUD.to(low), first_MDH))
        hidden_LUD = self.dropout(hidden_MUH).view(M, U, K, D).transpose(1, 2).reshape(M * K, U, D)
        views = torch.baddbmm(second_bias_LD[:, None], hidden_LUD, second_LDD).view(M, K, U, D).to(x_MUD.dtype)
        return views + x_MUD[:, None] if self.residual else views


class DividedExperts(nn.Module):
    """Experts with a module per modality, for an engine that gathers parameters by module (ZeRO-3).

    The first axis of every parameter of `Experts` is that of the modalities; each module has one modality's share.
    """

    def __init__(self, by_modality: Sequence[Experts]) -> None:
        super().__init__()
        self.by_modality = nn.ModuleList(by_modality)

    def forward(self, x_MUD: Tensor) -> Tensor:
        """(M, U, D) to views (M, K, U, D)."""
        return torch.cat([experts(x_MUD[m : m + 1]) for m, experts in enumerate(self.by_modality)])
