"""Run what every commit must pass: format, lint, types and the unmarked tests.

Every step runs, whatever failed before it.

python tools/check.py                these four
python tools/check.py lint types     only these
python tools/check.py tests slow ray the whole suite: also what is marked ray, slow or gpu
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
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
    "slow": ["pytest", "-q", "-n", "2", "--dist", "loadfile", "--durations=10", "-m", "(slow or gpu) and not ray"],
    # One after another: each Ray takes the whole machine, and some of these tests measure time.
    "ray": ["pytest", "-q", "--durations=15", "-m", "ray"],
}
DEFAULT = ["format", "lint", "types", "tests"]


def run_step(name: str) -> bool:
    """Run one step under this interpreter; return whether it passed."""
    start = time.monotonic()
    print(f"== {name}: {' '.join(STEPS[name])}", flush=True)
    # Two processes of tests share the cores: one thread each.
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if "-n" in STEPS[name] else None
    passed = subprocess.run([sys.executable, "-m", *STEPS[name]], cwd=ROOT, env=environment).returncode == 0
    print(f"== {name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return passed


def main() -> int:
    """Run the steps that were named; return 0 if every one passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], metavar="STEP", help=", ".join(STEPS))
    failed = [name for name in (parser.parse_args().steps or DEFAULT) if not run_step(name)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
