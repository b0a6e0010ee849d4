"""A small graph with planted ties, and its filtered ranks by brute force."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import Queries

E, R, D = 53, 4, 10


def graph(seed: int = 0) -> tuple[np.ndarray, KnownAnswers]:
    """40 triples to rank, and the known answers of those and of 400 others: many queries have several."""
    gen = np.random.default_rng(seed)

    # Few sources, so that queries share known answers.
    def draw(count):
        return np.stack([gen.integers(8, size=count), gen.integers(R, size=count), gen.integers(E, size=count)], 1)

    test, rest = draw(40), draw(400)
    rest[::2] = rest[::2, ::-1] % np.array([E, R, 8])
    return test, KnownAnswers.build(np.concatenate([test, rest]), R)


def vectors(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(E, D) vectors with groups of equal ones all over the range, and (R, D / 2) phases."""
    gen = torch.Generator().manual_seed(seed)
    z_ED = torch.randn(E, D, generator=gen)
    for source, copies in ((2, (3, 30, 52)), (40, (0, 17)), (11, (10, 12, 13, 14, 25, 26, 27, 45, 46))):
        z_ED[list(copies)] = z_ED[source].clone()
    return z_ED, torch.rand(R, D // 2, generator=gen) * 6 - 3


def brute_force(queries: Queries, known: KnownAnswers, z_ED: Tensor, phase_RC: Tensor) -> np.ndarray:
    """Ranks from the whole matrix of complex distances in float64, sorted by nobody.

    Best and worst place, then their mean.
    """
    real, imaginary = z_ED.double().chunk(2, -1)
    z_EC = torch.complex(real, imaginary)
    ranks = []
    for source, relation, direction, target in zip(*queries, strict=True):
        sign = 1.0 if direction == 0 else -1.0
        turned = z_EC[source] * torch.polar(torch.ones(D // 2).double(), sign * phase_RC[relation].double())
        distance = (turned - z_EC).abs().sum(-1).numpy()
        _, answers = known.lookup([source], [relation], [direction])
        competes = np.ones(E, bool)
        competes[answers] = False
        competes[target] = False
        best = 1 + (distance[competes] < distance[target]).sum()
        worst = 1 + (distance[competes] <= distance[target]).sum()
        ranks.append((best + worst) / 2)
    return np.array(ranks)
