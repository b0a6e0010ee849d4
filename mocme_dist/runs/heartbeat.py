"""Heartbeats: each rank under Ray writes who it is, at which step it is, and how it failed, to a small file.

Ray knows that a worker is lost; these files tell which process on which host it was and how far it had come. They are
overwritten all the time and need not survive a crash of the machine, so nothing is synced. A rank that makes no step
for a long time also writes the stacks of all its threads, by a watchdog that needs neither the interpreter nor a
signal.

The machines of a run at a URL share no disk. There the ranks send their heartbeats to an actor on the launcher's
machine, which writes them to the folder that the supervisor reads, and answers whether the run is asked to stop.
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
from typing import Any

INTERVAL_S = 1.0
# How long a rank that ends waits for its last message to be received (seconds).
LAST_MESSAGE_S = 10.0


@dataclass(frozen=True)
class RankStatus:
    """Last heartbeat of one rank.

    Attributes:
        node: Ray's id of its node.
        step: the step it is about to make.
        ended: whether it has made its last step.
    """

    rank: int
    world_size: int
    pid: int
    host: str
    node: str
    step: int | None = None
    error: str | None = None
    trace: str = ""
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class StatusActor:
    """Body of the actor on the launcher's machine; one per attempt."""

    def __init__(self, folder: str, stop_file: str) -> None:
        self.folder, self.stop_file = Path(folder), Path(stop_file)

    def put(self, name: str, text: str) -> bool:
        """Write a file of the attempt; return whether the run is asked to stop."""
        path = self.folder / name
        if self.folder not in path.resolve().parents:
            raise ValueError(f"{name}: outside the attempt's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".posted")  # ranks on this machine write files of their own, with other names
        temporary.write_text(text)
        temporary.replace(path)
        return self.stop_file.exists()


def start_status_actor(folder: Path, stop_file: Path) -> Any:
    """Start a status actor on this machine; it ends with the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(StatusActor).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(str(folder.resolve()), str(stop_file))


class StatusClient:
    """A rank's connection to the status actor. Only its last message waits for an answer."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._stop = actor, False
        self._sent: Any = None

    def send(self, name: str, text: str, wait: bool = False) -> None:
        """Have `text` written as the attempt's file `name`; skipped while an earlier message is on its way."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # the ranks of a launcher that has ended end with it
            if self._sent is not None and not wait:
                done, _ = ray.wait([self._sent], timeout=0)
                if not done:
                    return
                self._stop = bool(ray.get(done[0]))
            self._sent = self._actor.put.remote(name, text)
            if wait:
                self._stop = bool(ray.get(self._sent, timeout=LAST_MESSAGE_S))

    def stop_asked(self) -> bool:
        """Return whether the launcher asked to stop, as of the last answer."""
        return self._stop


class RankHeartbeat:
    """One rank's file, `RANK.json`, and its stacks, `RANK.stacks`; files of an earlier attempt are replaced."""

    def __init__(
        self, folder: Path, rank: int, world_size: int, node: str, stall_s: float, client: StatusClient | None = None
    ) -> None:
        """Write the first heartbeat.

        Args:
            folder: of the attempt, shared by all ranks.
            node: Ray's id of the node.
            stall_s: time without a step after which the stacks are written (seconds).
            client: sends the heartbeats to a launcher that does not see the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.client = client
        self._path, self._stall_s = folder / f"{rank:05d}.json", stall_s
        self._status = RankStatus(rank, world_size, os.getpid(), socket.gethostname(), node)
        self._stacks = (folder / f"{rank:05d}.stacks").open("w")
        self._last = -INTERVAL_S
        self._write()

    def before_step(self, step: int) -> None:
        """Record the step that is about to be made; writes at most one file per INTERVAL_S."""
        self._status = replace(self._status, step=step)
        now = time.monotonic()
        if now - self._last >= INTERVAL_S:
            self._last = now
            faulthandler.dump_traceback_later(self._stall_s, file=self._stacks)
            self._write()

    def ended(self) -> None:
        """Record that all steps are made and the final evaluation begins."""
        self._status = replace(self._status, ended=True)
        self._write()

    def failed(self, error: BaseException) -> None:
        """Record an error of this rank, or the loss of another one."""
        trace = "".join(traceback.format_exception(error))
        self._status = replace(self._status, error=f"{type(error).__name__}: {error}", trace=trace)
        self._write(last=True)

    def close(self) -> None:
        """End the watchdog."""
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _write(self, last: bool = False) -> None:
        temporary, text = self._path.with_suffix(".tmp"), json.dumps(asdict(self._status))
        # A full disk must not end the training; the launcher only knows less then.
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            temporary.replace(self._path)
        if self.client is not None:
            self.client.send(f"ranks/{self._path.name}", text, wait=last)


def read_statuses(folder: Path) -> list[RankStatus]:
    """Return the last heartbeats of an attempt, by rank; unreadable files are left out."""
    statuses = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            statuses.append(RankStatus(**json.loads(path.read_text())))
    return statuses


def is_stopped(status: RankStatus) -> bool:
    """Return whether it is a process of this host that a signal has stopped (SIGSTOP, a debugger)."""
    if status.host != socket.gethostname():
        return False
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{status.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def dump_stopped(folder: Path, status: RankStatus) -> Path:
    """Write the stacks of a stopped process, which cannot write them itself, or why that fails; return the file."""
    path = folder / f"{status.rank:05d}.stacks"
    # py-spy comes with ray[default], beside the interpreter. It reads the memory and leaves the process stopped.
    tool = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    try:
        if tool is None:
            raise OSError("py-spy is not installed")
        command = [tool, "dump", "--nonblocking", "--pid", str(status.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        text = done.stdout or f"no stacks of process {status.pid}: {done.stderr.strip()}\n"
    except (OSError, subprocess.SubprocessError) as error:
        text = f"no stacks of process {status.pid}: {error}\n"
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(text)
    return path
