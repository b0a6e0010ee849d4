"""Asks the advisory service whether a pinned package has a known vulnerability: `python -m tools.audit`.

Runs pip-audit on requirements.lock, without installing anything. Where its service cannot be reached, or does not know
the packages (a mirror without advisories), the check is skipped with a line that says so, and the exit code is 0.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
# Limits of the first question, about one package, and of that about all (seconds).
PROBE_S, ALL_S = 20, 240


def ask(requirements: str, limit_s: float) -> list[dict[str, Any]] | str:
    """Return what pip-audit found for pinned requirements, or why it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text(requirements)
        command = [sys.executable, "-m", "pip_audit", "-r", str(path), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", "5", "--cache-dir", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
            found = json.loads(done.stdout)["dependencies"]
        except subprocess.TimeoutExpired:
            return f"no answer within {limit_s:g} s"
        except (ValueError, KeyError, TypeError):
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return list(found)


def pins(lock: str) -> list[str]:
    """Return name==version of each package of a lock file."""
    return [line.split()[0] for line in lock.splitlines() if "==" in line and not line.startswith(("#", " "))]


def verdict(found: list[dict[str, Any]] | str) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print for an answer of `ask`."""
    if isinstance(found, str):
        return 0, [f"SKIPPED: vulnerabilities are not checked: {found}"]
    known = [package for package in found if "skip_reason" not in package]
    if not known:
        return 0, ["SKIPPED: vulnerabilities are not checked: the index that answers has no advisories"]
    lines = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no version'}"
        for package in known
        for flaw in package["vulns"]
    ]
    unknown = len(found) - len(known)
    lines.append(f"{len(known)} packages checked, {unknown} unknown to the service, {len(lines)} vulnerabilities")
    return int(len(lines) > 1), lines


def main() -> int:
    """Probe the service, then check all packages."""
    if importlib.util.find_spec("pip_audit") is None:
        print("SKIPPED: vulnerabilities are not checked: pip-audit is not installed; pip install pip-audit")
        return 0
    lines = pins(LOCK.read_text())
    code, said = verdict(ask(f"{lines[0]}\n", PROBE_S))
    if not said[0].startswith("SKIPPED"):
        code, said = verdict(ask("\n".join(lines) + "\n", ALL_S))
    print("\n".join(said))
    return code


if __name__ == "__main__":
    sys.exit(main())
