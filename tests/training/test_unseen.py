"""Entities that train never shows have no structure: in a step, in ranking, in the report and in the bundle alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.evaluation.ranking import Queries, Sizes, rank_queries
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.parallel.table import EntityTable
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.rows import RunRows
from mocme_dist.serving.scorer import Asked, answers_in, place
from mocme_dist.train import train
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.loop import restore

BOTH = "modalities=[structure, numeric]"
# "item 60" has numbers, "item 61" has nothing at all.
NEW = ("item 60", "item 61")
FACTS = (("item 60", "near", "item 05"), ("item 03", "kind", "item 60"), ("item 61", "after", "item 07"))


@pytest.fixture(scope="module")
def unseen_dataset(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_raw` with two entities that only three test facts name, and the features of its numbers; read only."""
    folder = tmp_path_factory.mktemp("unseen")
    raw = Path(shutil.copytree(tiny_raw, folder / "raw"))
    with (raw / "test.txt").open("a") as file:
        file.writelines("\t".join(fact) + "\n" for fact in FACTS)
    with (raw / "numeric.tsv").open("a") as file:
        file.write("item 60\tsize\t0.7\nitem 60\tyear\t-1.1\n")
    dataset = pack_folder(raw, folder / "dataset", DataConfig(shard_rows=16, unseen="keep"))
    extract_features(dataset, EncodersConfig(), ("label",), ["numeric"], use_ray=False)
    return dataset.directory


@pytest.fixture(scope="module")
def unseen_run(unseen_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run over structure and numbers; read only."""
    run = tmp_path_factory.mktemp("unseen-run") / "run"
    train(tiny_config(unseen_dataset, run, BOTH))
    return run


def unseen_ids(dataset: Dataset) -> np.ndarray:
    names = dataset.entity_names()
    return np.array([names.index(name) for name in NEW])


def figures(comm: Comm, dataset: Path, run_dir: Path) -> tuple[list[int], list[bool], dict[str, Any], dict[str, Any]]:
    """Body of one rank.

    Ids without structure, who of NEW is a zero vector, and test metrics before and after rows of NEW change.
    """
    config = tiny_config(dataset, run_dir, BOTH)
    worker = build_worker(config, open_dataset(config.data), comm)
    new = unseen_ids(worker.dataset)
    present_r = worker.features(torch.arange(worker.last - worker.first)).present_MV[0]
    before = worker.evaluate("test")
    here = new[(new >= worker.first) & (new < worker.last)] - worker.first
    worker.table.rows_rD[torch.from_numpy(here)] = 1e3
    vectors_ND = comm.sum(worker.vectors_of(new))
    missing = (torch.nonzero(~present_r)[:, 0] + worker.first).tolist()
    return missing, (vectors_ND == 0).all(1).tolist(), before, worker.evaluate("test")


def test_what_their_rows_hold_changes_no_rank_at_any_world_size(run_ranks, unseen_dataset, tmp_path):
    dataset = Dataset.open(unseen_dataset)
    reports = []
    for world in (1, 2, 3):
        ranks = run_ranks(world, figures, unseen_dataset, tmp_path / "run")
        missing = [entity for rank in ranks for entity in rank[0]]
        assert missing == sorted(unseen_ids(dataset).tolist())
        for _, zero, before, after in ranks:
            assert zero == [False, True]
            reports += [before, after]
    assert all(report == reports[0] for report in reports)


def test_their_figures_are_reported_apart(unseen_run):
    report = json.loads((unseen_run / "metrics.json").read_text())
    assert report["num_queries"] == 78 and report["seen"]["num_queries"] == 72
    # Each fact with one unseen end is a query from it and a query for it.
    assert report["unseen"]["source"]["num_queries"] == report["unseen"]["target"]["num_queries"] == 3
    assert report["seen"].keys() == report["unseen"]["source"].keys() == {*report["head"], "num_queries"}
    parts = (report["seen"], report["unseen"]["source"], report["unseen"]["target"])
    assert sum(part["mrr"] * part["num_queries"] for part in parts) == pytest.approx(report["mrr"] * 78)


def test_training_does_not_move_their_rows(unseen_run, unseen_dataset):
    saved = Checkpoints(unseen_run).find("auto", best=True)
    config = tiny_config(unseen_dataset, unseen_run, BOTH)
    with communication(60) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        start_ED = worker.table.rows_rD.clone()
        restore(worker, saved)
    assert isinstance(worker.table, EntityTable)
    new = unseen_ids(worker.dataset)
    still = (worker.table.rows_rD == start_ED).all(1)
    assert still[torch.from_numpy(new)].all() and int(still.sum()) == len(new)


def test_a_bundle_ranks_them_as_evaluation_does(unseen_run, unseen_dataset, tmp_path):
    config = tiny_config(unseen_dataset, unseen_run, BOTH)
    dataset = open_dataset(config.data)
    saved = Checkpoints(unseen_run).find("auto", best=True)
    export_bundle(RunRows(config, dataset, saved), tmp_path / "bundle", part_bytes=16 * 8 * 4)
    bundle = Bundle.open(tmp_path / "bundle")
    new = unseen_ids(dataset)
    weights = np.concatenate(bundle.weight_parts)
    assert np.flatnonzero(weights[:, 0] == 0).tolist() == sorted(new) and weights[new[0]].tolist() == [0, 1]
    assert np.concatenate(bundle.vector_parts)[new[1]].tolist() == [0] * 8
    assert bundle.manifest["structure_imputer"]["entities"] == int((weights > 0).all(1).sum())
    test = np.asarray(dataset.triples("test"))
    queries = Queries.both_directions(test[np.isin(test[:, [0, 2]], new).any(1)])
    with communication(60) as comm:
        worker = build_worker(config, dataset, comm)
        restore(worker, saved)
        known = dataset.known("all")
        ranks = rank_queries(queries, worker.model.relations, worker.encode_rows(), known, comm, Sizes(16, 64)).filtered
    found = []
    for source, relation, direction, target in zip(*queries, strict=True):
        asked = Asked.of(bundle, [source], [relation], [direction])
        found.append(place(bundle, asked, int(target), answers_in(bundle.known, asked)[0])[1])
    assert found == ranks.tolist() and len(found) == 6


def test_an_entity_that_nothing_is_known_of_is_the_last_answer(unseen_run, unseen_dataset, tmp_path):
    config = tiny_config(unseen_dataset, unseen_run, BOTH)
    dataset = open_dataset(config.data)
    saved = Checkpoints(unseen_run).find("auto", best=True)
    export_bundle(RunRows(config, dataset, saved), tmp_path / "bundle", part_bytes=16 * 8 * 4)
    bundle = Bundle.open(tmp_path / "bundle")
    bare = np.flatnonzero(~np.concatenate(bundle.vector_parts).any(1))
    assert len(bare) and bundle.unknown.tolist() == bare.tolist()
    for candidates in (None, list(range(bundle.num_entities))):
        answers = bundle.ask(0, "near", k=bundle.num_entities, filter="none", candidates=candidates)
        assert len(answers.answer) == bundle.num_entities
        assert sorted(answers.answer[-len(bare) :].tolist()) == bare.tolist()
        assert (answers.score[-len(bare) :] == answers.score[-1]).all() and answers.score[0] > -100
