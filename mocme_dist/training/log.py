"""What a run shows while it runs: metrics.jsonl, TensorBoard and a line per interval. The only file that knows TensorBoard.

A dead writer never stops training: the first failure switches monitoring off with one warning.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.data.files import write_bytes

log = logging.getLogger(__name__)


class RunLog:
    """Rank 0's writer; the other ranks make one with `active=False` and call the same methods."""

    def __init__(self, curve: Path, tensorboard: Path, active: bool, step: int) -> None:
        """Go on after `step`: steps behind it will be run again, and their old lines must not stand twice."""
        self.active, self.curve = active, curve
        self._writer: Any = None
        self._guard(lambda: self._open(tensorboard, step))

    def _open(self, tensorboard: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _truncate_curve(self.curve, step)
        # TensorBoard drops what stands at purge_step and behind it.
        purge_step = step + 1 if tensorboard.exists() else None
        self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step, flush_secs=20)

    def _guard(self, write: Callable[[], None]) -> None:
        if not self.active:
            return
        try:
            write()
        except Exception as error:  # the writer's own thread raises all kinds
            self.active = False
            log.warning("monitoring is off from here on: %s: %s", type(error).__name__, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Curves at `step`."""

        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        self._guard(write)

    def line(self, values: Mapping[str, Any]) -> None:
        """One object appended to metrics.jsonl; what is not finite becomes null, as JSON has no NaN."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}

        def write() -> None:
            with self.curve.open("a", encoding="utf8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")

        self._guard(write)

    def heat_map(self, name: str, step: int, value: np.ndarray, peak: float) -> None:
        """A square matrix as a picture: 0 is white, `peak` and above is dark blue, a missing value (NaN) is grey."""
        self._guard(lambda: self._writer.add_image(name, heat_map(value, peak), step, dataformats="HWC"))

    def layout(self, charts: Mapping[str, Mapping[str, list[str]]]) -> None:
        """Arrange the Custom Scalars tab: category to chart to the curves it shows together (patterns of their names)."""
        lines = {category: {title: ["Multiline", tags] for title, tags in named.items()} for category, named in charts.items()}
        self._guard(lambda: self._writer.add_custom_scalars(lines))

    def projector(self, step: int, vector_ND: np.ndarray, labels: list[list[str]], header: list[str], tiles: np.ndarray | None) -> None:
        """The Projector tab: N vectors with their labels and, where there are any, their pictures (N, H, W, 3) uint8."""

        def write() -> None:
            import torch

            pictures = None if tiles is None else torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
            self._writer.add_embedding(
                torch.from_numpy(vector_ND), metadata=labels, label_img=pictures, global_step=step, tag="entities", metadata_header=header
            )

        self._guard(write)

    def hyper_parameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The HParams tab: settings with final metrics."""
        plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()}
        self._guard(lambda: self._writer.add_hparams(plain, dict(metrics), run_name="."))

    def flush(self) -> None:
        """Bring everything to disk."""
        self._guard(lambda: self._writer.flush())

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._guard(lambda: self._writer.close())


def heat_map(value: np.ndarray, peak: float, cell: int = 32) -> np.ndarray:
    """(n, n) numbers to a (32 n, 32 n, 3) uint8 picture."""
    share = np.clip(np.nan_to_num(value) / max(peak, 1e-9), 0, 1)[..., None]
    colour = (1 - share) * np.array([255.0, 255.0, 255.0]) + share * np.array([8.0, 48.0, 107.0])
    colour[np.isnan(value)] = 160.0
    return np.repeat(np.repeat(colour.astype(np.uint8), cell, 0), cell, 1)


def _truncate_curve(curve: Path, step: int) -> None:
    if curve.exists():
        kept = [line for line in curve.read_text(encoding="utf8").splitlines() if _step_of(line) <= step]
        write_bytes(curve, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short


class Progress:
    """A line per interval with done/total, rate and the time left; durations from a monotonic clock.

    The first unit is not counted: a first step compiles, and would promise hours.
    """

    def __init__(self, what: str, total: int, active: bool, interval_s: float = 10.0) -> None:
        self.what, self.total, self.active, self.interval_s = what, total, active, interval_s
        self.start = self.last = time.monotonic()
        self.begun: int | None = None

    def __call__(self, done: int, note: str = "") -> None:
        """Say how far it is, at most once an interval."""
        now = time.monotonic()
        if self.begun is None:
            self.begun, self.start = done, now
        if not self.active or (now - self.last < self.interval_s and done < self.total):
            return
        self.last = now
        parts = [f"{self.what} {done}/{self.total}"]
        if done > self.begun:
            rate = (done - self.begun) / max(now - self.start, 1e-9)
            parts += [f"{rate:.1f}/s", f"{duration((self.total - done) / max(rate, 1e-9))} left"]
        log.info(", ".join([*parts, note] if note else parts))


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
