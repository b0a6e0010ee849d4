"""Real ranks of a run, measured: so many steps of the training loop, a checkpoint, perhaps a ranking.

`measure_ranks` starts processes as torchrun would, without Ray, and gives back what each of them saw: milliseconds of
every step, resident memory, and what it sent. The commands' own code runs, nothing is stripped: build, train, save,
rank and load the checkpoint again.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.bench.common import memory_mb

TIMEOUT_S = 900


def measure_ranks(
    world_size: int, settings: Sequence[str], steps: int, queries: int = 0, threads: int = 1, pin: bool = False
) -> list[dict[str, Any]]:
    """Train so many steps on `world_size` ranks; one record a rank.

    Args:
        settings: overrides, as after --set; data.dataset among them. The run directory is a temporary one.
        steps: of the loop; then a checkpoint is written, as when a run is stopped.
        queries: valid queries to rank afterwards; 0 ranks none.
        threads: of a rank.
        pin: each rank gets a core for itself and for its background thread, so that a single rank has no second one.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
    """
    cores = [["--core", str(rank)] if pin else [] for rank in range(world_size)]
    with tempfile.TemporaryDirectory(prefix="mocme-ranks-") as folder:
        shared = ["--steps", str(steps), "--queries", str(queries), "--run-dir", f"{folder}/run"]
        last = ["--set", *settings, f"launch.cpus_per_worker={threads}"]
        return start_ranks("tools.bench.rank", [[*shared, *core, *last] for core in cores], threads)


def start_ranks(module: str, arguments: Sequence[Sequence[str]], threads: int = 1) -> list[dict[str, Any]]:
    """Run a module as ranks, one per list of arguments; return the JSON object that each prints last.

    Raises:
        RuntimeError: a rank failed; with the end of its standard error.
    """
    world_size = len(arguments)
    with socket.socket() as held, tempfile.TemporaryDirectory(prefix="mocme-ranks-") as folder:
        # Rank 0 may listen beside a socket that is only bound, and nobody else is given the port meanwhile.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        processes = []
        for rank in range(world_size):
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if world_size > 1:
                env |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                }
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, "-m", module, *arguments[rank]]
            with Path(f"{folder}/{rank}.log").open("w") as errors:
                processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env))
        try:
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                raise RuntimeError(
                    f"rank {rank}: exit code {process.returncode}: {Path(f'{folder}/{rank}.log').read_text()[-2000:]}"
                )
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def run_rank(args: argparse.Namespace) -> dict[str, Any]:
    """Body of one rank."""
    from mocme_dist.config import load_config
    from mocme_dist.errors import Preempted
    from mocme_dist.parallel.comm import communication
    from mocme_dist.runs import launch
    from mocme_dist.runs.directory import RunDirectory
    from mocme_dist.runs.task import TrainingRun, find
    from mocme_dist.train import resolve_paths
    from mocme_dist.training.build import build_worker, open_dataset
    from mocme_dist.training.loop import restore

    config = resolve_paths(load_config([], ["launch.mode=local", *args.overrides, f"run.dir={args.run_dir}"]))
    launch._tune_process(config.launch)
    found: dict[str, Any] = {}
    times: list[float] = []
    sent: list[int] = []

    def stop() -> bool:
        times.append(time.perf_counter())
        return len(times) >= args.steps

    directory = RunDirectory(config.run.dir)
    directory.checkpoints.path.mkdir(parents=True, exist_ok=True)
    with communication(TIMEOUT_S) as comm:
        start = time.perf_counter()
        worker = build_worker(config, open_dataset(config.data), comm)
        found["build_s"], found["built_mb"] = time.perf_counter() - start, memory_mb("VmRSS")
        prepare = worker.prepare

        def counted(step: int) -> Any:
            parts = prepare(step)
            sent.append(sum(part.route.sent_vectors for part in parts))
            return parts

        worker.prepare = counted  # type: ignore[method-assign]
        run = TrainingRun(worker, directory)
        with suppress(Preempted):  # as asked
            run.train(stop)
        found["trained_mb"] = memory_mb("VmHWM")
        found["phases_ms"] = {name: 1e3 * seconds / len(times) for name, seconds in worker.timer.seconds.items()}
        found["last_step_and_checkpoint_s"] = time.perf_counter() - times[-1]
        if args.queries:
            start = time.perf_counter()
            found["valid_mrr"] = worker.evaluate("valid", args.queries)["mrr"]
            found["rank_s"], found["queries"] = time.perf_counter() - start, args.queries
            found["ranked_mb"], start = memory_mb("VmHWM"), time.perf_counter()
            saved = find(directory, worker, "auto")
            assert saved is not None
            restore(worker, saved)
            found["load_s"] = time.perf_counter() - start
        found |= {
            "peak_mb": memory_mb("VmHWM"),
            "file_mb": memory_mb("RssFile"),
            "sent": sent,
            "width": config.experts.width,
        }
        found["step_ms"] = [1e3 * (later - earlier) for earlier, later in pairwise(times)]
        found["queries_per_step"] = worker.maker.sampler.batch_size
    return found


def main() -> None:
    """One rank; started by `measure_ranks`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--core", type=int)
    parser.add_argument("--set", nargs="+", default=[], dest="overrides")
    args = parser.parse_args()
    if args.core is not None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[args.core % len(cores)]})
    print(json.dumps(run_rank(args)))


if __name__ == "__main__":
    main()
