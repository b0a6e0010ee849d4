"""Starts the workers of a task: under Ray Train, or in this process. The owner of ray.train.

A worker runs the same function either way. Under Ray it writes its result or error to a file of the attempt. A user's
mistake is not retried, because another attempt would meet it again; lost workers are (see `supervisor`).
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mocme_dist import environment
from mocme_dist.cluster import connect_ray, count_workers, may_grow
from mocme_dist.config import Config
from mocme_dist.config.encoders import EncodersConfig
from mocme_dist.config.load import parse_config
from mocme_dist.config.schema import LaunchConfig
from mocme_dist.console import speak_to_driver
from mocme_dist.data.files import write_json
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError
from mocme_dist.memory import keep_pages
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.heartbeat import RankHeartbeat, StatusClient, start_status_actor
from mocme_dist.runs.lease import Lease
from mocme_dist.runs.stopping import StopRequest
from mocme_dist.runs.supervisor import FINAL, OUTCOME, START_TIMEOUT, Supervisor, resources_of

log = logging.getLogger(__name__)

# Ray Train's settings (seconds), unless the environment has others. A dead worker is noticed at once, a hung one within
# half a minute. By default, Ray would wait half a minute more for the survivors of a broken group to say goodbye.
_HEALTH_CHECK_S = 30
_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(_HEALTH_CHECK_S),
    START_TIMEOUT: "30",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
# Warnings about idle GPUs that this process has logged: a command starts Ray several times.
_logged: set[str] = set()


def launch(config: Config, task: str, lease: Lease | None = None, **arguments: Any) -> dict[str, Any]:
    """Run `task` ("train" or "evaluate") on the workers of `config.launch` and return its report.

    Args:
        config: with absolute paths.
        lease: of a training at a URL.
        arguments: of the task: split, step and drop for "evaluate".

    Raises:
        MocmeError: the error that ended the workers.
    """
    directory = RunDirectory(config.run.dir)
    if config.launch.mode == "ray":
        # Before the signals: joining Ray installs its own handler of SIGTERM.
        config = config.model_copy(update={"launch": start_ray(config.launch, config.encoders)})
    if task == "train" and config.run.resume != "auto":
        # Once, and here: workers that are restarted continue from their own newest checkpoint.
        if not is_follower(config.launch):
            _rewind(config, directory, lease)
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    if lease is not None:
        arguments["held"] = lease.held
    directory.path.mkdir(parents=True, exist_ok=True)  # the copy of a run at a URL, on a machine that is new to it
    local = config.launch.mode == "local"
    stop = StopRequest(directory.stop_file, stepping=not local)
    with stop.listening() if task == "train" else nullcontext():
        if local:
            _tune_process(config.launch)
            return _run_task(config, task, arguments, stop)

        def fit(workers: int, folder: Path) -> None:
            _fit(config, workers, folder, task, arguments)

        return Supervisor(config.launch, directory, task, stop, fit).run()


def _rewind(config: Config, directory: RunDirectory, lease: Lease | None) -> None:
    """Make the checkpoint of run.resume the newest, once it accepts the settings."""
    from mocme_dist.training.build import identity_of
    from mocme_dist.training.checkpoint import check_compatible

    resume, checkpoints = config.run.resume, directory.checkpoints
    found = checkpoints.candidates(resume)[0] if lease is not None else [checkpoints.find(resume)]
    if found and found[0] is not None:
        check_compatible(found[0], identity_of(config))
    checkpoints.rewind(resume, lease)


def is_follower(config: LaunchConfig) -> bool:
    """Return whether this is a process of torchrun other than the first, which locks, prepares data and prints."""
    return config.mode == "local" and environment.torchrun_rank() > 0


def _run_task(
    config: Config, task: str, arguments: dict[str, Any], watcher: StopRequest | RankHeartbeat
) -> dict[str, Any]:
    """Run the task in this process; a training tells the watcher about its steps."""
    from mocme_dist.runs.task import Hooks, run_evaluation, run_training

    if task == "evaluate":
        return run_evaluation(config, **arguments)
    if isinstance(watcher, StopRequest):
        return run_training(config, hooks=Hooks(watcher.before_step, watcher.ended), **arguments)
    hooks = Hooks(watcher.before_step, watcher.ended, _report_to_ray)
    return run_training(config, stop=watcher.client.stop_asked if watcher.client else None, hooks=hooks, **arguments)


def _tune_process(config: LaunchConfig) -> None:
    """Set the threads of this rank and its allocator, and silence a warning."""
    import torch

    # DeepSpeed's collectives call names that torch is about to change; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    keep_pages()


def start_ray(launch: LaunchConfig, encoders: EncodersConfig) -> LaunchConfig:
    """Join or start a Ray that has room for extraction and for training, one after the other.

    Returns:
        The section with the number of GPUs per worker resolved for this cluster.

    Raises:
        ConfigError: there is no Ray, or it has too little room and cannot grow.
    """
    environment.set_defaults(_RAY_SETTINGS)
    cpus = max(launch.max_workers * launch.cpus_per_worker, encoders.actors * encoders.cpus_per_actor)
    connect_ray(min_cpus=math.ceil(cpus))
    gpus = count_workers({"GPU": 1})
    fitting = count_workers({"CPU": launch.cpus_per_worker, "GPU": 1})
    each, idle = choose_gpus(launch, fitting, gpus)
    if idle is not None and idle not in _logged:
        _logged.add(idle)
        log.warning("%s", idle)
    launch = launch.model_copy(update={"gpus_per_worker": each})
    needed = resources_of(launch)
    have = count_workers(needed)
    if have < launch.min_workers and not may_grow():
        needs = " and ".join(f"{amount:g} {key}" for key, amount in needed.items())
        raise ConfigError(
            f"launch: needs {launch.min_workers} workers with {needs} each, this machine's Ray has room for {have}; "
            "lower launch.workers, launch.cpus_per_worker or launch.gpus_per_worker"
        )
    return launch


def choose_gpus(launch: LaunchConfig, fitting: int, gpus: int) -> tuple[float, str | None]:
    """Return the number of GPUs per worker, and a warning if GPUs stay idle.

    Args:
        launch: its gpus_per_worker is a number, or auto: one per worker if the cluster has them.
        fitting: number of workers with one GPU each that the cluster has room for.
        gpus: number of GPUs of the cluster.
    """
    wanted = launch.gpus_per_worker
    each = float(fitting >= launch.min_workers) if wanted == "auto" else wanted
    if each == 0 and gpus and wanted == "auto":
        return each, (
            f"launch.gpus_per_worker=auto: {launch.min_workers} workers with a GPU and {launch.cpus_per_worker:g} CPUs "
            f"each do not fit into this cluster, which has room for {fitting}: training on CPUs, {_idle(gpus)}; "
            "lower launch.workers to use GPUs"
        )
    if each == 0 and gpus:
        return each, f"launch.gpus_per_worker=0: training on CPUs, {_idle(gpus)}; auto takes one GPU per worker"
    idle = gpus - int(each * launch.max_workers)
    if each > 0 and idle > 0:
        workers = f"{launch.max_workers} workers" if launch.max_workers > 1 else "1 worker"
        return each, f"{_idle(idle)}: {workers} with {each:g} each leave them; raise launch.workers"
    return each, None


def _idle(gpus: int) -> str:
    return f"{gpus} GPUs of the cluster stay idle" if gpus > 1 else "1 GPU of the cluster stays idle"


def gpus_of_this_machine(launch: LaunchConfig, needed: int) -> LaunchConfig:
    """Return the section with auto resolved to one GPU per rank if torch sees `needed` of them, without Ray."""
    if launch.gpus_per_worker != "auto":
        return launch
    import torch  # late, because it takes seconds

    return launch.model_copy(update={"gpus_per_worker": float(torch.cuda.device_count() >= needed)})


def _fit(config: Config, workers: int, folder: Path, task: str, arguments: dict[str, Any]) -> None:
    """Run Ray Train once, under the name of the folder."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from mocme_dist.runs.ranks_on_ray import RanksConfig, carry_functions_by_value

    launch = config.launch
    use_gpu = launch.gpus > 0
    actor = start_status_actor(folder, RunDirectory(config.run.dir).stop_file) if is_url(config.run.dir) else None
    payload = {
        "config": config.model_dump(mode="json"),
        "task": task,
        "arguments": arguments,
        "folder": str(folder),
        "status_actor": actor,
        # The stacks must be written before Ray gives the rank up.
        "stall_s": 0.6 * environment.seconds("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", _HEALTH_CHECK_S),
    }
    run_config = RunConfig(
        name=folder.name,
        storage_path=str(folder.parent),
        # Both 0, because the supervisor decides what to do about a failure.
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
        checkpoint_config=CheckpointConfig(num_to_keep=config.train.num_to_keep),
        # Ray prints a page per lost worker, where the supervisor prints a line; Ray's log files still have it.
        logging_config=LoggingConfig(log_level="CRITICAL"),
    )
    carry_functions_by_value()
    TorchTrainer(
        _ray_worker,
        train_loop_config=payload,
        torch_config=RanksConfig(backend="nccl" if use_gpu else "gloo", timeout_s=launch.timeout_s, gpus=launch.gpus),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources_of(launch)),
        run_config=run_config,
    ).fit()


def _report_to_ray(place: str, manifest: dict[str, Any]) -> None:
    """Report a checkpoint to Ray Train: by a file with its path, without a second copy; one at a URL only by name."""
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
    rank, world_size = environment.rank_and_world_size()
    speak_to_driver(rank)
    import ray

    config = parse_config(payload["config"])
    _tune_process(config.launch)
    folder, client = Path(payload["folder"]), None
    if payload["status_actor"] is not None:  # the launcher's folder may be on another machine
        client = StatusClient(payload["status_actor"])
        folder = RunDirectory(config.run.dir).path / "ray" / folder.name
    node = ray.get_runtime_context().get_node_id()
    heartbeat = RankHeartbeat(folder / "ranks", rank, world_size, node, payload["stall_s"], client)

    def run() -> dict[str, Any]:
        return _run_task(config, payload["task"], payload["arguments"], heartbeat)

    try:
        _run_and_write(run, folder / OUTCOME, rank, client)
    except BaseException as error:
        heartbeat.failed(error)
        raise
    finally:
        heartbeat.close()


def _run_and_write(run: Callable[[], dict[str, Any]], outcome: Path, rank: int, client: StatusClient | None) -> None:
    """Run, and write the report or an error that no retry would avoid; other errors are raised to Ray."""
    try:
        result: dict[str, Any] = {"report": run()}
    except FINAL as error:
        # Every rank may write: all ranks know an error that they agreed on, and one file is as good as another.
        result = {"error": str(error), "kind": type(error).__name__}
    if rank == 0 or "error" in result:
        write_json(outcome, result)
        if client is not None:
            client.send(OUTCOME, json.dumps(result), wait=True)
