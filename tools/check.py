"""Run what every commit must pass: format, lint, types and the unmarked tests.

Every step runs, whatever failed before it.

python tools/check.py                these four
python tools/check.py lint types     only these
python tools/check.py tests slow+ray the whole suite: also what is marked ray, slow or gpu

Steps joined by + run side by side; what one prints appears when it ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    # Known vulnerabilities of the pinned packages; skipped with a line where no advisory service is reached.
    "audit": ["tools.audit"],
    # Two processes, each with whole files: fixtures of a module are made once.
    "tests": ["pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not ray and not slow and not gpu"],
    "slow": ["pytest", "-q", "--durations=10", "-m", "(slow or gpu) and not ray"],
    # One after another: each Ray takes the whole machine.
    "ray": ["pytest", "-q", "--durations=15", "-m", "ray"],
}
DEFAULT = ["format", "lint", "types", "tests"]


def run_step(name: str, quiet: bool = False) -> bool:
    """Run one step under this interpreter; return whether it passed. A quiet step prints all it has at its end."""
    start = time.monotonic()
    print(f"== {name}: {' '.join(STEPS[name])}", flush=True)
    # Two processes of tests share the cores: one thread each.
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if quiet or "-n" in STEPS[name] else None
    done = subprocess.run(
        [sys.executable, "-m", *STEPS[name]],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    verdict = "passed" if done.returncode == 0 else "FAILED"
    print(f"{done.stdout or ''}== {name}: {verdict} in {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def run_together(names: list[str]) -> list[str]:
    """Run steps side by side, all but the last one quiet; return those that failed."""
    with ThreadPoolExecutor(len(names)) as pool:
        passed = list(pool.map(run_step, names, [name != names[-1] for name in names]))
    return [name for name, good in zip(names, passed, strict=True) if not good]


def step_names(word: str) -> list[str]:
    """Return the steps of a word of the command line, NAME or NAME+NAME."""
    names = word.split("+")
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(STEPS)}")
    return names


def main() -> int:
    """Run the steps that were named; return 0 if every one passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", type=step_names, metavar="STEP", help=", ".join(STEPS))
    groups = parser.parse_args().steps or [[name] for name in DEFAULT]
    failed = [name for names in groups for name in run_together(names)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
