"""The original RotatE code's formulation of a training step, written anew from its description, in eager torch.

Sun et al. 2019, section 3 and the layout that its code is known for: a dense table of entities, negatives looked up as
rows, real and imaginary parts apart, their norm, self-adversarial weights, Adam over the whole table. Two forms:
every query with N negatives of its own, as published, and N negatives shared by the queries of a chunk, as
GPU trainers do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class EagerRotatE(nn.Module):
    """Entities (E, D), phases (R, C), and the margin loss with self-adversarial weights."""

    def __init__(self, rows_ED: Tensor, phase_RC: Tensor, gamma: float) -> None:
        super().__init__()
        self.entity = nn.Parameter(rows_ED.detach().clone())
        self.phase = nn.Parameter(phase_RC.detach().clone())
        self.gamma = gamma

    def query(self, source: Tensor, relation: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated sources, real and imaginary parts."""
        real, imaginary = self.entity[source].chunk(2, -1)
        angle = self.phase[relation] * sign[..., None]
        cos, sin = torch.cos(angle), torch.sin(angle)
        return real * cos - imaginary * sin, real * sin + imaginary * cos

    def score(self, query: tuple[Tensor, Tensor], candidate: Tensor) -> Tensor:
        """Margin minus the sum of moduli, for candidate rows of a shape that broadcasts against the query's."""
        real, imaginary = candidate.chunk(2, -1)
        return self.gamma - torch.stack([query[0] - real, query[1] - imaginary]).norm(dim=0).sum(-1)

    def loss(self, positive: Tensor, negative: Tensor, allowed: Tensor) -> Tensor:
        """Mean over queries of half the positive and half the weighted negative term."""
        weight = negative.detach().masked_fill(~allowed, -torch.inf).softmax(-1)
        terms = -functional.logsigmoid(positive) - (weight * functional.logsigmoid(-negative)).sum(-1)
        return terms.mean() / 2

    def per_triple(self, source: Tensor, relation: Tensor, sign: Tensor, target: Tensor, negative: Tensor) -> Tensor:
        """Loss of B queries with negatives (B, N) of their own."""
        query = self.query(source, relation, sign)
        against = tuple(part[:, None] for part in query)
        scores = self.score(against, self.entity[negative])  # type: ignore[arg-type]
        return self.loss(self.score(query, self.entity[target]), scores, torch.ones_like(scores, dtype=torch.bool))

    def shared(
        self, source: Tensor, relation: Tensor, sign: Tensor, target: Tensor, pool: Tensor, allowed: Tensor
    ) -> Tensor:
        """Loss of (G, b) queries whose chunk shares a pool (G, N)."""
        query = self.query(source, relation, sign)
        against = tuple(part[:, :, None] for part in query)
        scores = self.score(against, self.entity[pool][:, None])  # type: ignore[arg-type]
        return self.loss(self.score(query, self.entity[target]), scores, allowed)
