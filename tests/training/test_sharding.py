"""The table beside the engine and inside it: nothing of the engine touches a rank's rows, and both ways train alike."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import losses, tiny_config
from torch import nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.saver import Saver
from mocme_dist.runs.task import run_training
from mocme_dist.training import checkpoint
from mocme_dist.training.build import build_worker
from mocme_dist.training.deepspeed_engine import make_engine
from mocme_dist.training.engine_rows import EngineRows, row_parameter
from mocme_dist.training.step import train_step
from mocme_dist.training.worker import Worker

UNIFORM = ("modalities=[structure, numeric]", "fusion.estimator=uniform", "train.gradient_clipping=0.5")
PLAIN = ("deepspeed.engine=torch",)
STAGES = [("deepspeed.engine=deepspeed", f"deepspeed.stage={stage}") for stage in range(4)]
BF16 = [(*stage, "deepspeed.bf16=true") for stage in STAGES]
ZERO = "entities.sharding=zero"
STEPS = 3


def make_worker(comm: Any, dataset: Path, *overrides: str) -> Worker:
    return build_worker(tiny_config(dataset, dataset / "unused", *UNIFORM, *overrides), Dataset.open(dataset), comm)


def everything(worker: Worker) -> dict[str, torch.Tensor]:
    """All that a step may move on this rank, copied."""
    table = {"rows": worker.table.rows_rD, **worker.table.state, "updates": torch.tensor(worker.table.num_updates)}
    return {name: value.clone() for name, value in {**table, **worker.engine.state()}.items()}


def take_step(worker: Worker, step: int, bad_part: int | None = None, where: str = "loss") -> Any:
    """One step; with a bad part the last rank's loss, or the gradient of its rows, is NaN there."""
    parts = list(worker.micro_batches(worker.prepare(step), step))
    if bad_part is not None and worker.comm.rank == worker.comm.world_size - 1:
        bad = parts[bad_part]
        if where == "loss":
            parts[bad_part] = bad._replace(batch=replace(bad.batch, weight_Gb=bad.batch.weight_Gb * math.nan))
        else:
            bad.rows_VD.register_hook(lambda grad: grad * math.nan)
    return train_step(worker.engine, worker.table, parts, worker.comm, worker.tally, estimate=True, timer=worker.timer)


def rows_stay_their_own(comm: Any, dataset: Path, kinds: list[tuple[str, ...]]) -> list[torch.Tensor]:
    """After initialize and after each step a shard is its rank's: only asked rows move, float32 to the bit.

    All rows of each kind.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = []
    for kind in kinds:
        worker = make_worker(comm, dataset, *kind)
        table = worker.table
        first, last = RowPartition(60, comm.world_size).bounds(comm.rank)
        start = EntityTable(RowPartition(60, 1), 0, 8, seed=0).rows_rD
        assert torch.equal(table.rows_rD, start[first:last]), kind
        for step in range(STEPS):
            before, moments = table.rows_rD.clone(), table.state["first_moment"].clone()
            asked = torch.unique(torch.cat([part.route.rows_V for part in worker.prepare(step)]))
            others = np.setdiff1d(np.arange(last - first), asked.numpy())
            assert not take_step(worker, step).skipped
            assert table.rows_rD.dtype == torch.float32
            assert (table.rows_rD[asked] != before[asked]).any(1).all(), kind
            assert torch.equal(table.rows_rD[others], before[others]) and torch.equal(
                table.state["first_moment"][others], moments[others]
            )
        found.append(torch.cat([torch.from_numpy(rows) for rows in comm.gather(table.rows_rD.numpy())]))
    return found


def bad_steps_move_nothing(comm: Any, dataset: Path, kinds: list[tuple[str, ...]]) -> None:
    """A loss, or a gradient of rows, that is not finite on one rank, in any micro-batch of a step.

    All ranks skip, to the bit.
    """
    for kind in kinds:
        undisturbed, worker = make_worker(comm, dataset, *kind), make_worker(comm, dataset, *kind)
        for each in (undisturbed, worker):
            assert not take_step(each, 0).skipped
        before = everything(worker)
        for part in range(worker.maker.num_micro_batches):
            for where in ("loss",) if ZERO in kind else ("loss", "gradient"):
                assert take_step(worker, 1, part, where).skipped
                after = everything(worker)
                assert all(torch.equal(before[name], after[name]) for name in before), (kind, part, where)
        for each in (undisturbed, worker):
            assert not take_step(each, 1).skipped
        left, right = everything(undisturbed), everything(worker)
        assert all(torch.equal(left[name], right[name]) for name in left), kind


def rows_and_faults(comm: Any, dataset: Path) -> list[torch.Tensor]:
    """One launch, as DeepSpeed costs seconds to import."""
    found = rows_stay_their_own(comm, dataset, [PLAIN, *STAGES, *BF16])
    cut = "deepspeed.gradient_accumulation_steps=2"
    kinds = [PLAIN, *STAGES, BF16[1], BF16[3]]
    bad_steps_move_nothing(
        comm, dataset, [(*kind, cut) for kind in kinds] + [(*kind, ZERO) for kind in (PLAIN, STAGES[0], *STAGES[2:])]
    )
    return found


@pytest.mark.slow
def test_nothing_of_the_engine_touches_rows_and_bad_steps_move_nothing_at_any_stage(run_ranks, featured_dataset):
    (plain,) = run_ranks(1, rows_stay_their_own, featured_dataset, [PLAIN])[0]
    for rank in run_ranks(2, rows_and_faults, featured_dataset):
        for number, rows_ED in enumerate(rank):
            bf16 = number >= 5
            # bfloat16 activations, Adam's first steps: the direction of tiny gradients may turn.
            torch.testing.assert_close(rows_ED, plain, rtol=0, atol=0.5 if bf16 else 1e-6)
            assert (rows_ED - plain).abs().mean() < (0.02 if bf16 else 1e-7)


def test_a_bad_step_moves_nothing_under_the_plain_engine(run_ranks, featured_dataset):
    cut = "deepspeed.gradient_accumulation_steps=3"
    run_ranks(3, bad_steps_move_nothing, featured_dataset, [(*PLAIN, cut), (*PLAIN, ZERO)])


def go(comm: Any, dataset: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    config = tiny_config(dataset, folder, *UNIFORM, "train.loss=one_vs_all", "train.epochs=2", *overrides)
    Path(config.run.dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    comm.barrier()
    return run_training(config)


def resume(comm: Any, dataset: Path, source: Path, target: Path, *overrides: str) -> None:
    """Go on at step 9 of `source` in another way than the one that saved it."""
    if comm.rank == 0:
        shutil.copytree(source, target)
        Checkpoints(target).rewind("9")
    comm.barrier()
    go(comm, dataset, target, *overrides)


def both_ways(comm: Any, dataset: Path, folder: Path, kinds: list[tuple[str, ...]]) -> dict[str, float]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    mrr = {"rows": go(comm, dataset, folder / "rows", *PLAIN)["mrr"]}
    for number, kind in enumerate(kinds):
        mrr[f"zero{number}"] = go(comm, dataset, folder / f"zero{number}", *kind, ZERO)["mrr"]
        resume(comm, dataset, folder / "rows", folder / f"to_zero{number}", *kind, ZERO)
    last = len(kinds) - 1
    resume(comm, dataset, folder / f"zero{last}", folder / "to_rows", *PLAIN)
    return mrr


def check_both_ways(folder: Path, mrr: dict[str, float]) -> None:
    expected = losses(folder / "rows")
    assert set(expected) == {3, 6, 9, 12, 15, 18} and expected[18] < expected[3]
    for run in folder.iterdir():
        assert losses(run) == pytest.approx(expected, rel=1e-4), run.name
    assert all(value == pytest.approx(mrr["rows"], rel=1e-3) for value in mrr.values())


@pytest.mark.parametrize("world", [1, 3])
def test_a_table_in_the_plain_engine_trains_as_rows_do_where_every_step_touches_all(
    run_ranks, featured_dataset, tmp_path, world
):
    check_both_ways(tmp_path, run_ranks(world, both_ways, featured_dataset, tmp_path, [PLAIN])[0])


@pytest.mark.slow
def test_a_table_in_the_engine_trains_as_rows_do_at_every_stage(run_ranks, featured_dataset, tmp_path):
    check_both_ways(tmp_path, run_ranks(2, both_ways, featured_dataset, tmp_path, STAGES)[0])


ROWS, WIDTH = 11, 4


class Holder(nn.Module):
    """A table of odd length in a module, beside something dense."""

    def __init__(self, partition: RowPartition) -> None:
        super().__init__()
        self.rows = row_parameter(partition, WIDTH, 1.0, 5, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.out = nn.Linear(WIDTH, 3)

    def forward(self, ids_V: torch.Tensor) -> torch.Tensor:
        return self.out(self.rows(ids_V)).float().square().sum()


def make_holder(comm: Any, kind: tuple[str, int, bool]) -> EngineRows:
    partition = RowPartition(ROWS, comm.world_size)
    module = Holder(partition)
    groups = [{"params": list(module.out.parameters()), "lr": 0.01}, {"params": [module.rows.weight], "lr": 0.05}]
    engine, stage, bf16 = kind
    config: dict[str, Any] = (
        {"engine": "deepspeed", "offload_optimizer": "cpu"} if engine == "offload" else {"engine": engine}
    )
    made = make_engine(module, groups, 0.3, DeepSpeedConfig(**config, stage=stage, bf16=bf16), comm, "rows.weight")
    return EngineRows(made, module.rows, partition, comm.rank)


def holder_step(table: EngineRows, comm: Any, step: int) -> float:
    """A few rows of each rank, some of nobody's."""
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:6]
    loss = table.engine(ids[comm.rank :: comm.world_size]) * comm.world_size
    table.engine.backward(loss)
    factor = table.engine.step(torch.zeros((), dtype=torch.float64), torch.tensor(True))
    assert factor > 0
    table.update(ids, loss, factor)
    return float(comm.sum(loss)) / comm.world_size


HOLDERS = [
    ("torch", 0, False),
    *(("deepspeed", stage, False) for stage in range(4)),
    ("offload", 2, False),
    ("offload", 3, False),
]
HOLDERS_BF16 = [("deepspeed", 2, True), ("deepspeed", 3, True)]


def all_rows(comm: Any, table: Any) -> dict[str, np.ndarray]:
    pieces = comm.gather(
        (table.first, {"rows": table.rows_rD.numpy(), **{name: value.numpy() for name, value in table.state.items()}})
    )
    return {
        name: np.concatenate([piece[name] for _, piece in sorted(pieces, key=lambda pair: pair[0])])
        for name in pieces[0][1]
    }


def write_holders(comm: Any, folder: Path, kinds: list[tuple[str, int, bool]]) -> dict[str, Any]:
    """Two steps and a checkpoint of every kind; the rows and the loss of the next step."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = {}
    for kind in kinds:
        table = make_holder(comm, kind)
        for step in range(2):
            holder_step(table, comm, step)
        path = folder / "-".join(map(str, kind))
        if comm.rank == 0:
            path.mkdir()
        comm.barrier()
        dense = table.engine.state()
        assert not [name for name in dense if "rows" in name]
        Saver(Checkpoints(path), 2, comm).save(2, table, dense, {"metric": None, "identity": {}})
        sizes = comm.gather(table.rows_rD.numel())
        assert sum(sizes) == ROWS * WIDTH and max(sizes) <= -(-ROWS // comm.world_size) * WIDTH
        out[path.name] = (all_rows(comm, table), holder_step(table, comm, 2))
    return out


def read_holders(comm: Any, folder: Path, kinds: list[tuple[str, int, bool]], written: dict[str, Any]) -> None:
    """Every kind reads every checkpoint: the rows to the bit, and the loss of the next step.

    So does a row-sharded table.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name, (rows, loss) in written.items():
        saved = Checkpoints(folder / name).find(comm=comm)
        assert saved is not None
        plain = EntityTable(RowPartition(ROWS, comm.world_size), comm.rank, WIDTH, seed=9)
        checkpoint.load_rows(saved, plain)
        assert plain.num_updates == 2
        for table in (plain, *(make_holder(comm, kind) for kind in kinds)):
            if isinstance(table, EngineRows):
                checkpoint.load_rows(saved, table)
                table.engine.load_state(checkpoint.load_dense(saved), table.num_updates)
            found = all_rows(comm, table)
            assert found.keys() == rows.keys() and all(np.array_equal(found[key], rows[key]) for key in rows), name
            if isinstance(table, EngineRows):
                half = "True" in name or table.rows.weight.dtype == torch.bfloat16
                assert holder_step(table, comm, 2) == pytest.approx(loss, rel=2e-2 if half else 1e-5), name


def test_checkpoints_of_a_table_in_the_plain_engine_have_no_topology(run_ranks, tmp_path):
    written = run_ranks(3, write_holders, tmp_path, HOLDERS[:1])[0]
    for world in (1, 2):
        run_ranks(world, read_holders, tmp_path, HOLDERS[:1], written)


@pytest.mark.slow
def test_checkpoints_of_a_table_in_the_engine_are_read_by_every_stage_and_number_of_ranks(run_ranks, tmp_path):
    written = run_ranks(2, write_holders, tmp_path, HOLDERS + HOLDERS_BF16)[0]
    expected = written["torch-0-False"]
    for name, (rows, loss) in written.items():
        bound = 0.1 if "True" in name else 1e-5
        assert loss == pytest.approx(expected[1], rel=bound), name
        assert all(np.allclose(rows[key], expected[0][key], rtol=0, atol=bound) for key in rows), name
    some = {
        name: written[name] for name in ("torch-0-False", "deepspeed-1-False", "deepspeed-3-False", "deepspeed-3-True")
    }
    run_ranks(3, read_holders, tmp_path, [HOLDERS[0], HOLDERS[3], HOLDERS[4], HOLDERS_BF16[1]], some)
