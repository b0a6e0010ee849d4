"""Shared parts of the benchmarks: timing, measured peak rates of the machine, and the closing JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for_device() -> None:
    """Wait for the accelerator to finish its queue, so that wall-clock times include its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(function: Callable[[], object], warmup: int = 3, repeats: int = 20) -> tuple[float, float]:
    """Return the median and 90th percentile of one call, in milliseconds."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        wait_for_device()
        start = time.perf_counter()
        function()
        wait_for_device()
        times.append((time.perf_counter() - start) * 1e3)
    return spread(times)


def replayed_ms(function: Callable[[], object], times: int = 20, repeats: int = 20) -> float:
    """Return the median time of one call on CUDA in milliseconds, without the host.

    One graph of `times` calls is replayed.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            function()
    return measure(graph.replay, 3, repeats)[0] / times


def memory_mb(key: str) -> float:
    """Return VmRSS (resident now), VmHWM (its peak) or RssFile of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak_added_mb(step: Callable[[], object]) -> float:
    """Return the peak memory in MB that a call adds to this process, or to its GPU if there is one. Warm up before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        step()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = memory_mb("VmRSS")
    step()
    return memory_mb("VmHWM") - before


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 90th percentile."""
    return statistics.median(values), statistics.quantiles(values, n=10)[-1] if len(values) > 1 else values[0]


def ceilings(repeats: int = 20) -> dict[str, float]:
    """Measure the peak rates of this machine with torch's threads: copy bandwidth and the rate of a float32 product.

    copy_gb_per_s: bytes read and written by copying 256 MB. matrix_gflop_per_s: additions and multiplications of a
    2,048 x 2,048 product without TF32. vector_gop_per_s: elementwise instructions, each on one number, at the same
    rate of issue: a fused multiply-add of the product counts once. On CUDA the product is of 8,192, and one of
    bfloat16 is measured too.
    """
    side = 8192 if DEVICE.type == "cuda" else 2048
    source = torch.ones(1 << 26, device=DEVICE)
    target, square = torch.empty_like(source), torch.randn(side, side, device=DEVICE)
    copy_ms, _ = measure(lambda: target.copy_(source), 2, repeats)
    matrix_ms, _ = measure(lambda: square @ square, 2, repeats)
    flop = 2 * side**3
    found = {
        "copy_gb_per_s": 2 * 4 * source.numel() / copy_ms / 1e6,
        "matrix_gflop_per_s": flop / matrix_ms / 1e6,
        "vector_gop_per_s": flop / 2 / matrix_ms / 1e6,
    }
    if DEVICE.type == "cuda":
        square = square.bfloat16()
        found["bfloat16_gflop_per_s"] = flop / measure(lambda: square @ square, 2, repeats)[0] / 1e6
    return {name: round(value, 1) for name, value in found.items()}


def machine() -> dict[str, Any]:
    """Describe the machine and the commit of the figures."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    sets = [name for name in ("avx2", "avx512f", "amx_tile") if f" {name} " in Path("/proc/cpuinfo").read_text()]
    cpu = f"{model} ({', '.join(sets)}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def row(name: str, value: float, unit: str, bar: str = "") -> dict[str, Any]:
    """Return one figure; `bar` is the bound that it should meet, as text: '>= 20' or '<= 0.1'."""
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar}


def is_met(figure: dict[str, Any]) -> bool | None:
    """Return whether a figure meets its bar, or None if it has no bar that can be parsed."""
    sign, _, bound = figure["bar"].partition(" ")
    try:
        limit = float(bound)
    except ValueError:
        return None
    compare = {
        ">=": figure["value"] >= limit,
        ">": figure["value"] > limit,
        "<=": figure["value"] <= limit,
        "<": figure["value"] < limit,
    }
    return compare.get(sign)


def finish(bench: str, parity: bool, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Print the rows, then the closing JSON line; exit with 1 if the parity check failed."""
    for figure in rows:
        met = {True: "met", False: "MISSED", None: ""}[is_met(figure)]
        print(f"  {figure['name']:32s} {figure['value']:14,.4f} {figure['unit']:24s} {figure['bar']:8s} {met}")
    if "--quick" in sys.argv[1:]:
        extra["quick"] = True
    print(json.dumps({"bench": bench, "parity": parity, "rows": rows, "machine": machine(), **extra}), flush=True)
    if not parity:
        sys.exit(1)
