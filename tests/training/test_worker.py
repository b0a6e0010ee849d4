"""What a worker feeds the model and how it ranks, each computed here in another way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from mocme_dist.kernels.distance import distance
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import communication
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.worker import Worker


@pytest.fixture(scope="module")
def worker(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    config = tiny_config(featured_dataset, tmp_path_factory.mktemp("run"), "modalities=[structure, numeric]")
    with communication(60) as comm:
        yield build_worker(config, open_dataset(config.data), comm)


def test_features_reach_the_projection_with_mean_0_and_deviation_1(worker):
    values_UF, present_U = worker.stores["numeric"].gather(torch.arange(60))
    present = values_UF[present_U].double().numpy()
    projection = worker.model.projections.by_modality["numeric"]
    standard = (present - projection.mean_F.numpy()) * projection.scale_F.numpy()
    varies = present.std(0) > 1e-6
    assert varies.any() and np.abs(present.var(0)[varies] - 1).max() > 0.01  # dividing by the variance would show
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std(0)[varies], 1, atol=1e-5)


def brute_force_ranks(worker: Worker, split: str, filtered: tuple[str, ...]) -> np.ndarray:
    """Ranks of a split's queries, by a loop over facts and entities; only facts of `filtered` do not compete."""
    facts = {tuple(map(int, fact)) for name in filtered for fact in worker.dataset.triples(name)}
    with torch.no_grad():
        z_ED = worker.encode_rows().z_rD
        ranks = []
        for h, r, t in (tuple(map(int, fact)) for fact in worker.dataset.triples(split)):
            phase_1C = worker.model.relations(torch.tensor([r]))
            for source, sign, target in ((h, 1.0, t), (t, -1.0, h)):
                query_1D = rotate(z_ED[source][None], phase_1C, torch.tensor([sign]))
                distance_E = distance(query_1D, z_ED).flatten().numpy()
                fact_of = [(source, r, e) if sign > 0 else (e, r, source) for e in range(len(z_ED))]
                known = [e for e, fact in enumerate(fact_of) if fact in facts]
                others = np.delete(distance_E, [*known, target])
                ranks.append(1 + (others < distance_E[target]).sum() + (others == distance_E[target]).sum() / 2)
    return np.array(ranks)


def test_evaluation_filters_the_facts_of_all_splits(worker):
    mrr = worker.evaluate("train")["mrr"]
    assert mrr == pytest.approx((1 / brute_force_ranks(worker, "train", ("train", "valid", "test"))).mean(), abs=1e-9)
    for fewer in (("train",), ("train", "valid"), ("train", "test")):  # it would show
        assert (1 / brute_force_ranks(worker, "train", fewer)).mean() < mrr - 1e-6
