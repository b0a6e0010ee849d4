"""Our ranking against PyKEEN's evaluator on the same embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import D, E, R, graph, vectors

from mocme_dist.evaluation.metrics import report
from mocme_dist.evaluation.ranking import RowShard, Sizes, rank_queries, split_queries
from mocme_dist.parallel.comm import communication


@pytest.mark.slow
def test_metrics_equal_those_of_pykeen():
    """Filtered realistic ranks.

    PyKEEN's RotatE takes one 2-norm over all dimensions, so it gets the published sum of moduli.
    """
    pytest.importorskip(
        "pykeen", exc_type=ModuleNotFoundError, reason="pykeen is not installed: pip install 'mocme-dist[dev]'"
    )
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()  # pykeen imports torchvision where it finds it
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import ERModel
    from pykeen.nn.init import PretrainedInitializer
    from pykeen.nn.modules import RotatEInteraction
    from pykeen.triples import CoreTriplesFactory

    class SumOfModuli(RotatEInteraction):
        def forward(self, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -(h * r - t).abs().sum(-1)

    test, known = graph()
    z_ED, _ = vectors()
    z_ED = torch.randn(
        z_ED.shape, generator=torch.Generator().manual_seed(9)
    )  # no ties: kernels of two libraries break them apart
    phase_RC = torch.rand(R, D // 2, generator=torch.Generator().manual_seed(3)) * 6 - 3
    entities = torch.complex(*z_ED.chunk(2, -1))
    relations = torch.polar(torch.ones_like(phase_RC), phase_RC)
    known_triples = [
        (*((key // 2 // R, key // 2 % R, target) if key % 2 == 0 else (target, key // 2 % R, key // 2 // R)),)
        for place, key in enumerate(known.keys)
        for target in known.targets[known.offsets[place] : known.offsets[place + 1]]
    ]
    factory = CoreTriplesFactory.create(torch.tensor(sorted(set(known_triples))), num_entities=E, num_relations=R)

    def given(value):
        return {
            "shape": (D // 2,),
            "dtype": torch.cfloat,
            "initializer": PretrainedInitializer(torch.view_as_real(value)),
        }

    model = ERModel(
        triples_factory=factory,
        interaction=SumOfModuli,
        entity_representations_kwargs=given(entities),
        relation_representations_kwargs=given(relations),
    )
    test = torch.unique(torch.from_numpy(test), dim=0)
    results = RankBasedEvaluator(filtered=True).evaluate(
        model, test, batch_size=8, additional_filter_triples=[factory.mapped_triples], use_tqdm=False
    )

    queries = split_queries(test.numpy())
    with communication(30) as comm:
        ranks = rank_queries(
            queries, lambda relation: phase_RC[relation], RowShard(z_ED, 0), known, comm, Sizes(16, 24)
        ).filtered
    ours = report("test", ranks, queries.direction, np.ones((2, len(ranks)), bool))
    names = {
        "mrr": "inverse_harmonic_mean_rank",
        "mr": "arithmetic_mean_rank",
        **{f"hits@{k}": f"hits_at_{k}" for k in (1, 3, 10)},
    }
    for side, mine in (("both", ours), ("head", ours["head"]), ("tail", ours["tail"])):
        for name, theirs in names.items():
            assert mine[name] == pytest.approx(results.get_metric(f"{side}.realistic.{theirs}"), abs=1e-6), (side, name)
    assert 0.02 < ours["mrr"] < 0.9
