"""A run of the form "blocks", from training to a bundle: resumed exactly, ranked by sums of blocks, exported, asked."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import STEPS_PER_EPOCH, final_hashes, tiny_config

from mocme_dist.config import Config
from mocme_dist.errors import CheckpointError, Preempted
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.model.blocks import block_distances
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import find, run_training
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.checkpoint import Saved
from mocme_dist.training.loop import restore
from mocme_dist.training.worker import Worker

# Three blocks of 8: structure, numbers, and the fused one.
BLOCKS = (
    "modalities=[structure, numeric]",
    "fusion.form=blocks",
    "experts.width=26",
    "train.structure_dropout=0.3",
    "train.epochs=2",
)
LAST = 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def run_of_blocks(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped once; beside it, the same run undisturbed."""
    folder = tmp_path_factory.mktemp("blocks")
    for name, stop in (("whole", None), ("run", 11)):
        config = tiny_config(featured_dataset, folder / name, *BLOCKS)
        Path(config.run.dir, "checkpoints").mkdir(parents=True)
        if stop is not None:
            asked = itertools.count(1)
            with pytest.raises(Preempted):
                run_training(config, lambda asked=asked, stop=stop: next(asked) >= stop)  # type: ignore[misc]
        run_training(config)
    return folder / "run"


def restored(config: Config, comm: Comm) -> tuple[Worker, Saved]:
    """The worker of a run at its best checkpoint."""
    worker = build_worker(config, open_dataset(config.data), comm)
    saved = find(RunDirectory(config.run.dir), worker, "auto")
    assert saved is not None
    restore(worker, saved)
    return worker, saved


def test_a_resumed_run_ends_in_the_bits_of_an_undisturbed_one(run_of_blocks):
    assert final_hashes(run_of_blocks, LAST) == final_hashes(run_of_blocks.parent / "whole", LAST) != {}


def test_ranks_are_those_of_the_sum_over_blocks(featured_dataset, run_of_blocks):
    config = tiny_config(featured_dataset, run_of_blocks, *BLOCKS)
    with communication(60) as comm:
        worker, _ = restored(config, comm)
        found = worker.evaluate("valid")
        z_ED = worker.encode_rows().z_rD
    assert worker.model.blocks == (3, 8) and z_ED.shape == (60, 24) and worker.table.width == 8
    queries, known = split_queries(worker.dataset.triples("valid"), 0), worker.dataset.known("all")
    ids = (np.asarray(queries.source), np.asarray(queries.relation), np.asarray(queries.direction))
    offsets, answers = known.lookup(*ids)
    sign = torch.from_numpy(1.0 - 2.0 * ids[2]).float()
    phases = worker.model.relations(torch.from_numpy(ids[1])).detach()
    query_QD = rotate(z_ED[torch.from_numpy(ids[0])], phases, sign)
    total_QE = block_distances(query_QD, z_ED, 3, compiled=False).double().sum(0).numpy()
    ranks = []
    for q, target in enumerate(np.asarray(queries.target)):
        own = total_QE[q, target]
        others = np.delete(total_QE[q], np.union1d(answers[offsets[q] : offsets[q + 1]], [target]))
        ranks.append(1 + (others < own).sum() + (others == own).sum() / 2)
    assert np.mean(1 / np.asarray(ranks)) == pytest.approx(found["mrr"], abs=1e-3)


def test_another_form_is_refused(featured_dataset, run_of_blocks):
    config = tiny_config(featured_dataset, run_of_blocks, *BLOCKS, "fusion.form=sum")
    with communication(60) as comm, pytest.raises(CheckpointError, match=r"fusion\.form blocks -> null"):
        restored(config, comm)


def test_its_bundle_answers_and_takes_new_entities(featured_dataset, run_of_blocks, tmp_path):
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.export import export_bundle
    from mocme_dist.serving.neighbours import neighbours
    from mocme_dist.serving.rows import RunRows
    from mocme_dist.serving.unseen import UnseenEntityEncoder

    config = tiny_config(featured_dataset, run_of_blocks, *BLOCKS)
    with communication(60) as comm:
        worker, saved = restored(config, comm)
        z_ED = worker.encode_rows().z_rD.numpy()
    export_bundle(RunRows(config, worker.dataset, saved), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert np.array_equal(np.concatenate(bundle.vector_parts), z_ED) and bundle.view_parts[0].shape == (2, 60, 8)
    assert set(neighbours(bundle, 0)) <= {"structure", "numeric"}
    encoder = UnseenEntityEncoder(bundle)
    given = f"{encoder.attributes[0]}=1.5"
    unseen, weights = encoder.entity_of(encoder.describe(given))
    assert unseen.vector_D.shape == (24,) and weights == {"numeric": 1.0}
