"""Where a step's time goes: a timer of named phases that is always on, and a trace of a few steps on request.

The timer costs about a microsecond a phase. On an accelerator it times what the host does: a phase ends when its
work is queued, and waiting falls into the next phase that needs a result; the trace shows the device's own times.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

# Steps that compile, warm caches and fill the prefetcher are not what a run consists of.
WARMUP_STEPS = 5
_TOP_OPERATORS = 25


class PhaseTimer:
    """Seconds spent in named phases, added up until `take`.

    Attributes:
        seconds: since the last `take`. total: since the beginning.
        tracing: whether phases also become ranges of a profiler's trace.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)
        self.tracing = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        label = record_function(name) if self.tracing else None
        if label is not None:
            label.__enter__()
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent
            self.total[name] += spent
            if label is not None:
                label.__exit__(None, None, None)

    def take(self) -> dict[str, float]:
        """The sums so far; they start again at 0."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class StepProfiler:
    """Traces `steps` steps after WARMUP_STEPS: DIRECTORY/rankR_steps_A-B.pt.trace.json.gz, and on rank 0 phases.txt.

    TensorBoard's profiler plugin, Perfetto and chrome://tracing open the trace. A file that cannot be written costs
    the profile and a warning, not the run.
    """

    def __init__(self, directory: Path, steps: int, rank: int, timer: PhaseTimer) -> None:
        self.directory, self.steps, self.rank, self.timer = directory, steps, rank, timer
        self._done = 0
        self._profile: profile | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the loop: steps that end before the last wanted one leave a shorter trace."""
        try:
            yield
        finally:
            if self._profile is not None:
                self._finish(self._last_step)

    def step(self, step: int) -> None:
        """Called at the end of each step with the number of steps so far."""
        if not self.steps:
            return
        self._done, self._last_step = self._done + 1, step
        if self._profile is not None and self._done == WARMUP_STEPS + self.steps:
            self._finish(step)
        elif self._done == WARMUP_STEPS:
            self._begin(step)

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        # It warns that events end with the trace; they do.
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)
        self._profile = profile(activities=activities)
        self._profile.start()
        self.timer.tracing = True
        self._first_step, self._before, self._start = step, dict(self.timer.total), time.perf_counter()

    def _finish(self, step: int) -> None:
        elapsed, traced, self._profile = time.perf_counter() - self._start, self._profile, None
        self.timer.tracing = False
        assert traced is not None
        traced.stop()
        steps = step - self._first_step
        if not steps:
            return
        phases = {name: total - self._before.get(name, 0.0) for name, total in self.timer.total.items()}
        title = (
            f"steps {self._first_step + 1} to {step} of rank {self.rank}; tracing itself takes time, so compare shares, not milliseconds"
        )
        table = f"{title}\n{phase_table(phases, elapsed, steps)}"
        path = self.directory / f"rank{self.rank}_steps_{self._first_step + 1}-{step}.pt.trace.json.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
            if self.rank == 0:
                operators = traced.key_averages().table(sort_by=f"self_{_device()}_time_total", row_limit=_TOP_OPERATORS)
                (self.directory / "phases.txt").write_text(f"{table}\n\n{operators}\n", encoding="utf8")
        except (OSError, RuntimeError) as error:
            log.warning("%s: the profile is not written: %s", self.directory, error)
            return
        if self.rank == 0:
            log.info("profile: %s; open %s in Perfetto or TensorBoard", table, path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def phase_table(phases: dict[str, float], elapsed: float, steps: int) -> str:
    """Milliseconds a step and share of each phase, the longest first; what no phase covers is a row too."""
    rest = {**phases, "(between phases)": max(0.0, elapsed - sum(phases.values()))}
    rows = [f"{'phase':18s} {'ms a step':>10s} {'share':>8s}"]
    for name, seconds in sorted(rest.items(), key=lambda item: -item[1]):
        rows.append(f"{name:18s} {1e3 * seconds / steps:10.2f} {seconds / max(elapsed, 1e-9):8.1%}")
    return "\n".join([*rows, f"{'step':18s} {1e3 * elapsed / steps:10.2f} {1:8.1%}"])
