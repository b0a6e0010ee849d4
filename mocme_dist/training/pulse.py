"""Signs of life: each rank under Ray says in a small file who it is, at which step it stands, and how it failed.

Ray knows that a worker is gone; these files know which process on which host it was and how far it had come. They are
overwritten all the time and need not outlive a crash of the machine, so nothing here is synced. A rank that makes no
step for long also writes the stacks of all its threads, by a watchdog that needs neither the interpreter nor a signal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mocme_dist.training.board import Post

INTERVAL_S = 1.0


@dataclass(frozen=True)
class Sign:
    """What one rank said last."""

    rank: int
    world_size: int
    pid: int
    host: str
    node: str
    step: int | None = None
    error: str | None = None
    trace: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Pulse:
    """One rank's own file, `RANK.json`, and its stacks, `RANK.stacks`; files of an earlier attempt are replaced."""

    def __init__(self, folder: Path, rank: int, world_size: int, node: str, stall_s: float, post: Post | None = None) -> None:
        """Say hello.

        Args:
            folder: the attempt's, shared by all ranks.
            node: Ray's id of the node.
            stall_s: without a step for so long the stacks are written.
            post: tells the launcher the same, where it does not see the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.post = post
        self._path, self._stall_s = folder / f"{rank:05d}.json", stall_s
        self._sign = Sign(rank, world_size, os.getpid(), socket.gethostname(), node)
        self._stacks = (folder / f"{rank:05d}.stacks").open("w")
        self._last = -INTERVAL_S
        self._write()

    def beat(self, step: int) -> None:
        """Standing before `step`; costs a file a second at most."""
        self._sign = replace(self._sign, step=step)
        now = time.monotonic()
        if now - self._last >= INTERVAL_S:
            self._last = now
            faulthandler.dump_traceback_later(self._stall_s, file=self._stacks)
            self._write()

    def failed(self, error: BaseException) -> None:
        """Ended by an error of its own or by the loss of another rank."""
        trace = "".join(traceback.format_exception(error))
        self._sign = replace(self._sign, error=f"{type(error).__name__}: {error}", trace=trace)
        self._write(last=True)

    def close(self) -> None:
        """End the watchdog."""
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _write(self, last: bool = False) -> None:
        temporary, text = self._path.with_suffix(".tmp"), json.dumps(asdict(self._sign))
        # A full disk must not end the training; the launcher then only knows less.
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            temporary.replace(self._path)
        if self.post is not None:
            self.post(f"ranks/{self._path.name}", text, wait=last)


def read_signs(folder: Path) -> list[Sign]:
    """What the ranks of an attempt said last, by rank; unreadable files are left out."""
    signs = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            signs.append(Sign(**json.loads(path.read_text())))
    return signs


def is_stopped(sign: Sign) -> bool:
    """Whether it is a process of this host that a signal has stopped (SIGSTOP, a debugger)."""
    if sign.host != socket.gethostname():
        return False
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{sign.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def dump_stopped(folder: Path, sign: Sign) -> Path:
    """Write the stacks of a stopped process, which cannot write them itself; the file says why where that fails."""
    path = folder / f"{sign.rank:05d}.stacks"
    # Comes with ray[default], beside the interpreter; it reads the memory and leaves the process stopped.
    tool = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    try:
        if tool is None:
            raise OSError("py-spy is not installed")
        command = [tool, "dump", "--nonblocking", "--pid", str(sign.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        text = done.stdout or f"no stacks of process {sign.pid}: {done.stderr.strip()}\n"
    except (OSError, subprocess.SubprocessError) as error:
        text = f"no stacks of process {sign.pid}: {error}\n"
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(text)
    return path
