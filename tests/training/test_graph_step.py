"""A step as one graph against `train_step`: losses, rows, dense parameters, skipped steps, and what is launched."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import STEPS_PER_EPOCH, losses, tiny_config

from mocme_dist.errors import ConfigError, DivergedError, Preempted
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import TrainingRun
from mocme_dist.training import build, graph_step
from mocme_dist.training.graph_step import GraphInput, Padding
from mocme_dist.training.worker import Worker
from tools.bench.workload import FULL, counted_steps, make_graph, step_config

BOTH = "modalities=[structure, numeric]"
GRAPH = ("compile=on", "train.one_graph=true")

pytestmark = pytest.mark.skipif(
    build.compiler_lacks(torch.device("cpu")) is not None, reason="nothing compiles the kernels"
)


@pytest.fixture(autouse=True)
def plain_backend(monkeypatch):
    """Graphs are traced and differentiated as ever, and then run by torch: compiling them takes a minute."""
    init = graph_step.GraphStep.__init__

    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "backend": "aot_eager"})

    monkeypatch.setattr(graph_step.GraphStep, "__init__", plain)


def run(dataset: Path, folder: Path, *overrides: str, steps: int = 10**6) -> tuple[Worker, dict[int, float]]:
    """Train with a line per step; the worker as it ends, and the losses by step."""
    config = tiny_config(dataset, folder, BOTH, "train.epochs=1", "train.log_every=1", *overrides)
    directory, asked = RunDirectory(config.run.dir), 0
    directory.checkpoints.path.mkdir(parents=True, exist_ok=True)

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    with communication(60) as comm:
        worker = build.build_worker(config, build.open_dataset(config.data), comm)
        with suppress(Preempted):
            TrainingRun(worker, directory).train(stop)
    return worker, losses(folder)


def state(worker: Worker) -> dict[str, torch.Tensor]:
    return {"rows": worker.table.rows_rD, **worker.table.state, **worker.engine.state()}


CASES: dict[str, tuple[str, ...]] = {
    # The last step of the epoch has fewer queries; estimates are made at every second step.
    "defaults": ("mine.every=2", "features.residency=device"),
    "clipped": ("train.gradient_clipping=0.05", "entities.optimizer=adagrad", "train.schedule=linear"),
    "blocks": ("train.loss=one_vs_all", "fusion.form=blocks", "experts.width=12", "negatives.weighting=uniform"),
    "hidden": ("train.structure_dropout=0.4", "fusion.estimator=cosine", "negatives.weighting=entropy_adversarial"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_as_a_graph_is_the_step(featured_dataset, tmp_path, name):
    plain, expected = run(featured_dataset, tmp_path / "plain", "compile=on", *CASES[name])
    graph, found = run(featured_dataset, tmp_path / "graph", *GRAPH, *CASES[name])
    assert plain.graph is None and graph.graph is not None
    assert list(found) == list(range(1, STEPS_PER_EPOCH + 1))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-4)
    assert graph.table.num_updates == plain.table.num_updates == STEPS_PER_EPOCH
    assert graph.engine.gradient_norm() == pytest.approx(plain.engine.gradient_norm(), rel=1e-2)
    twin = state(plain)
    for key, value in state(graph).items():
        # Adam turns the sign of a gradient near zero, a sum in another order, into a step: so norms of differences.
        distance, length = (value - twin[key]).norm(), twin[key].norm()
        assert distance <= 2e-2 * length + 1e-5, (key, float(distance), float(length))


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_in_the_bits_of_an_undisturbed_run(featured_dataset, tmp_path):
    whole, _ = run(featured_dataset, tmp_path / "whole", *GRAPH)
    run(featured_dataset, tmp_path / "parts", *GRAPH, steps=4)
    parts, _ = run(featured_dataset, tmp_path / "parts", *GRAPH)
    for key, value in state(whole).items():
        assert torch.equal(value, state(parts)[key]), key


@pytest.mark.slow
def test_steps_that_are_not_finite_move_nothing_and_too_many_end_the_run(featured_dataset, tmp_path, monkeypatch):
    original, moved, bad = graph_step.GraphStep.step, [], {2, 5}

    def step(self: Any, given: GraphInput, estimate: bool, factor: float) -> Any:
        number = len(moved) + 1
        if number in bad:
            given = given._replace(weight_Gb=given.weight_Gb * math.nan)
        before = {name: value.clone() for name, value in everything(self).items()}
        result = original(self, given, estimate, factor)
        moved.append(any(not torch.equal(value, before[name]) for name, value in everything(self).items()))
        assert moved[-1] == bool(result.applied) != result.skipped
        return result

    def everything(self: Any) -> dict[str, torch.Tensor]:
        return {"rows": self.table.rows_rD, **self.table.state, "updates": self.table.updates, **self.engine.state()}

    monkeypatch.setattr(graph_step.GraphStep, "step", step)
    run(featured_dataset, tmp_path / "run", *GRAPH)
    assert [number for number, was in enumerate(moved, 1) if not was] == [2, 5]
    moved.clear()
    bad |= {3, 4}
    with pytest.raises(DivergedError, match=r"step 4: 3 steps in a row were not finite"):
        run(featured_dataset, tmp_path / "diverged", *GRAPH, "train.max_nonfinite=3")


def test_padding_is_a_function_of_the_rows_and_points_at_padding():
    gen = np.random.default_rng(0)
    padding = Padding(1000, 300)
    assert padding.sizes()[-1] > 1000 and len(padding.sizes()) <= 7
    for count in (0, 1, 63, 500, 999, 1000):
        held_out_V = gen.random(count) < 0.5
        rows, stride, halves = padding.choose(held_out_V)
        assert rows in padding.sizes() and rows >= count + stride and stride % 2 == 1
        assert -(-rows // stride) <= 300 or rows <= 300
        for part, wanted in ((halves.train_T, ~held_out_V), (halves.held_out_H, held_out_V)):
            places = part * stride
            real = places[places < count]
            assert torch.equal(real, torch.from_numpy(np.flatnonzero(wanted[::stride]) * stride))
            assert (places[len(real) :] >= count).all() and (places < rows).all()
    # All in one half: possible only in small graphs.
    _, stride, halves = padding.choose(np.ones(900, dtype=bool))
    assert len(halves.held_out_H) >= -(-900 // stride)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["compile=off"], "compile is off"),
        (["compile=on", "deepspeed.gradient_accumulation_steps=2"], "gradient_accumulation_steps is not 1"),
        (["compile=on", "entities.dtype=bfloat16"], "no kernel updates the rows"),
        (["compile=on", "fusion.weight_gradient=flow"], "weight_gradient=stop"),
    ],
)
def test_where_it_does_not_hold_it_is_refused_with_the_reason(featured_dataset, tmp_path, overrides, reason):
    config = tiny_config(featured_dataset, tmp_path / "run", BOTH, *overrides, "train.one_graph=true")
    with communication(60) as comm, pytest.raises(ConfigError, match=rf"train.one_graph: .*{reason}"):
        build.build_worker(config, build.open_dataset(config.data), comm)


@pytest.mark.slow
def test_nothing_waits_breaks_or_is_compiled_again_and_few_operators_are_launched(tmp_path):
    """At two sizes of a step: an epoch has eleven steps, and the last one is shorter."""
    dataset = make_graph(tmp_path, 300, 700, {"text": 16, "numeric": 8})
    sizes = ("negatives.chunk_size=16", "train.log_every=1000", "deepspeed.engine=torch", "mine.every=2")
    how = (*FULL, *sizes, *GRAPH, "train.gradient_clipping=1")
    config = step_config(dataset, tmp_path / "run", *how, queries=128, negatives=16, width=8)
    found = counted_steps(config, 11, 11)
    assert (found.host_waits, found.graph_breaks, found.recompilations) == (0, 0, 0)
    assert found.operators_outside_graphs <= 40
