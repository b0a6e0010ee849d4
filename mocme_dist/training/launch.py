"""Who runs the workers: Ray Train, or this process. The only file that knows ray.train.

A worker function is the same either way. Under Ray its result and its end travel through the run directory: rank 0
writes metrics.json and run_status.json, and a mistake of the user's is not retried, because trying again would not
mend it; lost workers are (see `supervise`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mocme_dist.cluster import connect_ray, count_workers, keep_pages, may_grow
from mocme_dist.config import Config
from mocme_dist.config.load import parse_config
from mocme_dist.data.files import write_json
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError
from mocme_dist.training.board import Post, open_board
from mocme_dist.training.lease import Lease
from mocme_dist.training.pulse import Pulse
from mocme_dist.training.rundir import RunDirectory
from mocme_dist.training.stopping import StopRequest
from mocme_dist.training.supervise import FINAL, OUTCOME, Supervisor, resources_of

log = logging.getLogger(__name__)

# Defaults for Ray Train, seconds. Health: a dead worker is noticed at once, a hung one within half a minute. Ray would
# wait half a minute more for the survivors of a broken group to say goodbye.
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}


def launch(config: Config, task: str, lease: Lease | None = None, **arguments: Any) -> dict[str, Any]:
    """Run `task` ("train" or "evaluate") on the workers of `config.launch`; its report.

    Args:
        config: with absolute paths.
        lease: of a training at a URL.
        arguments: of the task: split and step for "evaluate".

    Raises:
        MocmeError: of whatever kind ended the workers.
    """
    directory = RunDirectory(config.run.dir)
    if config.launch.mode == "ray":
        start_ray(config)  # before the signals: joining Ray puts its own handler on SIGTERM
    if task == "train" and config.run.resume != "auto":
        # Once and here: workers that are restarted go on from their own newest checkpoint.
        if not is_follower(config):
            _rewind(directory, lease, config.run.resume)
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    if lease is not None:
        arguments["held"] = lease.held
    directory.path.mkdir(parents=True, exist_ok=True)  # of a run at a URL, on a machine that has not seen it
    stop = StopRequest(directory.stop_file)
    with stop.listening() if task == "train" else nullcontext():
        if config.launch.mode == "local":
            _tune_process(config)
            return _run_task(config, task, arguments)
        return Supervisor(config, task, stop, lambda workers, folder: _fit(config, workers, folder, task, arguments)).run()


def _rewind(directory: RunDirectory, lease: Lease | None, resume: str) -> None:
    from mocme_dist.training import checkpoint, remote_saver

    if directory.mirror is not None and lease is not None:
        remote_saver.rewind(directory.mirror, lease, resume)
    else:
        checkpoint.rewind(directory.checkpoints, resume)


def is_follower(config: Config) -> bool:
    """Whether this is a process of torchrun but the first: that one locks, prepares and prints."""
    return config.launch.mode == "local" and "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0"


def _run_task(config: Config, task: str, arguments: dict[str, Any], pulse: Pulse | None = None) -> dict[str, Any]:
    from mocme_dist.training.loop import Hooks, run_evaluation, run_training

    if task == "evaluate":
        return run_evaluation(config, **arguments)
    if pulse is None:
        return run_training(config, **arguments)
    return run_training(config, stop=pulse.post.stop_asked if pulse.post else None, hooks=Hooks(pulse.beat, _tell_ray), **arguments)


def _tune_process(config: Config) -> None:
    """Threads of this rank, an allocator that keeps the pages of a step's large tensors for the next one, and no idle warnings."""
    import torch

    # DeepSpeed's collectives call names that torch is about to change; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    torch.set_num_threads(max(1, int(config.launch.cpus_per_worker)))
    keep_pages()


def start_ray(config: Config) -> None:
    """Join or start a Ray that has room for extraction and for training, one after the other.

    Raises:
        ConfigError: there is no Ray, or not enough of one that cannot grow.
        RankError: the cluster did not grow to what is needed within launch.wait_s.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    training, extraction = config.launch, config.encoders
    cpus = max(training.max_workers * training.cpus_per_worker, extraction.actors * extraction.cpus_per_actor)
    connect_ray(min_cpus=math.ceil(cpus))
    have = count_workers(resources_of(config))
    if have < training.min_workers and not may_grow():
        needs = " and ".join(f"{amount:g} {key}" for key, amount in resources_of(config).items())
        raise ConfigError(
            f"launch: needs {training.min_workers} workers with {needs} each, this machine's Ray has room for {have}; lower "
            "launch.workers, launch.cpus_per_worker or launch.gpus_per_worker"
        )


def _fit(config: Config, workers: int, folder: Path, task: str, arguments: dict[str, Any]) -> None:
    """One run of Ray Train, named after its folder."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = config.launch.gpus_per_worker > 0
    payload = {
        "config": config.model_dump(mode="json"),
        "task": task,
        "arguments": arguments,
        "folder": str(folder),
        "board": open_board(folder, RunDirectory(config.run.dir).stop_file) if is_url(config.run.dir) else None,
        # The stacks must be there before Ray gives the rank up.
        "stall_s": 0.6 * float(os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]),
    }
    run_config = RunConfig(
        name=folder.name,
        storage_path=str(folder.parent),
        # Both 0: what to do about a failure is the supervisor's decision.
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
        checkpoint_config=CheckpointConfig(num_to_keep=config.train.num_to_keep),
        # It prints a page for each lost worker, where the supervisor has a line; its log files have it all the same.
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )
    TorchTrainer(
        _ray_worker,
        train_loop_config=payload,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=config.launch.timeout_s),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources_of(config)),
        run_config=run_config,
    ).fit()


def _tell_ray(place: str, manifest: dict[str, Any]) -> None:
    """Report a checkpoint to Ray Train by a pointer: a file with its path, no second copy of it. One at a URL is only named."""
    from ray.train import Checkpoint, get_context, report
    from ray.train.v2.api.report_config import CheckpointUploadMode

    pointer = None
    if get_context().get_world_rank() == 0 and not is_url(place):
        folder = Path(get_context().get_storage().experiment_fs_path) / Path(place).name
        write_json(folder / "pointer.json", {"checkpoint": place})
        pointer = Checkpoint.from_directory(str(folder))
    metrics = {key: value for key, value in manifest.items() if key in ("epoch", "metric", "best_mrr")}
    report({"checkpoint": place, **metrics}, checkpoint=pointer, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def _ray_worker(payload: dict[str, Any]) -> None:
    """Body of one rank under Ray Train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # This module of Ray logs under the name of its file, where logging_config does not reach: two lines a checkpoint and rank.
    if (module := sys.modules.get("ray.train.v2._internal.execution.context")) is not None:
        logging.getLogger(module.__file__).setLevel(logging.WARNING)
    import ray

    config = parse_config(payload["config"])
    _tune_process(config)
    rank, world_size, node = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), ray.get_runtime_context().get_node_id()
    folder, post = Path(payload["folder"]), None if payload["board"] is None else Post(payload["board"])
    if post is not None:  # the launcher's folder may be on another machine
        folder = RunDirectory(config.run.dir).path / "ray" / folder.name
    pulse = Pulse(folder / "ranks", rank, world_size, node, payload["stall_s"], post)
    try:
        _run_and_write(lambda: _run_task(config, payload["task"], payload["arguments"], pulse), folder / OUTCOME, rank, post)
    except BaseException as error:
        pulse.failed(error)
        raise
    finally:
        pulse.close()


def _run_and_write(run: Callable[[], dict[str, Any]], outcome: Path, rank: int, post: Post | None) -> None:
    """Run, and write what came of it; errors that no retry mends end here, the others reach Ray."""
    try:
        result: dict[str, Any] = {"report": run()}
    except FINAL as error:
        # Every rank may write: they all know an error they agreed on, and one file is as good as another.
        result = {"error": str(error), "kind": type(error).__name__}
    if rank == 0 or "error" in result:
        write_json(outcome, result)
        if post is not None:
            post(OUTCOME, json.dumps(result), wait=True)
