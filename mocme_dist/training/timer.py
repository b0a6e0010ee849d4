"""Times the phases of a step; always on, because a phase costs about a microsecond.

On an accelerator it measures the host: a phase ends when its work is queued, and waiting falls into the next phase that
needs a result. A trace (see `observe.profiler`) shows the device's own times.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


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
