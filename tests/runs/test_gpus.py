"""launch.gpus_per_worker decides the device, whatever torch sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mocme_dist.config import load_config
from mocme_dist.config.schema import LaunchConfig
from mocme_dist.errors import ConfigError
from mocme_dist.parallel.comm import communication, pick_device
from mocme_dist.runs.launch import choose_gpus, gpus_of_this_machine


@pytest.fixture
def two_gpus(monkeypatch):
    """torch says that it sees two GPUs, as it does in a worker that Ray gave none: Ray hides them no longer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def launch(**values) -> LaunchConfig:
    return LaunchConfig(**values)


@pytest.mark.parametrize(
    "settings, fitting, gpus, each, said",
    [
        ({}, 0, 0, 0, None),
        ({}, 2, 2, 1, None),
        (
            {},
            1,
            1,
            0,
            "auto: 2 workers with a GPU and 1 CPUs each do not fit .* room for 1: training on CPUs, 1 GPU of",
        ),
        ({}, 4, 4, 1, "^2 GPUs of the cluster stay idle: 2 workers with 1 each leave them; raise launch.workers"),
        ({"workers": (1, 4)}, 1, 1, 1, None),
        ({"workers": 1}, 1, 1, 1, None),
        ({"gpus_per_worker": 0}, 2, 2, 0, "=0: training on CPUs, 2 GPUs of the cluster stay idle; auto takes one"),
        ({"gpus_per_worker": 0}, 0, 0, 0, None),
        ({"gpus_per_worker": 0.5}, 1, 1, 0.5, None),
        ({"gpus_per_worker": 2, "workers": 1}, 0, 0, 2, None),
    ],
)
def test_auto_is_one_per_worker_where_the_cluster_has_them_and_idle_ones_are_named(settings, fitting, gpus, each, said):
    chosen, warning = choose_gpus(launch(**settings), fitting, gpus)
    assert chosen == each
    assert warning is None if said is None else re.search(said, str(warning)), warning


def test_the_default_is_auto_and_wrong_values_are_named_once():
    assert LaunchConfig().gpus_per_worker == "auto" and LaunchConfig().gpus == 0
    assert load_config([], ["launch.gpus_per_worker=2"]).launch.gpus == 2
    for value in ("-1", "all", "true", "[1]"):
        with pytest.raises(ConfigError, match=r"^launch\.gpus_per_worker: expected auto or a number from 0 to 64, got"):
            load_config([], [f"launch.gpus_per_worker={value}"])


def test_none_is_the_cpu_whatever_torch_sees(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(0) == torch.device("cpu")
    assert pick_device("auto") == pick_device(1) == torch.device("cuda", 1)
    with communication(30, 0) as comm:  # CUDA's own group could not be made here
        assert comm.device.type == "cpu" and comm.gather(3) == [3]


def test_a_gpu_that_is_asked_for_and_not_seen_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^launch\.gpus_per_worker=1: torch finds no GPU on .*gpus_per_worker=0$"):
        pick_device(1)


def test_a_plan_counts_the_gpus_of_this_machine(two_gpus):
    launch = load_config([], ["launch.workers=2"]).launch
    assert gpus_of_this_machine(launch, 2).gpus == 1
    assert gpus_of_this_machine(launch, 3).gpus == 0
    none = load_config([], ["launch.gpus_per_worker=0"]).launch
    assert gpus_of_this_machine(none, 1).gpus == 0


WITH_RAY = """
import json, logging
import ray
from mocme_dist.config import load_config
from mocme_dist.runs.launch import start_ray
from mocme_dist.runs.supervisor import resources_of
logging.basicConfig(level=logging.WARNING, format="%(message)s")
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=100_000_000)
found = {}
for setting in ("auto", "0", "0.5"):
    config = load_config([], ["encoders.actors=1", f"launch.gpus_per_worker={setting}"])
    launch = start_ray(config.launch, config.encoders)
    start_ray(launch, config.encoders)
    found[setting] = resources_of(launch)
print(json.dumps(found))
ray.shutdown()
"""


@pytest.mark.ray
def test_ray_is_asked_for_what_was_decided():
    """A Ray that believes in two GPUs; it never looks for them."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    done = subprocess.run([sys.executable, "-c", WITH_RAY], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "auto": {"CPU": 1, "GPU": 1},
        "0": {"CPU": 1},
        "0.5": {"CPU": 1, "GPU": 0.5},
    }
    assert done.stderr.count("launch.gpus_per_worker=0: training on CPUs, 2 GPUs of the cluster stay idle") == 1
