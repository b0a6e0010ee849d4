"""What OpenMP's waiting threads cost: `python -m tools.bench.waiting [--quick]`.

Loss with gradients (B 1024, N 256, D 256) in a process per setting, alone and beside one busy process, the settings in
turn so that other load of the machine meets them all. Threads that wait for others spin by default; where another
process needs their core, they keep it from the very thread that they wait for. The package sets `spin_10000`
(mocme_dist/__init__.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tools.bench.common import finish, measure, row
from tools.bench.loss import make_batch, run

CORES = len(os.sched_getaffinity(0))
# The package keeps what is set. 300,000 rounds is libgomp's default where there are no more threads than cores.
SETTINGS = {
    "one_thread": {"OMP_NUM_THREADS": "1"},
    "default": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "300000"},
    "spin_30000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "30000"},
    "spin_10000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "10000"},
    "spin_3000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "3000"},
    "spin_1000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
}


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """One process that keeps one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def child_ms(setting: str, busy: bool) -> tuple[float, float]:
    """Median and 90th percentile of a process with this setting."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in names} | SETTINGS[setting]
    command = [sys.executable, "-m", "tools.bench.waiting", "--child"]
    with busy_process(busy):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    median, p90 = json.loads(done.stdout.splitlines()[-1])
    return median, p90


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        batch = make_batch(1024, 256, 256, 128)
        print(json.dumps(measure(lambda: run(batch, True), 3, 30)))
        return
    keys = [(busy, setting) for busy in (False, True) for setting in SETTINGS]
    times = {key: list[tuple[float, float]]() for key in keys}
    for _ in range(1 if args.quick else 3):
        for busy, setting in keys:
            times[busy, setting].append(child_ms(setting, busy))
    rows, medians = [], {}
    for busy, setting in keys:
        median, p90 = (statistics.median(column) for column in zip(*times[busy, setting], strict=True))
        medians[busy, setting] = median
        where = "busy" if busy else "alone"
        rows.append(row(f"{where}_{setting}_ms", median, "ms"))
        print(f"{where:6} {setting:11} {median:7.1f} ms (p90 {p90:.1f})", flush=True)
    ours = medians[True, "spin_10000"]
    rows += [
        row("busy_gain_over_default", medians[True, "default"] / ours, "x"),
        row("busy_gain_over_one_thread", medians[True, "one_thread"] / ours, "x", ">= 0.95"),
        row("alone_cost", medians[False, "spin_10000"] / medians[False, "default"], "ours / default", "<= 1.1"),
    ]
    finish("waiting", True, rows, shapes={"B": 1024, "N": 256, "D": 256, "chunk": 128})


if __name__ == "__main__":
    main()
