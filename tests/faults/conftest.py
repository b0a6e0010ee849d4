"""Fixtures of the fault matrix: a small packed data set with encoders, and file systems that are soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from encoder_fixtures import encoders, packed  # noqa: F401 (fixtures)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """`small_disk(name, kib)`: a folder below tmp_path that is a file system of so many KiB.

    Skips where this user may not mount one.
    """
    mounted: list[Path] = []

    def mount(name: str, kib: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "mocme-tests", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"NO SMALL FILE SYSTEM: nothing shows what a full disk does: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", str(folder)], check=True, timeout=30)
