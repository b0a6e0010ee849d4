"""Hiding structure while training.

The stated share, from none that would have nothing left, alike at every world size.
"""

from __future__ import annotations

import numpy as np
import tiny_run
import torch

from mocme_dist.batching.sampler import key64, mix64
from mocme_dist.parallel.comm import communication
from mocme_dist.train import train
from mocme_dist.training.build import build_worker, open_dataset


def hidden_rows(comm, dataset, run_dir, share: float, step: int) -> list[tuple[int, bool, bool]]:
    """(id, structure is hidden, has another modality) of this rank's entities."""
    config = tiny_run.tiny_config(
        dataset, run_dir, "modalities=[structure, numeric]", f"train.structure_dropout={share}"
    )
    worker = build_worker(config, open_dataset(config.data), comm)
    rows = torch.arange(worker.last - worker.first)
    entities = worker.features(rows)
    after = worker.hide_structure(entities, rows, step)
    assert torch.equal(after.present_MV[1], entities.present_MV[1]) and bool(entities.present_MV[0].all())
    assert share or after is entities
    columns = (rows + worker.first, ~after.present_MV[0], after.present_MV[1])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_the_same_entities_are_hidden_at_every_world_size_and_none_that_has_nothing_else(
    featured_dataset, tmp_path, run_ranks
):
    found = {}
    for world in (1, 2, 3):
        found[world] = [
            row for rows in run_ranks(world, hidden_rows, featured_dataset, tmp_path, 0.5, 7) for row in rows
        ]
    assert found[1] == found[2] == found[3] and len(found[1]) == 60
    expected = mix64(np.arange(60, dtype=np.uint64) ^ key64(0, 4, 7)) < np.uint64(2**63)
    assert [hidden for _, hidden, _ in found[1]] == [bool(expected[at]) and other for at, _, other in found[1]]
    hidden = [is_hidden for _, is_hidden, other in found[1] if other]
    assert 0.3 < np.mean(hidden) < 0.7 and not any(is_hidden for _, is_hidden, other in found[1] if not other)


def test_it_changes_from_step_to_step_and_is_off_by_default(featured_dataset, tmp_path):
    with communication(60) as comm:
        first, second = (hidden_rows(comm, featured_dataset, tmp_path, 0.5, step) for step in (1, 2))
        off = hidden_rows(comm, featured_dataset, tmp_path, 0.0, 1)
    assert first != second and not any(hidden for _, hidden, _ in off)


def test_a_run_with_it_trains(featured_dataset, tmp_path):
    config = tiny_run.tiny_config(
        featured_dataset, tmp_path / "run", "modalities=[structure, numeric]", "train.structure_dropout=0.3"
    )
    report = train(config)
    assert 0 < report["mrr"] <= 1
