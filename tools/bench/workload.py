"""A random graph of a benchmark's size, and runs of the real training loop on it that note when each step began.

Nothing is learnt from a random graph; a step costs what it would cost on a real one of its size.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mocme_dist.config import Config, load_config
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import write_part
from mocme_dist.data.files import write_json
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import Preempted
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import TrainingRun
from mocme_dist.train import resolve_paths
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.worker import Worker

RELATIONS = 169
_OPERATORS = ("aten::", "mocme_dist::", "c10d::")


def make_graph(
    folder: Path, num_entities: int = 15_000, num_triples: int = 34_000, widths: dict[str, int] | None = None
) -> Path:
    """Pack a random graph with random features of the given widths for nine entities in ten.

    The data set's directory.
    """
    gen, raw = np.random.default_rng(0), folder / "raw"
    raw.mkdir(parents=True)
    heads = np.concatenate(
        [np.arange(num_entities), gen.integers(num_entities, size=max(0, num_triples - num_entities))]
    )
    triples = np.stack(
        [heads, gen.integers(RELATIONS, size=len(heads)), gen.integers(num_entities, size=len(heads))], 1
    )
    triples = np.unique(triples, axis=0)[gen.permutation(len(np.unique(triples, axis=0)))]
    held = {"valid": triples[:100], "test": triples[100:200], "train": triples}
    for split, part in held.items():
        (raw / f"{split}.txt").write_text("".join(f"e{h}\tr{r}\te{t}\n" for h, r, t in part))
    (raw / "text.tsv").write_text("entity\tlabel\n" + "".join(f"e{i}\tentity {i}\n" for i in range(num_entities)))
    (raw / "numeric.tsv").write_text(
        "entity\tattribute\tvalue\n" + "".join(f"e{i}\tsize\t{i}\n" for i in range(num_entities))
    )
    # Held-out triples stand in train too: a step's cost does not care, and every name is seen.
    dataset = pack_folder(raw, folder / "dataset", DataConfig(allow_leakage=True))
    for modality, width in (widths or {}).items():
        _write_features(dataset, modality, width, gen)
    return dataset.directory


def _write_features(dataset: Dataset, modality: str, width: int, gen: np.random.Generator) -> None:
    directory = dataset.directory / "features" / modality
    directory.mkdir(parents=True)
    for shard, entry in enumerate(dataset.entries):
        first, last = dataset.shards.bounds(shard)
        present = gen.random(last - first) < 0.9
        values = gen.standard_normal((int(present.sum()), width)).astype(np.float16)
        stats = {"failed": {}, "examples": [], "input_sha256": entry.sha256, "encoder_hash": "random"}
        write_part(directory, shard, values, present, stats)
    sizes = {"num_rows": dataset.num_entities, "shard_rows": dataset.shards.shard_rows, "width": width}
    write_json(directory / "manifest.json", {"format": 1, "encoder_hash": "random", "dtype": "float16", **sizes})


STRUCTURE_ONLY = (
    "modalities=[structure]",
    "projection.structure=identity",
    "experts.kind=identity",
    "experts.num_experts=1",
    "fusion.estimator=uniform",
)
BFLOAT16 = ("train.precision=bfloat16",)
FULL = ("modalities=[structure, text, numeric]", "experts.num_experts=3", "fusion.estimator=mine")


def step_config(
    dataset: Path, run_dir: Path, *overrides: str, queries: int = 1024, negatives: int = 256, width: int = 256
) -> Config:
    """The configuration of a local run of one process at a benchmark's shapes; later overrides win."""
    sizes = (
        f"train.batch_size={queries}",
        f"negatives.count={negatives}",
        f"experts.width={width}",
        "negatives.chunk_size=128",
    )
    paths = (f"data.dataset={json.dumps(str(dataset))}", f"run.dir={json.dumps(str(run_dir))}")
    fixed = ("launch.mode=local", "train.epochs=1000000", "negatives.weighting=self_adversarial")
    return resolve_paths(load_config([], [*sizes, *paths, *fixed, *overrides]))


@dataclass(frozen=True)
class Timed:
    """Steps of the real loop.

    step_s: seconds from one step's begin to the next; on a GPU their mean, because the host runs ahead of it.
    phases: each phase's mean seconds per step.
    prepare_s: CPU seconds of the background thread for one batch.
    busy: share of the time that a GPU had work, None without one or unasked.
    """

    step_s: list[float]
    phases: dict[str, float]
    prepare_s: float
    busy: float | None = None


def timed_steps(config: Config, steps: int, warmup: int, watch: bool = False) -> Timed:
    """Run the training loop as `train` does, monitor, prefetch and all; the first `warmup` steps are not counted.

    It is asked to stop in the step behind the last counted one, and its checkpoint is not counted. Callers hold
    `communication` open around several runs: DeepSpeed does not start twice in one process otherwise. With `watch`
    as many steps follow in which a profiler notes what a GPU does; they count for nothing else.
    """
    gpu = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if watch else None
    last = warmup + (2 * steps if watch else steps)
    marks: list[float] = []
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    directory = RunDirectory(config.run.dir)
    directory.checkpoints.path.mkdir(parents=True)
    with communication(60) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        prepared = _count_time_of_prepare(worker)

        def stop() -> bool:
            """Called once a step, before its rows are looked up."""
            if torch.cuda.is_available() and len(marks) in (warmup, warmup + steps):
                torch.cuda.synchronize()  # no step waits for the device by itself
            marks.append(time.perf_counter())
            if len(marks) == warmup + 1:
                before.update(worker.timer.total)
                prepared.clear()
            elif len(marks) == warmup + steps + 1:
                # Here and not at the end: the same steps as those that `marks` frame, so that phases add up to no more.
                after.update(worker.timer.total)
                if gpu is not None:
                    torch.cuda.synchronize()
                    gpu.start()
            elif gpu is not None and len(marks) == last + 1:
                torch.cuda.synchronize()
                gpu.stop()
            return len(marks) > last

        with suppress(Preempted):
            TrainingRun(worker, directory).train(stop)
        phases = {
            name: (total - before.get(name, 0.0)) / steps for name, total in after.items() if name != "checkpoint"
        }
    busy = None if gpu is None else busy_s(gpu) / (marks[last] - marks[warmup + steps])
    step_s = np.diff(marks[warmup : warmup + steps + 1])
    if torch.cuda.is_available():  # between two waits only the mean is a time of the device
        step_s[:] = step_s.mean()
    return Timed(step_s.tolist(), phases, sum(prepared) / max(1, len(prepared)), busy)


class Counted(NamedTuple):
    """Events per step of the real loop, between two log intervals.

    host_waits: reads of a tensor's value by Python, and on CUDA copies to the host (what a kernel of a CPU reads of its
    own memory does not count). graph_breaks, recompilations: of
    torch.compile, in all counted steps. operators_outside_graphs: operators that are dispatched one by one from
    Python or autograd, not from a compiled graph or from another operator.
    """

    host_waits: float
    graph_breaks: int
    recompilations: int
    operators_outside_graphs: float


def counted_steps(config: Config, steps: int, warmup: int) -> Counted:
    """Run the training loop as `timed_steps` does, under torch's profiler after `warmup` steps."""
    counters = torch._dynamo.utils.counters
    profiler, calls, before = torch.profiler.profile(), 0, (0, 0)
    directory = RunDirectory(config.run.dir)
    directory.checkpoints.path.mkdir(parents=True)

    def compiled() -> tuple[int, int]:
        return sum(counters["graph_break"].values()), int(counters["stats"]["unique_graphs"])

    def stop() -> bool:
        """Called once per step, before its rows are looked up."""
        nonlocal calls, before
        calls += 1
        if calls == warmup + 1:
            before = compiled()
            profiler.start()
        elif calls == warmup + steps + 1:
            profiler.stop()
        return calls > warmup + steps

    with communication(60) as comm, suppress(Preempted):
        worker = build_worker(config, open_dataset(config.data), comm)
        TrainingRun(worker, directory).train(stop)
    after = compiled()
    events = profiler.events() or []
    waits = sum(_is_read(event) or "Memcpy DtoH" in event.name for event in events)
    outside = sum(_is_outside_graphs(event) for event in events)
    return Counted(waits / steps, after[0] - before[0], after[1] - before[1], outside / steps)


def _is_read(event: Any) -> bool:
    """Return whether an event reads a value for Python, not for an operator around it."""
    if event.name != "aten::_local_scalar_dense":
        return False
    item = event.cpu_parent if event.cpu_parent is not None and event.cpu_parent.name == "aten::item" else event
    return _is_outside(item)


def _is_outside_graphs(event: Any) -> bool:
    """Return whether an event is an operator without another operator or a compiled graph around it."""
    return event.name.startswith(_OPERATORS) and _is_outside(event)


def _is_outside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_OPERATORS) or "Compiled" in parent.name:
            return False
        parent = parent.cpu_parent
    return True


def busy_s(gpu: torch.profiler.profile) -> float:
    """Seconds in which anything ran on the GPU: kernels and copies of all streams, overlaps once."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in gpu.profiler.kineto_results.events()  # type: ignore[union-attr]
        if str(event.device_type()).endswith("CUDA")
    )
    total, end = 0, 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e9


def _count_time_of_prepare(worker: Worker) -> list[float]:
    """CPU seconds of the background thread for each batch, as they come."""
    spent: list[float] = []
    prepare = worker.prepare

    def counted(step: int):  # type: ignore[no-untyped-def]
        start = time.thread_time()
        out = prepare(step)
        spent.append(time.thread_time() - start)
        return out

    worker.prepare = counted  # type: ignore[method-assign]
    return spent


def use_all_cores() -> None:
    """Torch's threads as many as this process may use, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
