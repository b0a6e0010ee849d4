"""What the background thread looks up for coming steps is what looking it up in the step would give, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from mocme_dist.batching.sampler import key64, mix64
from mocme_dist.errors import DataError
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.prefetch import Prefetcher
from mocme_dist.train import train
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.prefetch import DevicePrefetcher
from mocme_dist.training.worker import Worker

STEPS = 4
MODALITIES = "modalities=[numeric, structure]"


def expected_input(worker: Worker, rows_V: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    """Features, presence and who is held out, from dense tables of the whole rank and the documented draws."""
    everyone = torch.arange(worker.last - worker.first)
    values_rF, present_r = worker.stores["numeric"].gather(everyone)
    ids_V = (rows_V + worker.first).numpy()
    drawn_V = torch.from_numpy(mix64(ids_V.astype(np.uint64) ^ key64(0, 4, step)) < np.uint64(2**63))
    present_V = present_r[rows_V]
    return values_rF[rows_V], torch.stack([present_V, ~(drawn_V & present_V)]), torch.from_numpy(ids_V % 2 == 1)


def compare_inputs(comm: Comm, dataset: Path, run_dir: Path, overrides: list[str]) -> int:
    """Body of one rank: steps from the background thread, while rows change, against their twins.

    How many were known ahead.
    """
    config = tiny_config(dataset, run_dir, MODALITIES, "train.structure_dropout=0.5", *overrides)
    worker = build_worker(config, open_dataset(config.data), comm)
    ahead = 0
    with Prefetcher(map(worker.prepare, range(STEPS))) as steps:
        for step, prepared in enumerate(steps):
            worker.table.rows_rD.add_(1.0)
            ahead += sum(part.entities is not None for part in prepared)
            for part in worker.micro_batches(prepared, step):
                rows_V = part.route.rows_V
                values_VF, present_MV, held_out_V = expected_input(worker, rows_V, step)
                assert list(part.entities.raw) == ["numeric", "structure"]
                assert torch.equal(part.entities.raw["numeric"], values_VF)
                assert torch.equal(part.entities.raw["structure"], worker.table.rows_rD[rows_V])
                assert (
                    part.entities.raw["structure"] is part.rows_VD
                    and part.rows_VD.is_leaf
                    and part.rows_VD.requires_grad
                )
                assert torch.equal(part.entities.present_MV, present_MV) and bool((~present_MV[1]).any())
                train_T, held_out_H = held_out_V.logical_not().nonzero()[:, 0], held_out_V.nonzero()[:, 0]
                assert part.entities.halves is not None and part.entities.halves.stride == 1
                assert torch.equal(part.entities.halves.train_T, train_T)
                assert torch.equal(part.entities.halves.held_out_H, held_out_H)
    return ahead


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("residency", ["host", "mmap"])
def test_inputs_equal_plain_look_ups_and_are_made_ahead_where_that_waits_for_a_disk(
    run_ranks, featured_dataset, tmp_path, world, residency
):
    found = run_ranks(world, compare_inputs, featured_dataset, tmp_path, [f"features.residency={residency}"])
    assert found == [STEPS if residency == "mmap" else 0] * world


def test_parts_of_a_step_are_looked_up_one_at_a_time(run_ranks, featured_dataset, tmp_path):
    """They exist to hold little at once: the features of all of them are never in memory together."""
    overrides = ["features.residency=mmap", "deepspeed.gradient_accumulation_steps=2"]
    assert run_ranks(2, compare_inputs, featured_dataset, tmp_path, overrides) == [0, 0]


def test_what_goes_wrong_ahead_ends_the_run_as_the_error_that_it_is(featured_dataset, tmp_path, monkeypatch):
    original = Worker.step_features

    def torn(self: Worker, rows_V: torch.Tensor, step: int) -> Any:
        if step == 5:
            raise DataError("features/numeric/part-000001.safetensors: torn")
        return original(self, rows_V, step)

    monkeypatch.setattr(Worker, "step_features", torn)
    with pytest.raises(DataError, match=r"part-000001\.safetensors: torn"):
        train(tiny_config(featured_dataset, tmp_path / "run", MODALITIES, "features.residency=mmap"))


def make_worker(comm: Comm, dataset: Path, run_dir: Path) -> Worker:
    """A worker of this process whose batches have structure and numbers."""
    config = tiny_config(dataset, run_dir, MODALITIES, "train.structure_dropout=0.5", "features.residency=mmap")
    return build_worker(config, open_dataset(config.data), comm)


def test_on_a_cpu_nothing_is_pinned_copied_or_waited_for(featured_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: pytest.fail("pinned"))
    with communication(60) as comm:
        worker = make_worker(comm, featured_dataset, tmp_path)
        (part,) = worker.prepare(0)
        assert part.mark is None
        assert {value.device.type for value in part.tensors()} == {"cpu"}
        value = torch.ones(3)
        assert worker.prefetcher.send(value) is value
        worker.prefetcher.receive(None, iter(lambda: pytest.fail("touched"), None))


def test_all_that_a_step_as_a_graph_takes_is_sent_from_pinned_memory(featured_dataset, tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: pinned.append(value) or value)
    overrides = ("train.structure_dropout=0.5", "compile=on", "train.one_graph=true")
    config = tiny_config(featured_dataset, tmp_path / "run", MODALITIES, *overrides)
    with communication(60) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        (twin,) = worker.prepare(0)
        worker.prefetcher = DevicePrefetcher(torch.device("meta"))
        (part,) = worker.prepare(0)
        (later,) = worker.prepare(1)
    found = list(part.tensors())
    assert [(value.device.type, value.shape, value.dtype) for value in found] == [
        ("meta", v.shape, v.dtype) for v in twin.tensors()
    ]
    # Rows, two halves, hidden structure, numbers and who has them, the total, and seven of the batch.
    assert len(found) == 14 and len(pinned) == 28
    assert [value.shape for value in later.tensors()] == [value.shape for value in found], "steps have one shape"


def test_all_that_a_part_holds_is_sent_from_pinned_memory_to_another_device(featured_dataset, tmp_path, monkeypatch):
    """To torch's device without memory, as there is no GPU here.

    What is on it cannot have been forgotten on the host.
    """
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: pinned.append(value) or value)
    with communication(60) as comm:
        worker = make_worker(comm, featured_dataset, tmp_path)
        (twin,) = worker.prepare(0)
        worker.prefetcher = DevicePrefetcher(torch.device("meta"))
        (part,) = worker.prepare(0)
    found = list(part.tensors())
    assert [(value.device.type, value.shape, value.dtype) for value in found] == [
        ("meta", v.shape, v.dtype) for v in twin.tensors()
    ]
    # Seven of the batch, two of the route, numbers, who has what, who trains the networks and who is held out.
    assert len(found) == 13 and len(pinned) >= 12
