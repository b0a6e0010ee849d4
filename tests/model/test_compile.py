"""Encoding and the information estimates as compiled graphs.

Equal to eager, and compiled once for batches of any size.
"""

from __future__ import annotations

import pytest
import torch
from plain_settings import FUSION, MODEL

from mocme_dist.model.mocme import MoCME

WIDTHS = {"structure": 8, "text": 5, "numeric": 3}


def model(compiled: bool, recompute: bool = False, **fusion: object) -> MoCME:
    chosen = FUSION._replace(hidden=6, **fusion)
    sizes = {"width": 8, "num_experts": 2, "gamma": 6.0}
    settings = MODEL._replace(**sizes, fusion=chosen, recompute=recompute, compiled=compiled)
    return MoCME(WIDTHS, 2, settings, seed=3)


def step(module: MoCME, count: int, seed: int) -> list[torch.Tensor]:
    """One step with estimates: what it gives, the gradients of everything, and the averages after it."""
    gen = torch.Generator().manual_seed(seed)
    raw = {name: torch.randn(count, width, generator=gen) for name, width in WIDTHS.items()}
    raw["structure"].requires_grad_()
    present = torch.rand(len(WIDTHS), count, generator=gen) < 0.7
    fused = module.encode(raw, present, torch.arange(count) % 2 == 1, estimate=True)
    module.zero_grad()
    (fused.z_VD.square().sum() + fused.loss).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [
        fused.z_VD.detach(),
        fused.loss.detach(),
        fused.intra_MK,
        fused.inter_VM,
        raw["structure"].grad,
        *gradients,
        *module.buffers(),
    ]


def check(recompute: bool = False, **fusion: object) -> int:
    """Steps of several sizes, both ways; the number of graphs that were compiled after the first."""
    eager, compiled = model(False, **fusion), model(True, recompute, **fusion)
    graphs = 0
    for number, count in enumerate((40, 57, 33, 64, 1, 41)):
        expected, found = step(eager, count, number), step(compiled, count, number)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs


@pytest.mark.slow
def test_compiled_encoding_and_estimates_equal_eager_and_are_compiled_once():
    assert check() == 0


@pytest.mark.slow
def test_weights_with_a_gradient_are_left_to_eager(monkeypatch):
    """And its estimates by the backend that builds nothing: one graph, the same for all sizes."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, **{**options, "backend": "aot_eager"})
    )
    monkeypatch.setattr("mocme_dist.model.mocme.one_graph", lambda _: pytest.fail("compiled"))
    assert check(weight_gradient="flow") == 0


@pytest.mark.slow
def test_recomputed_experts_are_part_of_the_graph(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, **{**options, "backend": "aot_eager"})
    )
    assert check(recompute=True, estimator="uniform") == 0


def test_evaluation_never_runs_the_compiled_graph(monkeypatch):
    module = model(True).eval()
    monkeypatch.setattr("mocme_dist.model.mocme.one_graph", lambda _: pytest.fail("compiled"))
    with torch.no_grad():
        fused = module.encode(
            {name: torch.ones(3, width) for name, width in WIDTHS.items()}, torch.ones(3, 3, dtype=torch.bool)
        )
    twin = (
        model(False)
        .eval()
        .encode({name: torch.ones(3, width) for name, width in WIDTHS.items()}, torch.ones(3, 3, dtype=torch.bool))
    )
    assert torch.equal(fused.z_VD, twin.z_VD)
