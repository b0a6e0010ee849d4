"""What the monitor warns of, and what it goes on with after a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import FUSION
from tiny_run import curve, tiny_config

from mocme_dist.model.fusion import Fusion
from mocme_dist.observe.diagnostics import Diagnostics
from mocme_dist.observe.log import RunLog
from mocme_dist.observe.monitor import Monitor
from mocme_dist.parallel.comm import communication
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.step import StepResult
from mocme_dist.training.tally import STAT_NAMES, Tally
from mocme_dist.training.worker import Worker

BOTH = "modalities=[structure, numeric]"


@pytest.fixture
def worker(featured_dataset: Path, tmp_path: Path) -> Iterator[Worker]:
    config = tiny_config(featured_dataset, tmp_path, BOTH, "train.log_every=2")
    with communication(60) as comm:
        yield build_worker(config, open_dataset(config.data), comm)


def monitor_of(worker: Worker, folder: Path, step: int = 0, state: Any = None) -> Monitor:
    log = RunLog(folder / "metrics.jsonl", folder / "tensorboard", True, step)
    return Monitor(worker, log, 100, step, state)


def step_result(share: float, hard: float = 5.0, loss: float = 64.0) -> StepResult:
    """A step in which one modality has `share` of the weight and `hard` negatives of 100 are Hard."""
    sums = {"loss": loss, "allowed": 100.0, "queries": 64.0, "easy": 95.0 - hard, "ambiguous": 5.0, "hard": hard}
    weights = torch.tensor([1 - share, share])
    fused: Any = type("Fused", (), {"inter_M": weights, "shared_M": weights, "intra_MK": torch.full((2, 2), 0.5)})
    summed = torch.tensor([sums.get(name, 0.0) for name in STAT_NAMES]).double()
    return StepResult(summed, fused, torch.tensor(True), torch.tensor(0.0))


def record(monitor: Monitor, first: int, results: list[StepResult]) -> None:
    for step, result in enumerate(results, first + 1):
        monitor.worker.tally.add(result.sums, result.applied)
        monitor.record(step, result, 10)


def test_a_modality_that_takes_over_is_warned_of_once_and_marked_in_the_curve(worker, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        monitor = monitor_of(worker, tmp_path)
        record(monitor, 0, [step_result(0.85)] * 2)
        assert "takes over" not in caplog.text
        record(monitor, 2, [step_result(0.95)] * 4)
        assert caplog.text.count("modality numeric takes over 95 % of the weight") == 1
        # A resumed monitor has said it already.
        record(monitor_of(worker, tmp_path, 6, monitor.state()), 6, [step_result(0.95)] * 2)
        assert caplog.text.count("takes over") == 1
    assert [line["warnings/modality_collapse"] for line in curve(tmp_path)] == [0, 1, 1, 1]


def test_an_interval_without_hard_negatives_is_warned_of_and_marked_and_no_other(worker, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        monitor = monitor_of(worker, tmp_path)
        record(monitor, 0, [step_result(0.5), step_result(0.5, hard=0.0)])  # one of two steps had some
        assert "no negative is Hard" not in caplog.text
        record(monitor, 2, [step_result(0.5, hard=0.0)] * 2)
        assert caplog.text.count("no negative is Hard") == 1
    assert [line["warnings/no_hard_negative"] for line in curve(tmp_path)] == [0, 1]


def test_collapse_is_relative_to_the_number_of_modalities_and_asks_entities_with_several(caplog):
    def collapsed(shares: list[float]) -> float:
        fused: Any = type("Fused", (), {"shared_M": torch.tensor(shares)})
        names = ("structure", "text", "image", "numeric")[: len(shares)]
        return Diagnostics(names, True, True).of_interval(fused, torch.nn.Module(), 1.0)["warnings/modality_collapse"]

    assert [collapsed([share, 1 - share]) for share in (0.89, 0.91)] == [0, 1]
    # Of four, .86 is as far from the equal share as .91 of two.
    assert [collapsed([share, *[(1 - share) / 3] * 3]) for share in (0.84, 0.86)] == [0, 1]
    assert collapsed([1.0]) == 0, "one modality has all the weight by right"
    # Half of the entities have structure alone and give it 1; the others weigh equally.
    fusion = Fusion(2, 1, 4, FUSION._replace(estimator="uniform"), torch.Generator())
    views = torch.ones(2, 1, 4, 4)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    fused = fusion.mix(views, present, fusion.averages(), flows=False)
    assert fused.inter_M.tolist() == [0.75, 0.5] and fused.shared_M.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bounded", [True, False])
def test_information_at_its_cap_or_above_it_is_warned_of(worker, caplog, bounded):
    diagnostics, fusion = Diagnostics(worker.modalities, True, bounded), worker.model.fusion
    with torch.no_grad():
        for pairs in (fusion.intra, fusion.inter):
            pairs.log_n_P.fill_(4.0)
            pairs.information_P.fill_(9.0)
    fused = step_result(0.5).fused
    names = ("warnings/information_at_cap", "warnings/information_diverges")

    def marks() -> list[float]:
        found = diagnostics.of_interval(fused, fusion, 1.0)
        return [found[name] for name in names]

    assert marks() == [0, 0], "pairs that were never estimated say nothing"
    fusion.inter.seen_P.fill_(1.0)
    fusion.inter.information_P.fill_(3.5)
    assert marks() == [0, 0] and not caplog.text
    fusion.inter.information_P.fill_(3.99 if bounded else 4.1)
    with caplog.at_level(logging.WARNING):
        assert marks() == marks() == ([1, 0] if bounded else [0, 1])
    text = "is at its cap log n" if bounded else "is above log n, more than n rows can show"
    assert caplog.text.count(f"of 1 of 3 pairs {text}") == 1


def test_a_plateau_of_mrr_is_warned_of_once_also_over_a_resume(caplog):
    def marks(diagnostics: Diagnostics, values: list[float]) -> list[float]:
        return [diagnostics.of_evaluation(mrr)["warnings/mrr_plateau"] for mrr in values]

    with caplog.at_level(logging.WARNING):
        first = Diagnostics(("structure",), True, True)
        assert marks(first, [0.1, 0.2, 0.2001, 0.19, 0.2]) == [0] * 5
        again = Diagnostics(("structure",), True, True)
        again.restore(first.state())
        assert marks(again, [0.2, 0.2, 0.2]) == [0, 1, 1]
        assert caplog.text.count("valid MRR has not risen above 0.2000 in 5 evaluations") == 1
        assert marks(again, [0.21, 0.2]) == [0, 0]


def test_a_resumed_monitor_finishes_the_interval_that_was_begun(worker, tmp_path):
    results = [step_result(0.5, loss=64.0 * number) for number in range(1, 5)]
    whole = monitor_of(worker, tmp_path / "whole")
    record(whole, 0, results)
    worker.tally = Tally(worker.tally.flat.device)
    first = monitor_of(worker, tmp_path / "parts")
    record(first, 0, results[:3])
    state = first.state()
    worker.tally = Tally(worker.tally.flat.device)
    worker.tally.restore(state["sums"], state["total_skipped"], 0)
    record(monitor_of(worker, tmp_path / "parts", 3, state), 3, results[3:])
    expected, found = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    for name in ("step", "train/loss", "scale/vectors_sent", "entropy/hard"):
        assert [line[name] for line in found] == [line[name] for line in expected], name
    assert [line["train/loss"] for line in found] == [1.5, 3.5]
