"""Between two log intervals no step reads a value of the device, copies to the host, or asks for a number of rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from mocme_dist.data.features import FeatureStore
from mocme_dist.parallel.comm import Comm
from mocme_dist.runs.task import run_training
from mocme_dist.training.loop import Loop

# Operators whose result, or its shape, a host can only know when the device is done.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")


class Watch(TorchDispatchMode):
    """Counts operators that would make the host wait for a GPU, and copies to the host, except in the loop's checks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # Autograd names the device where it changes a gradient's type; a copy to the host alone keeps the type.
        to_host = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu" and not (kwargs or {}).get("dtype")
        by_mask = name in ("index", "index_put_", "index_put") and any(
            value is not None and value.dtype in (torch.bool, torch.uint8) for value in args[1]
        )
        if self.on and (name in WAITS or to_host or by_mask):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def count_waits(dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Counter[str]:
    """Return what a run of an epoch, with one log interval at its end, does in its steps before that."""
    config = tiny_config(
        dataset, folder, "modalities=[structure, numeric]", "train.epochs=1", "train.log_every=9", *overrides
    )
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    watch, stepped = Watch(), 0
    train = Loop.train

    def watched(self: Loop, reporter: Any, stop: Any) -> None:
        def asked() -> bool:
            nonlocal stepped
            stepped += 1
            watch.on = stepped < 9  # the last step ends the interval, evaluates and saves
            return bool(stop())

        with watch:
            train(self, reporter, asked)

    def gather(self: FeatureStore, rows: torch.Tensor) -> Any:
        watch.on, before = False, watch.on  # features in the host's memory, by rows that the host has
        found = original(self, rows)
        watch.on = before
        return found

    original = FeatureStore.gather
    monkeypatch.setattr(FeatureStore, "gather", gather)
    monkeypatch.setattr(Loop, "train", watched)
    assert run_training(config)["num_queries"] == 72 and stepped == 9
    return watch.found


def watch_a_rank(comm: Comm, dataset: Path, folder: Path) -> Counter[str]:
    """Body of one of several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        return count_waits(dataset, folder, patch)


def test_several_ranks_wait_for_each_other_alone(run_ranks, featured_dataset, tmp_path):
    assert run_ranks(2, watch_a_rank, featured_dataset, tmp_path / "run") == [{}, {}]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.gradient_clipping=0.1", "mine.rows=20", "entities.dtype=bfloat16"],
        ["deepspeed.gradient_accumulation_steps=2", "train.structure_dropout=0.3"],
        ["entities.sharding=zero", "fusion.estimator=cosine", "train.schedule=linear"],
    ],
    ids=["defaults", "clipped", "in parts", "rows in the engine"],
)
def test_no_step_waits_for_the_device_between_two_log_intervals(featured_dataset, tmp_path, monkeypatch, overrides):
    assert count_waits(featured_dataset, tmp_path / "run", monkeypatch, *overrides) == {}


def test_the_watch_sees_what_waits():
    values = torch.arange(4.0)
    with Watch() as watch:
        values[values > 1].sum().item()
        torch.unique(values)
        torch.ops.aten._to_copy(values, device=torch.device("cpu"))
    assert watch.found["_local_scalar_dense"] == 1 and watch.found["_to_copy"] == 1
    assert watch.found["index"] == 1 and watch.found["_unique2"] == 1
