"""The bilinear trial: exact softmax by chunks, scores by complex arithmetic, and queries that share their softmax."""

from __future__ import annotations

import torch

from mocme_dist.data.dataset import Dataset
from tools.experiments.bilinear import Batches, Bilinear, LogSumExp


def test_the_softmax_by_chunks_equals_the_whole_one_gradients_included():
    generator = torch.Generator().manual_seed(0)
    query, entity = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 23))
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    expected = (query @ entity.T).logsumexp(1)
    wanted = torch.autograd.grad((expected * weight).sum(), [query, entity])
    for chunk in (1, 7, 23, 100):
        found = LogSumExp.apply(query, entity, chunk)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), [query, entity]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_scores_are_those_of_complex_arithmetic():
    torch.manual_seed(0)
    model = Bilinear(7, 2, 8, ["structure"], {}, "pca", 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    entity = model.entities().detach()
    source, relation = torch.tensor([0, 3]), torch.tensor([1, 3])
    found = model.queries(entity[source], relation) @ entity.T

    def as_complex(value: torch.Tensor) -> torch.Tensor:
        return torch.complex(*value.double().chunk(2, 1))

    left = as_complex(entity[source] + model.offset_RD[relation]) * as_complex(model.relation_RD[relation])
    expected = (left[:, None] * as_complex(entity).conj()[None]).sum(-1).real
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_epoch_has_both_queries_of_every_triple_once(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    triples, R = dataset.triples("train").tolist(), dataset.num_relations
    expected = sorted([(h, r, t) for h, r, t in triples] + [(t, r + R, h) for h, r, t in triples])
    found = []
    for source, relation, count, target, query in Batches(dataset).epoch(16, seed=0):
        assert count.sum() == len(target)
        found += zip(source[query].tolist(), relation[query].tolist(), target.tolist(), strict=True)
    assert sorted(found) == expected
