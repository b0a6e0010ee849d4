"""What the benchmarks share: timing, memory and the closing JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measure(function: Callable[[], object], warmup: int = 3, repeats: int = 20) -> tuple[float, float]:
    """Median and 90th percentile of one call, in milliseconds."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), statistics.quantiles(times, n=10)[-1] if len(times) > 1 else times[0]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def row(name: str, value: float, unit: str, bar: str = "") -> dict[str, Any]:
    """One figure; `bar` is what it is held against, as text."""
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar}


def finish(bench: str, parity: bool, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Print the closing line."""
    print(json.dumps({"bench": bench, "parity": parity, "rows": rows, "machine": machine(), **extra}))
