"""Memory of a search for missing facts: `python -m tools.bench.discover [--entities 100000 1000000] [--width 256]`.

Runs `mocme discover` on bundles of random vectors (as in tools.bench.query) in a process of its own and watches its
anonymous memory, which mapped files are not part of. Parity: the same facts come out when the search is killed half way
and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.common import finish, row
from tools.bench.query import make_bundle


class Searched(NamedTuple):
    """Result of a search: the peak of its anonymous memory in bytes, its seconds, and whether it ended by itself."""

    peak: int
    seconds: float
    ended: bool


def search(bundle: Path, output: Path, questions: int, kill_at: int = 0) -> Searched:
    """Search one relation; `kill_at` kills it when so many files of units are there."""
    command = [sys.executable, "-m", "mocme_dist.discover", str(bundle), "--output", str(output)]
    command += ["--relation", "relation 0", "--questions", str(questions), "--min-probability", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start, peak = time.perf_counter(), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))])
        if kill_at and len(list(Path(f"{output}.search").glob("*.npz"))) >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return Searched(peak, time.perf_counter() - start, process.returncode == 0)


def main() -> None:
    """Make the bundles, search them, print the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--questions", type=int, default=256, help="of each side")
    args = parser.parse_args()
    figures: list[dict[str, Any]] = []
    parity = True
    with tempfile.TemporaryDirectory() as folder:
        for entities in args.entities:
            place = Path(folder) / f"bundle-{entities}"
            make_bundle(place, entities, args.width, "float32")
            table = 4 * entities * args.width
            whole, again = Path(folder) / "whole.csv", Path(folder) / "again.csv"
            found = search(place, whole, args.questions)
            killed = search(place, again, args.questions, kill_at=1)
            parity &= found.ended and not killed.ended and search(place, again, args.questions).ended
            parity &= whole.read_bytes() == again.read_bytes()
            figures += [
                row(f"{entities}_peak_mib", found.peak / 2**20, "MiB"),
                row(f"{entities}_peak_over_table", found.peak / table, "ratio", "<= 1"),
                row(f"{entities}_s", found.seconds, "s"),
            ]
            print(json.dumps(figures[-3:]), file=sys.stderr)
    finish("discover", parity, figures, width=args.width, questions=args.questions)


if __name__ == "__main__":
    main()
