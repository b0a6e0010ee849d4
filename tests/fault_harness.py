"""A train command to do harm to.

In a process of its own, with its ranks known by pid and its files looked at from outside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_run import TINY

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "WDS_SECURE": "1",
    "PYTHONPATH": str(Path(__file__).parent / "faulty"),
}
LINES = ("modalities=[structure, numeric]", "train.log_every=1", "train.num_to_keep=3")
UNIFORM = (*LINES, "fusion.estimator=uniform")


class Command:
    """A command whose descendants are known, also after it is gone."""

    def __init__(self, folder: Path, *arguments: object, **variables: str) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "MASTER_ADDR")}
        folder.mkdir(exist_ok=True)
        self.errors = folder / f"stderr-{time.monotonic_ns()}.txt"
        with self.errors.open("w") as errors:
            command = [sys.executable, "-m", *map(str, arguments)]
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**env, **ENVIRONMENT, **variables},
            )
        self.known: dict[int, str] = {}

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        """What it said so far."""
        return self.errors.read_text()

    def end(self, timeout_s: float = 600) -> tuple[int, str]:
        """Exit code and the last line of its output."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output.strip().splitlines()[-1] if output.strip() else ""

    def descendants(self) -> dict[int, str]:
        """Start times by pid of all that it started; remembered, because orphans have another parent."""
        below = {self.process.pid}
        table = dict(_processes())
        while found := {pid for pid, (parent, _) in table.items() if parent in below} - below:
            below |= found
        self.known |= {pid: table[pid][1] for pid in below - {self.process.pid}}
        return self.known

    def left(self) -> set[int]:
        """Descendants that are still there, zombies aside."""
        table = dict(_processes())
        return {pid for pid, start in self.known.items() if pid in table and table[pid][1] == start}

    def wait_until_gone(self, pid: int, timeout_s: float = 30) -> None:
        """Wait for the end of a descendant."""
        deadline = time.monotonic() + timeout_s
        while pid in self.left():
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.01)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 600) -> Any:
        """The condition's value once it holds; fails when the command ends before."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, self.text[-4000:]
            assert time.monotonic() < deadline, self.text[-4000:]
            time.sleep(0.005)
        return value


def _processes() -> Iterator[tuple[int, tuple[int, str]]]:
    """(pid, (parent, start)) of all but zombies."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                yield int(folder.name), (int(fields[1]), fields[19])


def train_arguments(dataset: Path, run_dir: Path | str, *overrides: str) -> list[str]:
    """Of a run under Ray on a tiny data set."""
    paths = (f"data.dataset={json.dumps(str(dataset))}", f"run.dir={json.dumps(str(run_dir))}")
    return [
        "mocme_dist.train",
        "--set",
        *TINY,
        *LINES,
        "launch.mode=ray",
        "deepspeed.engine=deepspeed",
        *paths,
        *overrides,
    ]


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    manifests = (run_dir / "checkpoints").glob("step_*/MANIFEST.json")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in manifests)


def ranks(run_dir: Path) -> list[dict[str, Any]]:
    """What the ranks of the newest attempt said of themselves, by rank."""
    attempts = sorted((run_dir / "ray").glob("train-*/ranks"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in sorted(attempts[-1].glob("*.json"))] if attempts else []


def progress(run_dir: Path) -> int:
    """Last step that metrics.jsonl knows of."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if "train/loss" in line), default=0)
    except (OSError, ValueError):
        return 0


def fill(ballast: Path, leave: int = 0) -> None:
    """Fill the file system of a new file, by this file, but for `leave` bytes."""
    free = os.statvfs(ballast.parent)
    with ballast.open("wb") as file:
        file.write(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
