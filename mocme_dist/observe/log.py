"""Writes metrics.jsonl and TensorBoard events. The owner of tensorboard.

A failing writer never stops training: the first failure switches monitoring off with one warning.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.data.files import write_bytes
from mocme_dist.observe.heat_map import heat_map

log = logging.getLogger(__name__)


class RunLog:
    """Writer of rank 0; the other ranks create one with `active=False` and call the same methods."""

    def __init__(self, curve: Path, tensorboard: Path, active: bool, step: int) -> None:
        """Continue after `step`; lines of later steps are removed, because these steps will run again."""
        self.active, self.curve, self.tensorboard = active, curve, tensorboard
        self._writer: Any = None
        self._threads: set[threading.Thread] = set()
        self._guard(lambda: self._open(tensorboard, step))

    def _open(self, tensorboard: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence_writer_thread()
        truncate_curve(self.curve, step)
        # TensorBoard drops events of purge_step and later.
        purge_step = step + 1 if tensorboard.exists() else None
        before = set(threading.enumerate())
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step, flush_secs=20)
        self._threads = set(threading.enumerate()) - before

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Switch monitoring off if the writer's own thread fails, where Python would print a stack trace."""
        if failed.thread in self._threads and failed.exc_value is not None:
            self._fail(failed.exc_value)
        else:
            self._hook(failed)

    def _guard(self, write: Callable[[], None]) -> None:
        if not self.active:
            return
        try:
            write()
        except Exception as error:  # the writer's own thread raises all kinds
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.active:
            self.active = False
            where = f"{self.tensorboard.parent} cannot be written: " if isinstance(error, OSError) else ""
            log.warning("monitoring is off from here on: %s%s: %s", where, type(error).__name__, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write points of curves at `step`."""

        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        self._guard(write)

    def line(self, values: Mapping[str, Any]) -> None:
        """Append an object to metrics.jsonl; values that are not finite become null, because JSON has no NaN."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

        def write() -> None:
            with self.curve.open("a", encoding="utf8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")

        self._guard(write)

    def heat_map(self, name: str, step: int, value: np.ndarray, names: Sequence[str], peak: float, unit: str) -> None:
        """Write a square matrix as a picture; see `heat_map.heat_map`."""
        self._guard(lambda: self._writer.add_image(name, heat_map(value, names, peak, unit), step, dataformats="HWC"))

    def layout(self, charts: Mapping[str, Mapping[str, list[str]]]) -> None:
        """Arrange the Custom Scalars tab: category to chart to patterns of the names of its curves."""
        lines = {
            category: {title: ["Multiline", tags] for title, tags in named.items()}
            for category, named in charts.items()
        }
        self._guard(lambda: self._writer.add_custom_scalars(lines))

    def projector(
        self, step: int, vector_ND: np.ndarray, labels: list[list[str]], header: list[str], tiles: np.ndarray | None
    ) -> None:
        """Write the Projector tab: N vectors with their labels and, where there are any, their pictures (N, H, W, 3)
        uint8."""

        def write() -> None:
            import torch

            pictures = None if tiles is None else torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning where a run is resumed
                self._writer.add_embedding(
                    torch.from_numpy(vector_ND),
                    metadata=labels,
                    label_img=pictures,
                    global_step=step,
                    tag="entities",
                    metadata_header=header,
                )

        self._guard(write)

    def hyper_parameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the HParams tab: settings with final metrics."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
        }
        self._guard(lambda: self._writer.add_hparams(plain, dict(metrics), run_name="."))

    def flush(self) -> None:
        """Write everything to disk."""
        self._guard(lambda: self._writer.flush())

    def close(self) -> None:
        """Flush, and end the thread of the writer."""
        self._guard(lambda: self._writer.close())
        if threading.excepthook == self._thread_failed:
            threading.excepthook = self._hook


def _silence_writer_thread() -> None:
    """Hide the traceback of TensorBoard's thread: its next call raises the same error, which is logged then."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    shown = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.thread, _AsyncWriterThread):
            shown(failure)

    threading.excepthook = hook


def truncate_curve(curve: Path, step: int) -> None:
    """Remove the lines of steps behind `step` from metrics.jsonl, and lines that cannot be read."""
    if curve.exists():
        # As bytes: a damaged line is removed, and the others stay as they are.
        kept = [line for line in curve.read_bytes().splitlines() if _step_of(line) <= step]
        write_bytes(curve, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line.decode("utf8"))["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # a line that a kill cut short, or that is damaged
