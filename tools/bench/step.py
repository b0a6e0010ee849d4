"""One training step of the real loop, and where its time goes: `python -m tools.bench.step [--quick]`.

B 1024 queries, N 256 negatives shared by chunks of 128, D 256, 15,000 entities, one process, all cores: structure only
(plain RotatE), full MoCME with structure, text (384) and numbers (128), K 3 and MINE, and the same with products in
bfloat16. A step is timed from one to the next inside `Training.train`: prefetch, lookup, forward, backward, updates,
monitor.

host_overhead is the share of a full MoCME step that is not inside encode (with MINE), loss, backward or the updates
of rows and networks: waiting for the batch, lookup, exchange, the finite check, the monitor and the loop. Parity: the
loss of the compiled step equals that of the plain one on the same batch, and in bfloat16 up to its last digit.

host_waits, graph_breaks, recompilations and operators_outside_graphs are counted per step of full MoCME between two log
intervals by torch's profiler, on any machine, with the step as one graph (train.one_graph), as a GPU takes it.
`--batches 1024 8192 65536` measures nothing but full MoCME on a graph of DB15K's size at these batch sizes: step time,
busy share and peak memory of the GPU, and epochs per second. `--counters` counts only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from mocme_dist.config import Config
from mocme_dist.parallel.comm import communication
from mocme_dist.training.build import build_worker, open_dataset
from tools.bench.common import DEVICE, ceilings, finish, row, spread
from tools.bench.workload import (
    BFLOAT16,
    FULL,
    STRUCTURE_ONLY,
    Timed,
    counted_steps,
    make_graph,
    step_config,
    timed_steps,
    use_all_cores,
)

# What a GPU is given to do at once.
LARGE = ("train.batch_size=16384", "negatives.count=1024", "negatives.chunk_size=1024")
INSIDE = ("encode", "loss", "backward", "update")
# The step of one rank on a GPU, on any machine.
ONE_GRAPH = ("deepspeed.engine=torch", "train.one_graph=true")
WIDTHS = {"text": 384, "numeric": 128}
DB15K_TRIPLES = 71_300
CUDA = DEVICE.type == "cuda"


def first_loss(config: Config) -> float:
    """Mean loss of the first batch, forward only."""
    with communication(60) as comm, torch.no_grad():
        worker = build_worker(config, open_dataset(config.data), comm)
        (part,) = worker.micro_batches(worker.prepare(0), 0)
        loss, _, _ = worker.engine(part.entities, part.route, part.batch, True)
    return float(loss)


def figures(name: str, timed: Timed, queries: int) -> list[dict[str, object]]:
    """Rows of one kind of step."""
    median_s, p90_s = spread(timed.step_s)
    inside = sum(timed.phases.get(phase, 0.0) for phase in INSIDE)
    mean_s = sum(timed.step_s) / len(timed.step_s)
    rows = [
        row(f"{name}_step_ms", 1e3 * median_s, "ms"),
        row(f"{name}_step_p90_ms", 1e3 * p90_s, "ms"),
        row(f"{name}_steps_per_s", 1 / median_s, "steps/s"),
        row(f"{name}_queries_per_s", queries / median_s, "queries/s"),
        row(f"{name}_prepare_cpu_ms", 1e3 * timed.prepare_s, "ms of the other thread"),
    ]
    rows += [row(f"{name}_{phase}_ms", 1e3 * seconds, "ms") for phase, seconds in timed.phases.items()]
    if timed.busy is not None:
        rows += [row(f"{name}_busy", timed.busy, "of the time the GPU had work", ">= 0.7" * name.endswith("large"))]
    overhead = max(0.0, 1 - inside / mean_s)
    return [
        *rows,
        row(
            "host_overhead" if name == "full" else f"{name}_host_overhead",
            overhead,
            "of a step",
            "<= 0.1" * (name == "full"),
        ),
    ]


def batch_figures(batches: list[int], steps: int, folder: Path) -> list[dict[str, object]]:
    """Return rows of full MoCME at several batch sizes, on a graph of DB15K's size."""
    dataset = make_graph(folder / "db15k", 12_842, DB15K_TRIPLES, WIDTHS)
    rows = []
    for batch in batches:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        config = step_config(
            dataset, folder / f"batch{batch}", *FULL, "mine.every=4", "features.residency=device", queries=batch
        )
        timed = timed_steps(config, steps, 6, DEVICE.type == "cuda")
        median_s, _ = spread(timed.step_s)
        rows += [
            row(f"batch{batch}_step_ms", 1e3 * median_s, "ms"),
            row(f"batch{batch}_steps_per_s", 1 / median_s, "steps/s", ">= 400" * (batch == 1024 and CUDA)),
            row(f"batch{batch}_db15k_epochs_per_s", batch / median_s / (2 * DB15K_TRIPLES), "epochs/s"),
        ]
        if timed.busy is not None:
            rows.append(row(f"batch{batch}_busy", timed.busy, "of the time the GPU had work", ">= 0.7"))
            rows.append(row(f"batch{batch}_peak_mb", torch.cuda.max_memory_allocated() / 2**20, "MB of GPU memory"))
    return rows


def counter_figures(dataset: Path, folder: Path, steps: int) -> list[dict[str, object]]:
    """Return rows of what the host does in a step of full MoCME, taken as GPUs take it."""
    how = (*FULL, *ONE_GRAPH, "features.residency=device", "train.log_every=100000")
    found = counted_steps(step_config(dataset, folder / "counted", *how), steps, 6)
    return [
        row("host_waits", found.host_waits, "per step", "<= 0"),
        row("graph_breaks", found.graph_breaks, "in all counted steps", "<= 0"),
        row("recompilations", found.recompilations, "in all counted steps", "<= 0"),
        row("operators_outside_graphs", found.operators_outside_graphs, "per step", "<= 40"),
    ]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--batches", type=int, nargs="+", help="measure these batch sizes only")
    parser.add_argument(
        "--counters", action="store_true", help="count what the host does in a step, and measure nothing"
    )
    args = parser.parse_args()
    use_all_cores()
    steps = 10 if args.quick else 40
    if args.batches:
        with tempfile.TemporaryDirectory(prefix="mocme-bench-") as temporary, communication(60):
            rows = batch_figures(args.batches, steps, Path(temporary))
        finish("step", True, rows, shapes={"N": 256, "D": 256, "K": 3}, ceilings=ceilings(5))
        return
    if args.counters:
        with tempfile.TemporaryDirectory(prefix="mocme-bench-") as temporary, communication(60):
            rows = counter_figures(make_graph(Path(temporary), widths=WIDTHS), Path(temporary), 4)
        finish("step", True, rows, shapes={"B": 1024, "N": 256, "D": 256, "K": 3})
        return
    with tempfile.TemporaryDirectory(prefix="mocme-bench-") as temporary, communication(60):
        folder = Path(temporary)
        dataset = make_graph(folder, widths=WIDTHS)
        plain, compiled = (
            first_loss(step_config(dataset, folder / how, *FULL, f"compile={how}")) for how in ("off", "auto")
        )
        rounded = first_loss(step_config(dataset, folder / "rounded", *FULL, *BFLOAT16))
        rows = []
        kinds: list[tuple[str, tuple[str, ...], int]] = [
            ("structure", STRUCTURE_ONLY, 1024),
            ("full", FULL, 1024),
            ("bfloat16", (*FULL, *BFLOAT16), 1024),
        ]
        if DEVICE.type == "cuda":
            kinds += [(f"{name}_large", (*how, *LARGE), 16_384) for name, how, _ in kinds if name != "bfloat16"]
        for name, overrides, queries in kinds:
            rows += figures(
                name,
                timed_steps(step_config(dataset, folder / name, *overrides), steps, 6, DEVICE.type == "cuda"),
                queries,
            )
        rows += counter_figures(dataset, folder, 4 if args.quick else 8)
    shapes = {
        "B": 1024,
        "N": 256,
        "D": 256,
        "chunk": 128,
        "entities": 15_000,
        "modalities": ["structure", *WIDTHS],
        "K": 3,
    }
    parity = abs(plain - compiled) <= 1e-4 * abs(plain) and abs(plain - rounded) <= 2**-8 * abs(plain)
    finish("step", parity, rows, shapes=shapes, ceilings=ceilings(5))


if __name__ == "__main__":
    main()
