"""The fit of the blend: what it reaches, what it leaves out, and that it is a function of its sample and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import E, R, evidence_of, planted
from torch import Tensor

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.evidence.fit import (
    STEP,
    FitSettings,
    Sample,
    Wanted,
    collect,
    fit_weights,
    model_alone,
    smooth_reciprocal_ranks,
)
from mocme_dist.evidence.votes import Asked
from mocme_dist.parallel.comm import Comm

EVERY = torch.ones(4, dtype=torch.bool)


def sample_of(queries: int = 400) -> Sample:
    """Terms: the model, one that helps at tail places, one that harms, and one that helps at place 2 alone."""
    gen = torch.Generator().manual_seed(0)
    value = torch.randn(queries, 30, 4, generator=gen)
    place = torch.arange(queries) % 4
    value[:, 0, 0] += 1
    value[place % 2 == 0, 0, 1] += 3
    value[:, 0, 2] -= 2
    value[place == 2, 0, 3] += 3
    there = torch.rand(queries, 30, generator=gen) < 0.9
    there[:, 0] = True
    return Sample(value, there, place)


def ranks(sample: Sample, weight_PF: Tensor) -> Tensor:
    score = torch.einsum("qkf,qf->qk", sample.value_QKF, weight_PF[sample.place_Q])
    return 1 + ((score[:, 1:] > score[:, :1]) & sample.there_QK[:, 1:]).sum(1).float()


def test_weights_raise_what_helps_where_it_helps_and_leave_out_what_harms():
    sample = sample_of()
    weight_PF = fit_weights(sample, 4, 1, EVERY, FitSettings())
    before = (1 / ranks(sample, model_alone(4, 4, 1))).mean()
    after = (1 / ranks(sample, weight_PF)).mean()
    assert after > before + 0.15
    assert (weight_PF >= 0).all()
    assert weight_PF[:, 2].max() < 0.1
    assert weight_PF[::2, 1].min() > 1
    assert weight_PF[2, 3] > 2 * weight_PF[0, 3]
    assert torch.equal(weight_PF, (weight_PF / STEP).round() * STEP)


def test_the_same_sample_and_seed_give_the_same_weights_and_what_is_not_allowed_gets_none():
    sample = sample_of()
    one, again = (fit_weights(sample, 4, 1, EVERY, FitSettings(seed=3)) for _ in range(2))
    assert torch.equal(one, again)
    allowed = torch.tensor([True, False, True, True])
    assert not fit_weights(sample, 4, 1, allowed, FitSettings())[:, 1].any()


def test_terms_that_say_little_at_a_place_are_dropped_there():
    sample = sample_of()
    few, most = (fit_weights(sample, 4, 1, EVERY, FitSettings(prune_below=share)) for share in (0.2, 0.0))
    assert (few > 0).sum() < (most > 0).sum()
    assert few[0, 1] > 0 and few[2, 3] > 0
    assert (1 / ranks(sample, few)).mean() > (1 / ranks(sample, most)).mean() - 0.03


def test_smooth_reciprocal_ranks_tend_to_reciprocal_ranks():
    score = torch.tensor([[1.0, 2.0, 0.5, 3.0, 9.0]])
    there = torch.tensor([[True, True, True, True, False]])
    assert smooth_reciprocal_ranks(score, there, 1e-3).item() == pytest.approx(1 / 3)
    soft = 1 / (1 + sum(1 / (1 + np.exp(-(x - 1.0) / 0.5)) for x in (2.0, 0.5, 3.0)))
    assert smooth_reciprocal_ranks(score, there, 0.5).item() == pytest.approx(soft)


def distances(z_ED: Tensor) -> Tensor:
    return torch.cdist(z_ED.double(), z_ED.double()).float()


def collected(comm: Comm, values: int) -> Sample:
    from mocme_dist.evidence import fit

    fit.VALUES = values
    fit.BEST_OF_TERM, fit.BEST_OF_MODEL, fit.BY_CHANCE = 3, 5, 4
    data = planted()
    evidence = evidence_of(data, comm)
    queries = split_queries(data.test)
    asked, index = Asked.distinct(queries.source, queries.relation, queries.direction)
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    distance_EE = distances(data.z_ED)

    def model_values(at: np.ndarray) -> Tensor:
        return -distance_EE[queries.source[at], evidence.first : evidence.first + evidence.num_rows][None]

    wanted = Wanted(index, queries.target, offsets, targets)
    return collect(evidence, evidence.prepare(asked), wanted, model_values, E, 0)


def test_a_sample_holds_the_best_of_each_term_and_is_the_same_at_every_world_size(run_ranks):
    data, queries = planted(), split_queries(planted().test)
    (alone,) = run_ranks(1, collected, 1 << 25)
    for world in (2, 3):
        for found in run_ranks(world, collected, 2000):  # and in blocks of a few queries
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    distance = distances(data.z_ED)
    for number, (source, relation, direction, target) in enumerate(zip(*queries, strict=True)):
        there = alone.there_QK[number]
        values = alone.value_QKF[number][there]
        assert values[0, 0] == -distance[source, target]
        left = np.setdiff1d(np.arange(E), known.lookup([source], [relation], [direction])[1])
        best = -distance[source, left].sort().values[:5]
        assert torch.equal(values[1:, 0].sort(descending=True).values[:5], best)
        assert there.sum() - 1 <= 3 * 7 + 5 + 4
