"""A run at a URL on a cluster whose machines share nothing else: the launcher's, and two with a rank each."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_harness import ENVIRONMENT, UNIFORM, Command, train_arguments
from tiny_run import losses, tiny_config

from mocme_dist.data.storage import Mirror
from mocme_dist.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

LENGTH = ("train.epochs=14", "train.checkpoint_steps=20", "train.eval_every=14", "train.checkpoint_every=14")


def environment(folder: Path, machine: str) -> dict[str, str]:
    """Of the processes of one machine: a cache of its own, and a disk that is slow."""
    return {"MOCME_CACHE": str(folder / f"cache-{machine}"), "PYTHONPATH": ENVIRONMENT["PYTHONPATH"], "MOCME_TEST_SLOW_SYNC": "0.15"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A head without room for a rank, where the launcher lives, and one machine beside it."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read when ray is imported
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="mocme-cluster-")  # not pytest's: paths of sockets may have 107 characters
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": 80_000_000,
        "temp_dir": folder,
        "env_vars": environment(tmp_path, "head"),
    }
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        made.add_node(num_cpus=1, object_store_memory=80_000_000, env_vars=environment(tmp_path, "b"))
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_grows_over_machines_that_share_only_a_url(featured_dataset, cluster, tmp_path, monkeypatch):
    train(tiny_config(featured_dataset, tmp_path / "alone", *UNIFORM, *LENGTH))
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache-test"))
    url = f"file://{tmp_path}/bucket/run"
    arguments = train_arguments(featured_dataset, Path("replaced"), *UNIFORM, *LENGTH, "launch.workers=[1,2]", "launch.resize_s=1")
    arguments = [f"run.dir={json.dumps(url)}" if each.startswith("run.dir=") else each for each in arguments]
    with Command(tmp_path, *arguments, RAY_ADDRESS=cluster.address, MOCME_CACHE=str(tmp_path / "cache-head")) as command:
        command.wait_for(lambda: Mirror(url).listing("checkpoints/*/MANIFEST.json"))
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000, env_vars=environment(tmp_path, "c"))
        code, last = command.end()
    text = command.text
    assert code == 0, text[-4000:]
    assert json.loads(last)["step"] == 126
    # The launcher's machine asked the rank on the other one to save, and heard that it had and, in the end, the report.
    assert re.search(r"the cluster has room for 2 workers, 1 are running: saving, to go on with all", text)
    assert re.search(r"resuming from step \d+ of 126 \(step_\S+\) with 2 rank\(s\), saved by 1", text)
    assert "Traceback" not in text
    Mirror(url).pull("metrics.jsonl")
    assert losses(Mirror(url).path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert json.loads(Mirror(url).read("run_status.json") or b"")["state"] == "done"
    parts = {name: {path.name for path in (tmp_path / f"cache-{name}").rglob("checkpoints/step_*/rows-*")} for name in ("head", "b", "c")}
    assert parts["head"] == set() and {"rows-00000.safetensors", "rows-00001.safetensors"} == parts["b"] | parts["c"]
    assert len(list((tmp_path / "cache-head").rglob("ranks/*.json"))) == 3
