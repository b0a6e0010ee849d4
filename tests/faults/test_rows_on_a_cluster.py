"""Rows 6, 7 and 10 of the fault matrix.

A simulated cluster of three nodes loses one, gets one back, is told that one leaves, and loses one for good.

The first run is at a URL, and each node has a cache of its own: ranks and launcher share nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_harness import UNIFORM, Command, checkpoints, ranks, train_arguments
from tiny_run import losses, tiny_config

from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

LAST = 270
# Not the entropy classes: their weights jump at a threshold, and at step 156 here one negative stands so near to it
# that a last digit, which world sizes differ by, moved it across in 3 of 12 runs.
SMOOTH = "negatives.weighting=self_adversarial"
LENGTH = ("train.epochs=30", "train.checkpoint_steps=20", "train.eval_every=30", "train.checkpoint_every=30", SMOOTH)
SLOW = {"MOCME_TEST_SLOW_SYNC": "0.25"}


def add_node(cluster: Any, folder: Path, name: str) -> None:
    """A node of one CPU whose processes have a cache of their own."""
    cluster.add_node(
        num_cpus=1, object_store_memory=80_000_000, env_vars={"MOCME_CACHE": str(folder / f"cache-{name}")}
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the caches of all nodes."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cluster(caches: Path) -> Iterator[Any]:
    """Three nodes of one CPU each on loopback; the driver lives on the first."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read when ray is imported
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="mocme-cluster-")  # not pytest's: paths of sockets may have 107 characters
    head = {
        "num_cpus": 1,
        "env_vars": {"MOCME_CACHE": str(caches / "cache-head")},
        "include_dashboard": False,
        "object_store_memory": 80_000_000,
        "temp_dir": folder,
        "_system_config": {
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 3000,
            "health_check_failure_threshold": 3,
        },
    }
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        for name in "bc":
            add_node(made, caches, name)
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def remove_rank(cluster: Any, run_dir: Path, rank: int) -> None:
    """The node under a rank dies, without a word."""
    node = ranks(run_dir)[rank]["node"]
    (found,) = [each for each in cluster.worker_nodes if each.node_id == node]
    cluster.remove_node(found, allow_graceful=False)


def working(run_dir: Path, world_size: int) -> bool:
    """Whether the newest attempt has so many ranks and all of them take steps."""
    now = ranks(run_dir)
    return len(now) == world_size and all(sign["step"] is not None and sign["world_size"] == world_size for sign in now)


def not_head(cluster: Any, run_dir: Path) -> int:
    return next(sign["rank"] for sign in ranks(run_dir) if sign["node"] != cluster.head_node.node_id)


def drain(cluster: Any, run_dir: Path, rank: int) -> str:
    """Tell the cluster that the node under a rank is about to leave, as its provider would; the id of the node."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    node = ranks(run_dir)[rank]["node"]
    accepted, why_not = GcsClient(address=cluster.address).drain_node(
        node, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "a test", int(1000 * (time.time() + 600))
    )
    assert accepted, why_not
    return str(node)


def join(cluster: Any, caches: Path) -> dict[str, str]:
    """The environment of a driver on the first node."""
    return {
        "RAY_ADDRESS": cluster.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "MOCME_CACHE": str(caches / "cache-head"),
    }


@pytest.fixture(scope="module")
def alone(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process without Ray."""
    path = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_config(featured_dataset, path, *UNIFORM, *LENGTH))
    assert len(losses(path)) == LAST
    return losses(path)


def test_rows_06_and_10_a_run_shrinks_and_grows_with_its_cluster_and_its_curve_does_not_show_it(
    featured_dataset, cluster, caches, alone, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOCME_CACHE", str(caches / "cache-head"))
    url = f"file://{tmp_path}/bucket/run"
    run_dir = RemoteStorage(url).path  # on the launcher's node
    arguments = train_arguments(
        featured_dataset, url, *UNIFORM, *LENGTH, "launch.workers=[2,3]", "launch.resize_s=1", "launch.max_failures=2"
    )
    with Command(tmp_path, *arguments, **join(cluster, caches), **SLOW) as command:
        command.wait_for(lambda: working(run_dir, 3) and RemoteStorage(url).list("checkpoints/*/MANIFEST.json"))
        remove_rank(cluster, run_dir, not_head(cluster, run_dir))
        command.wait_for(lambda: working(run_dir, 2))
        add_node(cluster, caches, "d")
        command.wait_for(lambda: working(run_dir, 3))
        left = drain(cluster, run_dir, not_head(cluster, run_dir))
        command.wait_for(lambda: working(run_dir, 2) and left not in {sign["node"] for sign in ranks(run_dir)})
        code, last = command.end()
    text = command.text
    assert code == 0, text[-4000:]
    assert json.loads(last)["step"] == LAST
    RemoteStorage(url).pull("metrics.jsonl")
    assert losses(run_dir) == pytest.approx(alone, rel=1e-4)
    resumed = re.findall(r"resuming from step (\d+) of 270 \(step_\S+\) with (\d) rank\(s\), saved by (\d)", text)
    assert [(int(now), int(then)) for _, now, then in resumed] == [(2, 3), (3, 2), (2, 3)]
    # Growing and leaving save first: no step is made twice.
    assert re.search(r"the nodes of rank \d \(pid \d+ on \S+\) are leaving: saving, to continue with the others", text)
    assert re.search(r"the cluster has room for 3 workers, 2 are running: saving, to continue with all", text)
    assert re.search(r"rank \d \(pid \d+ on \S+\) was lost at step \d+ .*; restart 1 of 2 from \S+/step_\d+", text)
    assert "Traceback" not in text
    assert json.loads(RemoteStorage(url).get("run_status.json") or b"")["state"] == "done"
    for name in ("head", "b", "c", "d"):  # each node has written rows, and none has those of all
        assert len({path.name for path in (caches / f"cache-{name}").rglob("checkpoints/step_*/rows-*")}) in (0, 1, 2)
    (drained,) = [node for node in cluster.worker_nodes if node.node_id == left]
    cluster.remove_node(drained)
    add_node(cluster, caches, "e")


def test_row_07_a_run_ends_where_too_few_nodes_are_left(featured_dataset, cluster, caches, alone, tmp_path):
    fixed = tmp_path / "fixed"
    arguments = train_arguments(featured_dataset, fixed, *UNIFORM, *LENGTH, "launch.workers=3", "launch.wait_s=4")
    with Command(tmp_path, *arguments, **join(cluster, caches), **SLOW) as command:
        command.wait_for(lambda: working(fixed, 3) and checkpoints(fixed))
        remove_rank(cluster, fixed, not_head(cluster, fixed))
        code, last = command.end()
    final = command.text.strip().splitlines()[-1]
    assert code == 70 and not last.startswith("{"), command.text[-4000:]
    newest = fixed / "checkpoints" / f"step_{checkpoints(fixed)[-1]:010d}"
    assert re.search(
        rf"error: RankError: needs 3 workers, cluster has 2( free, .*)?; waited 4 s .*; last checkpoint: {newest}; run"
        r" the same",
        final,
    )
    # The checkpoint is good for whatever comes next: here a process without Ray.
    train(tiny_config(featured_dataset, fixed, *UNIFORM, *LENGTH, "deepspeed.engine=deepspeed"))
    assert losses(fixed) == pytest.approx(alone, rel=1e-4)
