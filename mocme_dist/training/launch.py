"""Who runs the workers: Ray Train, or this process. The only file that knows ray.train.

A worker function is the same either way. Under Ray its result and its end travel through the run directory: rank 0
writes metrics.json and run_status.json, and a mistake of the user's is not retried, because trying again would not
mend it; lost workers are.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mocme_dist.config import Config
from mocme_dist.config.load import parse_config
from mocme_dist.data.files import read_json
from mocme_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    MocmeError,
    Preempted,
    RankError,
    StorageError,
)
from mocme_dist.training.rundir import RunDirectory

log = logging.getLogger(__name__)

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_FINAL = (ConfigError, DataError, CheckpointError, DivergedError, StorageError, Preempted)
_KINDS = {kind.__name__: kind for kind in (*_FINAL, RankError, MocmeError)}


def launch(config: Config, task: str, **arguments: Any) -> dict[str, Any]:
    """Run `task` ("train" or "evaluate") on the workers of `config.launch`; its report.

    Args:
        config: with absolute paths.
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
            from mocme_dist.training import checkpoint

            checkpoint.rewind(directory.checkpoints, config.run.resume)
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    with _graceful_stop(directory) if task == "train" else nullcontext():
        if config.launch.mode == "local":
            _tune_process(config)
            return _run_task(config, task, arguments)
        return _launch_ray(config, task, arguments)


def is_follower(config: Config) -> bool:
    """Whether this is a process of torchrun but the first: that one locks, prepares and prints."""
    return config.launch.mode == "local" and "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0"


def _run_task(config: Config, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from mocme_dist.training.loop import run_evaluation, run_training

    return run_training(config) if task == "train" else run_evaluation(config, **arguments)


def _tune_process(config: Config) -> None:
    """Threads of this rank, and an allocator that keeps the pages of a step's large tensors for the next one.

    glibc would map and unmap each of them: the page faults cost about half of a step on a CPU.
    """
    import torch

    torch.set_num_threads(max(1, int(config.launch.cpus_per_worker)))
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


@contextmanager
def _graceful_stop(directory: RunDirectory) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks the run to save and stop, through a file that every rank sees; the second kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = False

    def handle(number: int, _frame: object) -> None:
        nonlocal asked
        if asked:  # by this process: under torchrun another may have made the file
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        asked = True
        log.warning("%s: saving a checkpoint after this step; once more ends at once", signal.Signals(number).name)
        directory.stop_file.touch()

    directory.stop_file.unlink(missing_ok=True)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        directory.stop_file.unlink(missing_ok=True)


def start_ray(config: Config) -> None:
    """Join or start a Ray that has room for extraction and for training, one after the other.

    Raises:
        ConfigError: there is no Ray, or not enough of it.
    """
    from mocme_dist.cluster import connect_ray

    # Health is polled this often: a dead worker is noticed within a second, a hung one within half a minute.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "30")
    training, extraction = config.launch, config.encoders
    cpus = max(training.workers * training.cpus_per_worker, extraction.actors * extraction.cpus_per_actor)
    connect_ray(min_cpus=math.ceil(cpus))
    _check_resources(config)


def _launch_ray(config: Config, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    launch_config, directory = config.launch, RunDirectory(config.run.dir)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray's own record of the run is not ours: each launch gets a name of its own, so an older record cannot block it.
    name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    outcome = directory.path / "ray" / f"{name}.json"
    use_gpu = launch_config.gpus_per_worker > 0
    resources = {"CPU": launch_config.cpus_per_worker} | ({"GPU": launch_config.gpus_per_worker} if use_gpu else {})
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "task": task, "arguments": arguments, "outcome": str(outcome)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=launch_config.timeout_s),
        scaling_config=ScalingConfig(num_workers=launch_config.workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name, storage_path=str(directory.path / "ray"), failure_config=FailureConfig(max_failures=launch_config.max_failures)
        ),
    )
    failure: Exception | None = None
    try:
        # Not on the main thread: there Ray would take SIGINT for itself and abort without a checkpoint.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(trainer.fit).result()
    except Exception as error:
        failure = error
    # One rank may know why while the others only lost it: what it wrote says more than what Ray saw.
    result = read_json(outcome) if outcome.exists() else {}
    outcome.unlink(missing_ok=True)
    if "error" in result:
        raise _KINDS[result["kind"]](result["error"])
    if failure is not None:
        raise RankError(
            f"the workers failed {launch_config.max_failures + 1} times: {_first_cause(failure)}; see {directory.path / 'ray'}"
        ) from failure
    if "report" not in result:
        raise RankError(f"the workers ended without a report; see {directory.path / 'ray'}")
    return dict(result["report"])


def _check_resources(config: Config) -> None:
    """Refuse at once what the cluster can never give, instead of waiting for it."""
    import ray

    have, wanted = ray.cluster_resources(), config.launch
    for key, each in (("CPU", wanted.cpus_per_worker), ("GPU", wanted.gpus_per_worker)):
        if wanted.workers * each > have.get(key, 0):
            raise ConfigError(
                f"launch: {wanted.workers} workers with {each:g} {key} each need {wanted.workers * each:g}, the cluster has "
                f"{have.get(key, 0):g}; lower launch.workers or launch.{key.lower()}s_per_worker, or add nodes"
            )


def _first_cause(error: BaseException) -> str:
    """The first line that tells most, of whatever Ray wraps around it."""
    failures = getattr(error, "worker_failures", None) or {}
    texts = [
        f"rank {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
        for rank, cause in failures.items()
        if str(cause).strip()
    ]
    # A rank that only lost its peer says "connection closed"; the one that failed first says why.
    first = [text for text in texts if "onnection" not in text] or texts
    return first[0] if first else str(error).strip().splitlines()[-1]


def _ray_worker(payload: dict[str, Any]) -> None:
    """Body of one rank under Ray Train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # DeepSpeed's collectives call names that torch is about to change; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    config = parse_config(payload["config"])
    _tune_process(config)
    rank = int(os.environ["RANK"])
    _run_and_write(lambda: _run_task(config, payload["task"], payload["arguments"]), Path(payload["outcome"]), rank)


def _run_and_write(run: Callable[[], dict[str, Any]], outcome: Path, rank: int) -> None:
    """Run, and write what came of it; errors that no retry mends end here, the others reach Ray."""
    from mocme_dist.data.files import write_json

    try:
        report = run()
    except _FINAL as error:
        # Every rank may write: they all know an error they agreed on, and one file is as good as another.
        write_json(outcome, {"error": str(error), "kind": type(error).__name__})
        return
    if rank == 0:
        write_json(outcome, {"report": report})
