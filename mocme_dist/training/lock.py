"""One run in one directory: a file that says who holds it, kept fresh as long as the holder lives.

On its own host a holder is looked up by its process. On another host that cannot be done, and after a node was lost the
same run starts elsewhere: there the lock is watched for a while, and taken over when nobody freshens it. What is
compared is the file's text, never two clocks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from mocme_dist.errors import LockedError

log = logging.getLogger(__name__)

# A holder freshens its lock so often; another host believes it dead after a time in which it would have done so often.
BEAT_S, WATCH_S = 5.0, 30.0


class Lock:
    """Held from its making to `release`."""

    def __init__(self, directory: Path) -> None:
        """Take it.

        Raises:
            LockedError: a living process has it, named with host and start time.
        """
        self.path = directory / "lock"
        self._mine: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "started": start_of(os.getpid()),
            "token": uuid.uuid4().hex,
            "beats": 0,
        }
        while not self._make():
            _clear_stale(self.path)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go; a lock that somebody else has by now stays."""
        self._over.set()
        self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _make(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._mine, file)
        return True

    def _is_mine(self) -> bool:
        return _owner(_read(self.path)).get("token") == self._mine["token"]

    def _beat(self) -> None:
        temporary = self.path.with_name(f".tmp-lock-{self._mine['token']}")
        while not self._over.wait(BEAT_S):
            # A disk that is full, or does not answer, for a moment: the watcher waits for several beats.
            with contextlib.suppress(OSError):
                if not self._is_mine():
                    # It stood still for so long (a suspended machine) that another host took the run over.
                    log.error("%s: taken over by another process; this one saves and stops", self.path)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._mine["beats"] += 1
                temporary.write_text(json.dumps(self._mine))
                temporary.replace(self.path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _owner(text: str | None) -> dict[str, Any]:
    """What a lock says; empty when it is torn."""
    try:
        owner = json.loads(text or "")
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def start_of(pid: int) -> str | None:
    """When a process of this host began, in ticks since its boot; None when there is no such process."""
    try:
        # The name, in parentheses, may hold spaces; the start is the 22nd field, the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _clear_stale(path: Path) -> None:
    """Remove a dead process's lock, or raise LockedError."""
    if (text := _read(path)) is None:
        return  # let go in this moment
    owner = _owner(text)
    pid, host, since = owner.get("pid", 0), owner.get("host", "an unknown host"), owner.get("since", "an unknown time")
    if host == socket.gethostname() and isinstance(pid, int) and pid:
        # A restarted container gives the same number to another process: the start tells them apart.
        now, started = start_of(pid), owner.get("started")
        gone = now is None or (started is not None and now != started)
    else:
        log.warning("%s: held by process %s on %s since %s; watching it for %g s", path.parent, pid, host, since, WATCH_S)
        gone = _stands_still(path, text)
    if not gone:
        raise LockedError(
            f"{path.parent}: locked by process {pid} on {host} since {since}; use another run.dir, wait for it, "
            f"or delete {path.name} in it if that process is gone"
        )
    if _remove(path, text):
        log.warning("%s: the lock of process %s on %s, which is gone, is taken over", path.parent, pid, host)


def _stands_still(path: Path, text: str) -> bool:
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_S / 2, WATCH_S / 10))
        if _read(path) != text:
            return _read(path) is None
    return True


def _remove(path: Path, text: str) -> bool:
    """Remove the lock that says `text`; one that somebody else has made in this moment stays."""
    doomed = path.with_name(f".tmp-lock-{uuid.uuid4().hex}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return False
    same = doomed.read_text() == text
    if not same:
        with contextlib.suppress(FileExistsError):
            os.link(doomed, path)
    doomed.unlink()
    return same
