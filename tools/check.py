"""What every commit must pass: `python tools/check.py` runs format, lint, types and the unmarked tests, and says what failed.

python tools/check.py            all of it
python tools/check.py lint types only these
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "tests": ["pytest", "-q", "-m", "not ray and not slow and not gpu"],
}


def run_step(name: str) -> bool:
    """Run one step under this interpreter; whether it passed."""
    start = time.monotonic()
    print(f"== {name}: {' '.join(STEPS[name])}", flush=True)
    passed = subprocess.run([sys.executable, "-m", *STEPS[name]], cwd=ROOT).returncode == 0
    print(f"== {name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return passed


def main() -> int:
    """Run the steps that are asked for, all of them even when one fails; 0 when every one passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], metavar="STEP", help=", ".join(STEPS))
    failed = [name for name in (parser.parse_args().steps or STEPS) if not run_step(name)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
