"""The whole model under every engine: what ZeRO partitions, evaluates and saves is what the plain twin has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import losses, tiny_config

from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.task import run_evaluation, run_training
from mocme_dist.training import checkpoint

RATES = ("train.schedule=cosine", "train.warmup_steps=3", "relations.learning_rate=0.03")
MODEL = ("modalities=[structure, numeric]", "mine.every=2", "train.gradient_clipping=0.5", "train.epochs=2", *RATES)
PLAIN = ("deepspeed.engine=torch",)
STAGES = [("deepspeed.engine=deepspeed", f"deepspeed.stage={stage}") for stage in range(4)]
BF16 = ("deepspeed.engine=deepspeed", "deepspeed.stage=2", "deepspeed.bf16=true")


def go(comm: Any, dataset: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    config = tiny_config(dataset, folder, *MODEL, *overrides)
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    comm.barrier()
    return run_training(config)


def body(comm: Any, dataset: Path, folder: Path) -> list[dict[str, Any]]:
    """Every engine from the start; then each from the middle of the plain run.

    One launch, as DeepSpeed costs seconds to import.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    reports = [go(comm, dataset, folder / "plain", *PLAIN)]
    for number, stage in enumerate(STAGES):
        reports.append(go(comm, dataset, folder / f"stage{number}", *stage))
    for number, stage in enumerate(STAGES):
        # Go on at step 9 with another engine than the one that saved it.
        target = folder / f"resumed{number}"
        if comm.rank == 0:
            shutil.copytree(folder / "plain", target)
            Checkpoints(target).rewind("9")
        comm.barrier()
        reports.append(go(comm, dataset, target, *stage))
    reports.append(go(comm, dataset, folder / "bf16", *BF16))
    again = run_evaluation(tiny_config(dataset, folder / "stage3", *MODEL, *STAGES[3]), "test", "auto")
    assert again["mrr"] == reports[4]["mrr"]
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_stage_trains_saves_and_resumes_as_the_plain_engine(run_ranks, featured_dataset, tmp_path, world):
    plain, *others = run_ranks(world, body, featured_dataset, tmp_path)[0]
    expected = losses(tmp_path / "plain")
    assert set(expected) == {3, 6, 9, 12, 15, 18}
    for name in [*(f"stage{n}" for n in range(4)), *(f"resumed{n}" for n in range(4))]:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4), name
    assert losses(tmp_path / "bf16") == pytest.approx(expected, rel=0.1)
    for report in others[:-1]:
        assert report["mrr"] == pytest.approx(plain["mrr"], rel=1e-3)
    newest = [Checkpoints(tmp_path / name).find("18") for name in ("plain", "stage3")]
    left, right = (checkpoint.load_dense(saved) for saved in newest if saved is not None)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
