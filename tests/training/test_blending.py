"""A run's blend.

Fitted after training, kept beside the checkpoints, reported beside the model, equal at every world size.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import CheckpointError, ConfigError
from mocme_dist.evaluate import modality_share
from mocme_dist.evidence.blend import Blend, load_blend, save_blend
from mocme_dist.evidence.fit import fit_weights
from mocme_dist.parallel.comm import Comm
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.launch import launch
from mocme_dist.runs.task import find
from mocme_dist.train import train
from mocme_dist.training.blending import Blender, evaluate, places_made_worse
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.evidence_plan import EvidencePlan
from mocme_dist.training.loop import restore

EVIDENCE = (
    "modalities=[structure, numeric]",
    "evidence.spaces=auto",
    "blend.steps=60",
    "train.epochs=2",
    "fusion.form=blocks",
    "experts.width=12",
)


@pytest.fixture(scope="module")
def blended_run(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with evidence, to its end."""
    path = tmp_path_factory.mktemp("blended") / "run"
    train(tiny_config(featured_dataset, path, *EVIDENCE))
    return path


def config_at(run: Path, dataset: Path, *more: str) -> Any:
    return tiny_config(dataset, run, *EVIDENCE, *more)


def test_the_report_has_the_blend_the_model_and_the_figures_without_frequency(blended_run, featured_dataset):
    report = json.loads((blended_run / "metrics.json").read_text())
    figures = {"mrr", "hits@1", "hits@3", "hits@10", "mr", "head", "tail"}
    assert report["model"].keys() == report["without_frequency"].keys() == figures
    blend = load_blend(blended_run / "blend.safetensors")
    assert blend.terms == (
        "model:structure", "model:numeric", "model:fused", "votes:numeric", "votes:model", "votes:facts",
        "likeness:numeric", "likeness:model", "likeness:facts", "match:numeric", "rules", "frequency",
    )  # fmt: skip
    assert report["blend"] == {"terms": list(blend.terms), **blend.fitted}
    assert blend.fitted["selected_checkpoint"] is True and blend.fitted["split"] == "valid"
    assert blend.weight_PF.shape == (8, 12) and not blend.without_frequency_PF[:, -1].any()
    assert report["valid_mrr"] == blend.fitted["mrr"] >= blend.fitted["model_mrr"]
    again = launch(config_at(blended_run, featured_dataset), "evaluate", split="test", step="auto")
    off = launch(
        config_at(blended_run, featured_dataset, "blend.frequency=false"), "evaluate", split="test", step="auto"
    )
    assert {key: off[key] for key in figures} == report["without_frequency"]
    assert "without_frequency" not in off
    assert {key: again[key] for key in ("mrr", "model", "blend")} == {
        key: report[key] for key in ("mrr", "model", "blend")
    }


def test_the_model_alone_is_what_a_run_without_evidence_reports(blended_run, featured_dataset):
    report = json.loads((blended_run / "metrics.json").read_text())
    off = launch(config_at(blended_run, featured_dataset, "evidence.spaces=[]"), "evaluate", split="test", step="auto")
    assert {key: off[key] for key in report["model"]} == report["model"]
    assert "blend" not in off
    train_split = launch(config_at(blended_run, featured_dataset), "evaluate", split="train", step="auto")
    assert "blend" not in train_split


def blended(comm: Comm, run: str, dataset: str) -> tuple[list[list[float]], dict[str, Any], np.ndarray]:
    config = config_at(Path(run), Path(dataset))
    worker = build_worker(config, open_dataset(config.data), comm)
    saved = find(RunDirectory(run), worker, "auto", best=True)
    assert saved is not None
    restore(worker, saved)
    blender = Blender(worker)
    blend = blender.fit(saved.step)
    _, ranks = blender.rank("test", blend)
    return [rank.filtered.tolist() for rank in ranks], blend.fitted, blend.weight_PF


def test_fit_and_ranks_are_equal_at_every_world_size(run_ranks, blended_run, featured_dataset):
    report, fitted, weight_PF = run_ranks(1, blended, str(blended_run), str(featured_dataset))[0]
    kept = load_blend(blended_run / "blend.safetensors")
    assert np.array_equal(weight_PF, kept.weight_PF)
    for world in (2, 3):
        for found in run_ranks(world, blended, str(blended_run), str(featured_dataset)):
            assert found[:2] == (report, fitted)
            assert np.array_equal(found[2], weight_PF)


def test_a_direction_that_is_no_better_keeps_the_model_alone(blended_run, featured_dataset, monkeypatch):
    from mocme_dist.training import blending

    def poor(sample: Any, num_places: int, *_: Any) -> torch.Tensor:
        """Tails by frequency alone, heads by the model a little shifted in scale."""
        table = torch.zeros(num_places, sample.value_QKF.shape[2])
        table[0::2, -1], table[1::2, :3] = 1, 2
        return table

    monkeypatch.setattr(blending, "fit_weights", poor)
    from mocme_dist.parallel.comm import communication

    with communication(30) as comm:
        _, fitted, weight_PF = blended(comm, str(blended_run), str(featured_dataset))
    alone = np.zeros(weight_PF.shape[1])
    alone[:3] = 1
    assert fitted["mrr"] >= fitted["model_mrr"]
    assert (weight_PF[1::2] == alone).all()


def test_a_place_that_is_made_worse_keeps_the_model_and_small_ones_follow_their_direction():
    place_Q = np.repeat([0, 1, 2, 3, 4], [40, 40, 40, 5, 40])
    model_Q = np.full(len(place_Q), 2.0)
    # Place 0 gains and 2 loses; heads lose at place 1 more than the few queries of place 3 gain.
    rank_Q = np.repeat([1.0, 4.0, 3.0, 1.0, 2.0], [40, 40, 40, 5, 40])
    assert places_made_worse(model_Q, rank_Q, place_Q, 6).tolist() == [False, True, True, False, False, False]
    rank_Q[place_Q == 3] = 8
    assert places_made_worse(model_Q, rank_Q, place_Q, 6).tolist() == [False, True, True, True, False, True]


def test_the_dev_figure_is_of_weights_fitted_on_the_other_half(blended_run, featured_dataset, monkeypatch):
    from mocme_dist.parallel.comm import communication
    from mocme_dist.training import blending

    sizes = []

    def watched(sample: Any, *args: Any) -> torch.Tensor:
        sizes.append(sample.place_Q.bincount(minlength=8))
        return fit_weights(sample, *args)

    monkeypatch.setattr(blending, "fit_weights", watched)
    with communication(30) as comm:
        _, fitted, _ = blended(comm, str(blended_run), str(featured_dataset))
    assert "cross-fitted" in fitted["how"]
    every, first, second = sizes[0], sizes[2], sizes[4]
    assert torch.equal(every, first + second) and abs(int(first.sum() - second.sum())) <= 2


def test_a_blend_of_another_step_is_fitted_anew_and_a_torn_one_is_said(blended_run, featured_dataset, caplog, tmp_path):
    path = blended_run / "blend.safetensors"
    before = path.read_bytes()
    expected = json.loads((blended_run / "metrics.json").read_text())
    blend = load_blend(path)
    try:
        save_blend(
            path,
            Blend(blend.terms, blend.weight_PF * 0, blend.without_frequency_PF, blend.step + 1, blend.settings, {}),
        )
        found = launch(config_at(blended_run, featured_dataset), "evaluate", split="test", step="auto")
        assert found["mrr"] == expected["mrr"]
        path.write_bytes(before[:-9])
        with caplog.at_level(logging.WARNING):
            found = launch(config_at(blended_run, featured_dataset), "evaluate", split="test", step="auto")
        assert found["mrr"] == expected["mrr"]
        assert "the blend cannot be read" in caplog.text
    finally:
        path.write_bytes(before)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_blend(tmp_path / "missing.safetensors")


def test_spaces_that_are_not_there_are_refused_and_auto_takes_what_fits(featured_dataset, tmp_path):
    def spaces(*more: str) -> tuple[str, ...]:
        config = config_at(tmp_path, featured_dataset, *more)
        return EvidencePlan(config, open_dataset(config.data), 1).spaces

    assert spaces() == ("numeric", "coordinates", "model", "facts")
    assert spaces("evidence.spaces=[facts, numeric]") == ("numeric", "facts")
    assert spaces("evidence.spaces=[]") == spaces("evidence.max_minutes=1e-9") == ()
    assert spaces("modalities=[structure]") == ("model", "facts")
    everything = spaces("modalities=[structure]", "evidence.spaces=all")
    assert {"numeric", "coordinates", "model", "facts"} <= set(everything)
    assert spaces("modalities=[structure]", "evidence.spaces=[coordinates, facts]") == ("coordinates", "facts")
    with pytest.raises(ConfigError, match=r"evidence\.spaces: no video here; expected some of numeric, "):
        spaces("evidence.spaces=[video]")


def dropped(comm: Comm, run: str, dataset: str, drop: dict[str, float]) -> dict[str, Any]:
    config = config_at(Path(run), Path(dataset))
    worker = build_worker(config, open_dataset(config.data), comm)
    saved = find(RunDirectory(run), worker, "auto", best=True)
    assert saved is not None
    restore(worker, saved)
    return evaluate(worker, RunDirectory(run).blend, "test", saved.step, drop)[0]


def test_a_hidden_modality_is_reported_apart_and_is_the_same_at_every_world_size(
    run_ranks, blended_run, featured_dataset
):
    kept = json.loads((blended_run / "metrics.json").read_text())
    where = (str(blended_run), str(featured_dataset), {"numeric": 0.5})
    (found,) = run_ranks(1, dropped, *where)
    drop = found["drop"]
    assert drop["shares"] == {"numeric": 0.5} and drop["seed"] == 0
    # Only entities that had the modality lose it.
    present = FeatureStore.open(featured_dataset, "numeric", 0, 60).gather(torch.arange(60))[1].sum()
    assert 0 < drop["entities"] < present
    counts = [drop["affected"]["source"]["num_queries"], drop["affected"]["target"]["num_queries"]]
    assert min(counts) > 0 and drop["unaffected"]["num_queries"] >= found["num_queries"] - sum(counts)
    assert found["blend"] == kept["blend"]  # weights are those fitted with all features
    assert found["model"] != kept["model"] and found["baselines"] == kept["baselines"]
    assert all(again == found for again in run_ranks(2, dropped, *where))


def test_what_is_hidden_altogether_leaves_ties(blended_run, featured_dataset):
    drop = {"structure": 1.0, "numeric": 1.0}
    found = launch(config_at(blended_run, featured_dataset), "evaluate", split="test", step="auto", drop=drop)
    assert found["model"]["hits@10"] == 0
    assert (blended_run / "metrics.test.drop-numeric-1.drop-structure-1.json").is_file()
    with pytest.raises(ConfigError, match="--drop image: this run has no such modality; it has structure, numeric"):
        launch(config_at(blended_run, featured_dataset), "evaluate", split="test", step="auto", drop={"image": 0.5})


@pytest.mark.parametrize("text", ["text", "txt:0.5", "text:0", "text:1.5", "text:half"])
def test_a_share_that_cannot_be_read_is_a_usage_error(text):
    assert modality_share("text:0.5") == ("text", 0.5)
    with pytest.raises(argparse.ArgumentTypeError, match="expected MODALITY:SHARE"):
        modality_share(text)
