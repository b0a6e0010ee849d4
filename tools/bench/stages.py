"""What each ZeRO stage holds and costs with many wide experts: `python -m tools.bench.stages [--quick]`.

Structure and drawn features of up to five other modalities, K experts of width D in each, two ranks on CPU (gloo) under
the real DeepSpeed engine. A stage runs in fresh processes: build, then a few training steps, without a checkpoint or a
ranking. Per stage: peak resident memory of a rank, the plan's prediction beside it, resident memory after the steps,
and time per step. The rest of the model is small, so that experts are nearly all of it; D 2,048 with K 8 and M 6 is 410
million parameters.
Parity: the losses of all steps are equal at all stages to `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.common import finish, memory_mb, row
from tools.bench.rank import TIMEOUT_S, start_ranks

# Relative; sums over ranks are taken in another order at each stage.
TOLERANCE = 1e-4
FEATURES = ("text", "image", "numeric", "audio", "video")
FEATURE_WIDTH, ENTITIES, TRIPLES = 32, 256, 2_000


def settings_of(dataset: Path, modalities: int, experts: int, width: int) -> list[str]:
    """Return the overrides that all stages share: experts as asked for, and everything else small."""
    names = ", ".join(["structure", *FEATURES[: modalities - 1]])
    return [
        *("launch.mode=local", "compile=off", "deepspeed.engine=deepspeed", "entities.optimizer=adagrad"),
        *(f"data.dataset={json.dumps(str(dataset))}", f"modalities=[{names}]"),
        *(f"experts.num_experts={experts}", f"experts.width={width}", "projection.hidden=64"),
        *("mine.hidden=8", "mine.every=2", "mine.rows=64", "train.batch_size=32", "negatives.count=16"),
        *("negatives.chunk_size=16", "train.learning_rate=0.0001", "evaluation.encode_rows=64", "evidence.spaces=[]"),
    ]


def make_dataset(folder: Path) -> Path:
    """Pack a planted graph with drawn features in every modality."""
    from tools.synthetic.packed import write_packed
    from tools.synthetic.planted import Modality, Planted

    drawn = tuple(Modality(name, place % 2, FEATURE_WIDTH) for place, name in enumerate(FEATURES))
    return write_packed(folder / "data", Planted(ENTITIES, TRIPLES, modalities=drawn), ENTITIES).directory


def run_rank(run_dir: str, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Body of one rank."""
    from mocme_dist.config import load_config
    from mocme_dist.parallel.comm import communication
    from mocme_dist.runs import launch
    from mocme_dist.train import resolve_paths
    from mocme_dist.training.build import build_worker, open_dataset
    from mocme_dist.training.step import train_step
    from mocme_dist.training.tally import STAT_NAMES

    config = resolve_paths(load_config([], [*overrides, f"run.dir={run_dir}"]))
    launch._tune_process(config.launch)
    at, losses, step_ms = STAT_NAMES.index("loss"), [], []
    with communication(TIMEOUT_S) as comm:
        empty_mb, start = memory_mb("VmRSS"), time.perf_counter()
        worker = build_worker(config, open_dataset(config.data), comm)
        build_s, built_mb, build_peak_mb = time.perf_counter() - start, memory_mb("VmRSS"), memory_mb("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
        for step in range(steps):
            prepared = worker.prepare(step)
            comm.barrier()
            start = time.perf_counter()
            estimate = step % config.mine.every == 0
            micro_batches = worker.micro_batches(prepared, step)
            found = train_step(
                worker.engine, worker.table, micro_batches, comm, worker.tally, estimate=estimate, timer=worker.timer
            )
            step_ms.append(1e3 * (time.perf_counter() - start))
            losses.append(float(found.sums[at]))
            assert not found.skipped
        return {
            "losses": losses,
            "step_ms": step_ms,
            "build_s": build_s,
            "empty_mb": empty_mb,
            "built_mb": built_mb,
            "build_peak_mb": build_peak_mb,
            "steps_peak_mb": memory_mb("VmHWM"),
            "after_mb": memory_mb("VmRSS"),
            "phases_ms": {name: 1e3 * seconds / steps for name, seconds in worker.timer.total.items()},
        }


def plan_of(overrides: Sequence[str], world_size: int) -> dict[str, float]:
    """Return the parts of the plan's prediction in MiB: those of the whole run, and a step."""
    from mocme_dist.config import load_config
    from mocme_dist.train import resolve_paths
    from mocme_dist.training.build import open_dataset
    from mocme_dist.training.plan import Planner

    config = resolve_paths(load_config([], list(overrides)))
    plan = Planner(config, open_dataset(config.data), world_size).plan(under_ray=False)
    parts = {**plan.resident, "a step": plan.passing["a step"]}
    return {"dense parameters": plan.dense_parameters, **{name: size / 2**20 for name, size in parts.items()}}


def measure_stage(overrides: Sequence[str], stage: int, world_size: int, steps: int, threads: int) -> dict[str, Any]:
    """Run one stage in fresh processes; return each rank's record and the plan's parts."""
    overrides = [*overrides, f"deepspeed.stage={stage}", f"launch.cpus_per_worker={threads}"]
    planned = plan_of(overrides, world_size)
    with tempfile.TemporaryDirectory(prefix="mocme-stages-") as folder:
        rank = ["--rank", f"{folder}/run", "--steps", str(steps), "--set", *overrides]
        ranks = start_ranks("tools.bench.stages", [rank] * world_size, threads)
    found = {"stage": stage, "ranks": ranks, "plan_mb": planned}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one stage; memory is that of the rank that needs most."""
    name, ranks = f"stage{found['stage']}", found["ranks"]
    peak = max(max(rank["build_peak_mb"], rank["steps_peak_mb"]) for rank in ranks)
    plan = sum(size for part, size in found["plan_mb"].items() if part != "dense parameters")
    # The first two steps touch pages for the first time, with and without an estimate.
    step_ms = statistics.median(
        max(times) for times in list(zip(*(rank["step_ms"] for rank in ranks), strict=True))[2:]
    )
    return [
        row(f"{name}_peak_mb", peak, "MiB of a rank"),
        row(f"{name}_plan_mb", plan, "MiB of a rank"),
        row(f"{name}_plan_error", abs(plan / peak - 1), "of the measured peak", "<= 0.15"),
        row(f"{name}_after_mb", max(rank["after_mb"] for rank in ranks), "MiB of a rank"),
        row(f"{name}_step_ms", step_ms, "ms"),
    ]


def main() -> None:
    """Parse, run the stages one after another, compare losses, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="D 512, K 4 unless given")
    parser.add_argument("--modalities", type=int, default=6, choices=range(1, 7), metavar="M")
    parser.add_argument("--experts", type=int, metavar="K")
    parser.add_argument("--width", type=int, metavar="D")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=range(4))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--rank", metavar="RUN", help=argparse.SUPPRESS)
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", help="further settings")
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(run_rank(args.rank, args.steps, args.overrides)))
        return
    width, experts = args.width or (512 if args.quick else 2048), args.experts or (4 if args.quick else 8)
    with tempfile.TemporaryDirectory(prefix="mocme-stages-") as folder:
        overrides = [*settings_of(make_dataset(Path(folder)), args.modalities, experts, width), *args.overrides]
        found = [measure_stage(overrides, stage, args.ranks, args.steps, args.threads) for stage in args.stages]
    losses = [one["ranks"][0]["losses"] for one in found]
    parity = all(
        abs(loss - first) <= TOLERANCE * abs(first)
        for others in losses[1:]
        for loss, first in zip(others, losses[0], strict=True)
    )
    shapes = {"M": args.modalities, "K": experts, "D": width, "ranks": args.ranks, "steps": args.steps}
    rows = [figure for one in found for figure in figures(one)]
    finish("stages", parity, rows, shapes=shapes, losses=dict(zip(args.stages, losses, strict=True)))


if __name__ == "__main__":
    main()
