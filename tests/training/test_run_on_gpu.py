"""Whole runs on a GPU: the same losses as on the CPU, exact resumption, every engine and residency, recorded graphs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
import tiny_run
import torch

from mocme_dist.config import dump_config
from mocme_dist.kernels.row_update import row_update
from mocme_dist.parallel import comm
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MODALITIES = "modalities=[structure, numeric]"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"
)


def run(dataset, path, *overrides: str) -> dict[int, float]:
    train(tiny_run.tiny_config(dataset, path, MODALITIES, "train.log_every=1", *overrides))
    return tiny_run.losses(path)


@pytest.fixture(scope="module")
def on_cpu(featured_dataset, tmp_path_factory) -> dict[int, float]:
    """Losses of the plain form on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "pick_device", lambda *_: torch.device("cpu"))
        return run(featured_dataset, tmp_path_factory.mktemp("cpu") / "run")


CASES = {
    "plain": ("compile=off",),
    "compiled": ("compile=on", "train.one_graph=false", "train.cuda_graphs=false"),
    "recorded loss": ("compile=on", "train.one_graph=false", "train.cuda_graphs=true"),
    "one graph": ("compile=on", "train.one_graph=true", "train.cuda_graphs=false"),
    "recorded step": ("compile=on", "train.one_graph=true", "train.cuda_graphs=true", "mine.every=2"),
    "device": ("compile=on", "train.one_graph=true", "features.residency=device"),
    "mmap": ("compile=off", "features.residency=mmap"),
    "zero": ("compile=off", "entities.sharding=zero"),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_cpus(case, featured_dataset, tmp_path, on_cpu):
    found = run(featured_dataset, tmp_path / "run", *CASES[case])
    first = min(on_cpu)
    assert found.keys() == on_cpu.keys()
    assert found[first] == pytest.approx(on_cpu[first], rel=1e-5)
    assert found[max(found)] == pytest.approx(on_cpu[max(found)], rel=0.02)  # rounding grows with the steps
    assert found[max(found)] < found[first]


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_deepspeed_trains_on_a_gpu(stage, precision, featured_dataset, tmp_path, on_cpu):
    how = (
        MODALITIES,
        "train.log_every=1",
        "deepspeed.engine=deepspeed",
        f"deepspeed.stage={stage}",
        f"train.precision={precision}",
    )
    config = tiny_run.tiny_config(featured_dataset, tmp_path / "run", *how, "compile=on")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    # A process of its own: DeepSpeed does not start twice in one once its group is gone.
    command = [sys.executable, "-m", "mocme_dist.train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = tiny_run.losses(tmp_path / "run")
    near = 1e-5 if precision == "float32" else 0.02
    assert found[min(found)] == pytest.approx(on_cpu[min(found)], rel=near)
    assert found[max(found)] == pytest.approx(on_cpu[max(found)], rel=0.05)


def test_a_run_that_was_cut_off_goes_on_as_if_it_were_not(featured_dataset, tmp_path):
    whole = run(featured_dataset, tmp_path / "whole")
    run(featured_dataset, tmp_path / "part", "train.epochs=1")
    shutil.rmtree(tmp_path / "part" / "tensorboard", ignore_errors=True)
    found = run(featured_dataset, tmp_path / "part")
    for step in whole:
        assert found[step] == pytest.approx(whole[step], rel=1e-3)


def test_rows_of_bfloat16_and_adagrad(featured_dataset, tmp_path):
    found = run(
        featured_dataset, tmp_path / "run", "entities.dtype=bfloat16", "entities.optimizer=adagrad", "compile=on"
    )
    assert found[max(found)] < found[min(found)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("width", [6, 256])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_kernels_move_rows_as_torch_does_and_leave_the_others(optimizer, width, decay):
    how = {"optimizer": optimizer, "learning_rate": 0.01, "weight_decay": decay, "seed": 3}
    plain = EntityTable(RowPartition(50, 1), 0, width, **how)
    fused = EntityTable(RowPartition(50, 1), 0, width, **how, device="cuda", fused=row_update("cuda"))
    for step in range(6):
        gen = torch.Generator().manual_seed(step)
        rows_V = torch.randperm(40, generator=gen)[: (9, 0, 1)[step % 3]]
        grad_VD = torch.randn(len(rows_V), width, generator=gen) * 10.0 ** (step - 3)
        plain.update(rows_V, grad_VD)
        fused.update(rows_V.cuda(), grad_VD.cuda())
    torch.testing.assert_close(fused.rows_rD.cpu(), plain.rows_rD, rtol=1e-5, atol=1e-6)
    for name, value in plain.state.items():
        torch.testing.assert_close(fused.state[name].cpu(), value, rtol=1e-5, atol=1e-7)
    before = EntityTable(RowPartition(50, 1), 0, width, **how)
    assert torch.equal(fused.rows_rD[40:].cpu(), before.rows_rD[40:])
