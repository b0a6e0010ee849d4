"""Where a step's time goes: a timer of named phases that is always on, and a trace of a few steps on request.

The timer costs about a microsecond a phase. On an accelerator it times what the host does: a phase ends when its
work is queued, and waiting falls into the next phase that needs a result; the trace shows the device's own times.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mocme_dist.training.timer import PhaseTimer

log = logging.getLogger(__name__)

# The first steps compile, warm caches and fill the prefetcher, which is not typical of a run.
WARMUP_STEPS = 5
_TOP_OPERATORS = 25


class StepProfiler:
    """Traces `steps` steps after WARMUP_STEPS: DIRECTORY/rankR_steps_A-B.pt.trace.json.gz, and on rank 0 phases.txt.

    TensorBoard's profiler plugin, Perfetto and chrome://tracing open the trace. A file that cannot be written costs
    the profile and a warning, not the run.
    """

    def __init__(self, directory: Path, steps: int, rank: int, timer: PhaseTimer, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self.directory, self.steps, self.rank, self.timer = directory, steps, rank, timer
        self._done = 0
        self._profile: profile | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Return a context around the loop; a loop that ends early leaves a shorter trace."""
        try:
            yield
        finally:
            if self._profile is not None:
                self._finish(self._last_step)

    def step(self, step: int) -> None:
        """Count a step; called at its end with the number of steps so far."""
        if not self.steps:
            return
        self._done, self._last_step = self._done + 1, step
        if self._profile is not None and self._done == WARMUP_STEPS + self.steps:
            self._finish(step)
        elif self._done == WARMUP_STEPS:
            self._begin(step)

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        # The warning says that events end with the trace, as intended.
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
        title = f"steps {self._first_step + 1} to {step} of rank {self.rank}"
        title += "; tracing itself takes time, so compare shares, not milliseconds"
        table = f"{title}\n{phase_table(phases, elapsed, steps)}"
        path = self.directory / f"rank{self.rank}_steps_{self._first_step + 1}-{step}.pt.trace.json.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
            if self.rank == 0:
                operators = traced.key_averages().table(
                    sort_by=f"self_{'cuda' if self.on_gpu else 'cpu'}_time_total", row_limit=_TOP_OPERATORS
                )
                (self.directory / "phases.txt").write_text(f"{table}\n\n{operators}\n", encoding="utf8")
        except (OSError, RuntimeError) as error:
            log.warning("%s: the profile is not written: %s", self.directory, error)
            return
        if self.rank == 0:
            log.info("profile: %s; open %s in Perfetto or TensorBoard", table, path)


def phase_table(phases: dict[str, float], elapsed: float, steps: int) -> str:
    """Return milliseconds per step and share of each phase, the longest first; time outside of phases is a row, too."""
    rest = {**phases, "(between phases)": max(0.0, elapsed - sum(phases.values()))}
    rows = [f"{'phase':18s} {'ms per step':>10s} {'share':>8s}"]
    for name, seconds in sorted(rest.items(), key=lambda item: -item[1]):
        rows.append(f"{name:18s} {1e3 * seconds / steps:10.2f} {seconds / max(elapsed, 1e-9):8.1%}")
    return "\n".join([*rows, f"{'step':18s} {1e3 * elapsed / steps:10.2f} {1:8.1%}"])
