"""The completion loss against a loop over queries, and its compiled form against the eager one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from plain_settings import LOSS, WEIGHTING
from torch.nn import functional

from mocme_dist.kernels import distance as distance_module
from mocme_dist.kernels.distance import distance
from mocme_dist.memory import return_pages
from mocme_dist.model import loss as loss_module
from mocme_dist.model.entropy import negative_weights
from mocme_dist.model.loss import LossSettings, completion_loss
from mocme_dist.model.rotate import rotate

G, B, N, D = 2, 4, 11, 8
WEIGHTINGS = ("entropy", "self_adversarial", "uniform", "entropy_adversarial")
CASES = [("contrastive", kind) for kind in WEIGHTINGS] + [("one_vs_all", "entropy")]


class Inputs(NamedTuple):
    source: torch.Tensor
    phase: torch.Tensor
    sign: torch.Tensor
    target: torch.Tensor
    pool: torch.Tensor
    allowed: torch.Tensor
    weight: torch.Tensor


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


LEAVES = ("source", "phase", "target", "pool")


def inputs() -> Inputs:
    """Two chunks of four queries: a fully masked row, a filling row, a pool entry equal to a target."""
    gen = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    allowed = torch.rand(G, B, N, generator=gen) < 0.7
    allowed[0, 1] = False
    weight = torch.ones(G, B)
    weight[1, 3] = 0
    found = Inputs(
        normal(G, B, D),
        normal(G, B, D // 2) * 2,
        normal(G, B).sign(),
        normal(G, B, D),
        normal(G, N, D),
        allowed,
        weight,
    )
    found.pool[0, 0] = found.target[0, 0]
    return found


def settings(kind: str, weighting: str, compiled: bool = False) -> LossSettings:
    weights = WEIGHTING._replace(kind=weighting, temperature=0.7)
    return LOSS._replace(kind=kind, gamma=5.0, weighting=weights, compiled=compiled)


def evaluate(values: Inputs, chosen: LossSettings) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and gradients of all leaves; and the stats by name."""
    leaves = values._replace(**{name: getattr(values, name).clone().requires_grad_() for name in LEAVES})
    loss, stats = completion_loss(*leaves, chosen)
    loss.backward()
    assert all(not value.requires_grad for value in stats)
    return [loss.detach(), *(getattr(leaves, name).grad for name in LEAVES)], stats._asdict()


def plain(values: Inputs, chosen: LossSettings) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The same by one query and one candidate at a time."""
    leaves = values._replace(**{name: getattr(values, name).clone().requires_grad_() for name in LEAVES})
    total = torch.zeros(())
    positive_sum = negative_sum = score_sum = 0.0
    for g in range(G):
        for b in range(B):
            if not values.weight[g, b]:
                continue
            query = rotate(leaves.source[g, b], leaves.phase[g, b], values.sign[g, b])
            positive = chosen.gamma - distance(query, leaves.target[g, b])
            allowed = [n for n in range(N) if values.allowed[g, b, n]]
            negative = [chosen.gamma - distance(query, leaves.pool[g, n]) for n in allowed]
            score_sum += positive.item()
            if chosen.kind == "one_vs_all":
                total = total + functional.cross_entropy(torch.stack([positive, *negative])[None], torch.tensor([0]))
                continue
            weights = torch.zeros(0)
            if negative:
                stacked = torch.stack(negative)[None, None]
                weights, _ = negative_weights(
                    stacked.detach(), torch.ones_like(stacked, dtype=torch.bool), chosen.weighting
                )
            lost = -sum(
                w * functional.logsigmoid(-s) for w, s in zip(weights.flatten().tolist(), negative, strict=True)
            )
            won = -functional.logsigmoid(positive)
            positive_sum, negative_sum = positive_sum + won.item(), negative_sum + float(torch.as_tensor(lost).detach())
            total = total + (won + lost) / 2
    total.backward()
    sums = {
        "loss": total.item(),
        "positive": positive_sum,
        "negative": negative_sum,
        "positive_score": score_sum,
        "queries": 7.0,
    }
    sums["allowed"] = float(values.allowed.flatten(0, 1)[:7].sum())
    return [total.detach(), *(getattr(leaves, name).grad for name in LEAVES)], sums


@pytest.mark.parametrize(("kind", "weighting"), CASES)
def test_loss_equals_a_loop_over_queries(kind, weighting):
    values, chosen = inputs(), settings(kind, weighting)
    found, stats = evaluate(values, chosen)
    expected, sums = plain(values, chosen)
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if kind == "one_vs_all":
        sums |= {"positive": sums["loss"], "negative": 0.0}
    for name, value in sums.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-5), name
    if kind == "contrastive":
        assert stats["classes_3"].sum() == stats["allowed"]
        assert (stats["classes_3"] > 0).all()


@pytest.mark.parametrize(("kind", "weighting"), CASES)
def test_loss_is_one_graph(kind, weighting):
    """Forward and backward, kernels included: a break is an error of the compiler. This backend builds nothing."""
    traced = torch.compile(
        partial(loss_module._forward, settings=settings(kind, weighting, compiled=True)),
        backend="aot_eager",
        fullgraph=True,
    )
    values = inputs()
    leaves = values._replace(**{name: getattr(values, name).clone().requires_grad_() for name in LEAVES})
    found, *_ = traced(*leaves)
    found.backward()
    expected, _ = evaluate(values, settings(kind, weighting))
    torch.testing.assert_close(
        [found.detach(), *(getattr(leaves, name).grad for name in LEAVES)], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graphs", [False, True])  # without a GPU the compiler leaves them out and says nothing
@pytest.mark.parametrize(("kind", "weighting"), CASES[3:])
def test_compiled_loss_equals_eager(kind, weighting, cuda_graphs):
    values = inputs()
    found, stats = evaluate(values, settings(kind, weighting, compiled=True)._replace(cuda_graphs=cuda_graphs))
    expected, sums = evaluate(values, settings(kind, weighting))
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for name, value in sums.items():
        torch.testing.assert_close(stats[name], value, rtol=1e-5, atol=1e-6)


def large(g: int, b: int, n: int, d: int) -> Inputs:
    """Shapes of a real batch, and vectors whose distances are near the margin."""
    scale = 5 / d
    vectors = (
        normal(g, b, d) * scale,
        normal(g, b, d // 2),
        normal(g, b).sign(),
        normal(g, b, d) * scale,
        normal(g, n, d) * scale,
    )
    return Inputs(*vectors, normal(g, b, n) > -1, torch.ones(g, b))


def peak_mb(values: Inputs, chosen: LossSettings) -> float:
    """What one forward and backward adds to this process at its peak; the second time, when all is compiled."""
    evaluate(values, chosen)
    # a process that has trained keeps what it frees: the second time would need nothing new, whatever it stores
    return_pages()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status_mb("VmRSS")
    evaluate(values, chosen)
    return status_mb("VmHWM") - before


reads_peaks = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux"
)


@pytest.mark.slow
@reads_peaks
def test_steps_after_the_first_compile_nothing_and_store_no_differences():
    """Not for other values, not for filling, not for a last batch whose chunk is all filling."""
    chosen = settings("contrastive", "entropy", compiled=True)
    g, b, n, d = 2, 128, 256, 256
    values = large(g, b, n, d)
    evaluate(values, chosen)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(5):
        values.weight[0] = float(step % 2)
        values.allowed[:, step % b] = False
        values.pool[:] = normal(g, n, d, seed=step) * 5 / d
        found, _ = evaluate(values, chosen)
    expected, _ = evaluate(values, chosen._replace(compiled=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    peak = peak_mb(values, chosen)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert peak < 0.1 * (g * b * n * d * 4 / 2**20)


@reads_peaks
@pytest.mark.skipif(not distance_module.has_kernels("cpu"), reason="no C++ compiler")
def test_one_vs_all_over_all_entities_stores_no_differences(monkeypatch):
    monkeypatch.setattr(loss_module, "_compiled", lambda chosen: partial(loss_module._forward, settings=chosen))
    b, n, d = 16, 4096, 128
    # The pool and its gradient are of the size of the inputs; the differences are b times that.
    assert peak_mb(large(1, b, n, d), settings("one_vs_all", "entropy", compiled=True)) < 0.3 * (b * n * d * 4 / 2**20)


@pytest.mark.parametrize(("kind", "weighting"), CASES)
def test_a_batch_whose_negatives_are_all_masked_has_a_finite_loss(kind, weighting):
    values = inputs()
    values.allowed[:] = False
    found, stats = evaluate(values, settings(kind, weighting))
    assert all(torch.isfinite(value).all() for value in found)
    assert stats["allowed"] == 0
    assert (found[-1] == 0).all()  # nothing pulls on the pool


def test_filling_leaves_no_trace():
    values = inputs()
    other = inputs()
    other.source[1, 3], other.target[1, 3], other.phase[1, 3] = 100.0, -50.0, 9.0
    found, _ = evaluate(values, settings("contrastive", "entropy"))
    changed, _ = evaluate(other, settings("contrastive", "entropy"))
    torch.testing.assert_close(found[0], changed[0])
    assert (found[1][1, 3] == 0).all()
    torch.testing.assert_close(found[4], changed[4])


def test_no_gradient_passes_through_the_weights():
    """With fixed weights the gradient of a negative's score is its weight times its sigmoid, halved."""
    values = inputs()
    chosen = settings("contrastive", "entropy_adversarial")
    pool = values.pool.clone().requires_grad_()
    loss, _ = completion_loss(*values._replace(pool=pool), chosen)
    loss.backward()
    query = rotate(values.source, values.phase, values.sign)
    score = chosen.gamma - distance(query[:, :, None], values.pool[:, None])
    weight, _ = negative_weights(score, values.allowed, chosen.weighting)
    grad_out = -(weight * torch.sigmoid(score) * values.weight[..., None]) / 2
    twin = values.pool.clone().requires_grad_()
    (distance(query[:, :, None], twin[:, None]) * grad_out).sum().backward()
    torch.testing.assert_close(pool.grad, twin.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_give_a_float32_loss():
    values = inputs()
    low = values._replace(**{name: getattr(values, name).bfloat16() for name in LEAVES})
    loss, _ = completion_loss(*low, settings("contrastive", "entropy"))
    expected, _ = completion_loss(*values, settings("contrastive", "entropy"))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
