"""Row 14 of the fault matrix.

A resumed run trains on every query once an epoch, none skipped and none repeated, at any number of ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import STEPS_PER_EPOCH, final_hashes, tiny_config

from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import Preempted
from mocme_dist.runs.task import run_training
from mocme_dist.training.worker import Worker

EPOCHS = 2
Query = tuple[int, int, int, int]


def queries_of(batch: Any) -> list[Query]:
    """(source, relation, sign, target) of a batch, without its filling."""
    real = batch.weight_Gb.numpy() > 0
    columns = (
        batch.ids_U[batch.source_Gb.numpy()],
        batch.relation_Gb.numpy(),
        batch.sign_Gb.numpy(),
        batch.ids_U[batch.target_Gb.numpy()],
    )
    return [tuple(map(int, row)) for row in zip(*(column[real] for column in columns), strict=True)]  # type: ignore[misc]


def run_in_pieces(comm: Any, dataset: Path, run_dir: Path, stops: list[int]) -> list[tuple[int, list[Query]]]:
    """Train, stopping after each of `stops` steps; (step, queries) of all that this rank really trained on."""
    config = tiny_config(
        dataset, run_dir, "modalities=[structure, numeric]", f"train.epochs={EPOCHS}", "train.eval_every=9"
    )
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    trained: list[tuple[int, list[Query]]] = []
    original = Worker.micro_batches

    def parts(self: Any, prepared: Any, *rest: Any) -> Any:
        trained.extend((part.batch.step, queries_of(part.batch)) for part in prepared)
        return original(self, prepared, *rest)

    Worker.micro_batches = parts  # type: ignore[method-assign]
    try:
        done = 0
        for stop in stops:
            asked = itertools.count(done + 1)
            with pytest.raises(Preempted, match=r"stopped at step \d+ of") as stopped:
                run_training(config, lambda asked=asked, stop=stop: next(asked) >= stop)  # type: ignore[misc]
            # Several ranks learn of a stop with a batch that is planned up to four steps later.
            late = 0 if comm.world_size == 1 else 4
            done, first = int(str(stopped.value).split()[3]), max(stop, done + 1)
            assert first <= done <= first + late
        run_training(config)
    finally:
        Worker.micro_batches = original  # type: ignore[method-assign]
    return trained


@pytest.mark.parametrize(
    "world, stops",
    [
        # One step, in the middle, the last of an epoch, the first of the next.
        (1, [1, 5, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1]),
        (2, [STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH]),
        (3, [5, STEPS_PER_EPOCH + 1]),
    ],
)
def test_row_14_no_query_is_skipped_or_repeated_however_often_a_run_is_stopped(
    run_ranks, featured_dataset, tmp_path, world, stops
):
    by_step: dict[int, Counter[Query]] = {}
    for rank in run_ranks(world, run_in_pieces, featured_dataset, tmp_path / "pieces", stops):
        assert [step for step, _ in rank] == list(range(EPOCHS * STEPS_PER_EPOCH)), "each step once, in order"
        for step, queries in rank:
            by_step.setdefault(step, Counter()).update(queries)
    triples = np.asarray(Dataset.open(featured_dataset).triples("train"))
    every = Counter({(h, r, 1, t): n for (h, r, t), n in Counter(map(tuple, triples.tolist())).items()})
    every.update({(t, r, -1, h): n for (h, r, _, t), n in list(every.items())})
    for epoch in range(EPOCHS):
        seen = sum(
            (by_step[step] for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)), Counter[Query]()
        )
        assert seen == every, f"epoch {epoch}"
    run_ranks(world, run_in_pieces, featured_dataset, tmp_path / "whole", [])
    last = EPOCHS * STEPS_PER_EPOCH
    assert final_hashes(tmp_path / "pieces", last) == final_hashes(tmp_path / "whole", last) != {}
