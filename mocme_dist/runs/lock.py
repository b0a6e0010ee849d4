"""Lock of a run directory: a file that names its holder, who sends heartbeats as long as it lives.

A holder of this host is looked up by its process. A holder of another host cannot be, and after the loss of a node the
same run starts on another one: such a lock is watched for a while, and taken over if no heartbeat comes. The text of
the file is compared, never two clocks.
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

# Heartbeat period, and how long a lock of another host may go without one before its holder counts as dead (seconds).
BEAT_S, WATCH_S = 5.0, 30.0


class Lock:
    """Held from its creation to `release`."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            LockedError: a living process holds it; with its host and start time.
        """
        self.path = directory / "lock"
        self._mine = this_process()
        while not self._create():
            _clear_stale(self.path)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, unless another process has taken it over."""
        self._over.set()
        self._thread.join(WATCH_S)  # a disk that does not answer may hold it
        if self.is_mine():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._mine, file)
        return True

    def is_mine(self) -> bool:
        """Return whether no other process has taken it over."""
        return parse(_read(self.path)).get("token") == self._mine["token"]

    def _beat(self) -> None:
        temporary = self.path.with_name(f".tmp-lock-{self._mine['token']}")
        while not self._over.wait(BEAT_S):
            # The disk may be full or not answer for a moment: a watcher waits for several heartbeats.
            with contextlib.suppress(OSError):
                if not self.is_mine():
                    # No heartbeat was written for so long (a suspended machine) that another host took over.
                    log.error("%s: taken over by another process; this one saves and stops", self.path)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._mine["beats"] += 1
                try:
                    temporary.write_text(json.dumps(self._mine))
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)  # half of it, where the disk is full


def this_process() -> dict[str, Any]:
    """Return the fields by which other processes recognise this one, with a fresh token and a heartbeat count of 0."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _start_of(os.getpid()),
        "token": uuid.uuid4().hex,
        "beats": 0,
    }


def parse(text: str | bytes | None) -> dict[str, Any]:
    """Return the fields in the text of a lock or lease; empty if it is torn."""
    try:
        owner = json.loads(text or "")
        return owner if isinstance(owner, dict) else {}
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        return {}


def describe(owner: dict[str, Any]) -> str:
    """Return process, host and start time of a holder, for messages."""
    host, since = owner.get("host", "an unknown host"), owner.get("since", "an unknown time")
    return f"process {owner.get('pid', '?')} on {host} since {since}"


def is_gone(owner: dict[str, Any]) -> bool:
    """Return whether a holder of this host has ended. A restarted container reuses pids: the start time tells."""
    now, started = _start_of(owner["pid"]), owner.get("started")
    return now is None or (started is not None and now != started)


def _start_of(pid: int) -> str | None:
    """Return the start time of a process of this host, in ticks since boot; None if there is no such process."""
    try:
        # The name, in parentheses, may contain spaces; the start is the 22nd field, the 20th after the name.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _clear_stale(path: Path) -> None:
    """Remove the lock of a dead process, or raise LockedError."""
    if (text := _read(path)) is None:
        return  # released just now
    owner = parse(text)
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int) and owner["pid"]:
        gone = is_gone(owner)
    else:
        log.warning("%s: held by %s; watching it for %g s", path.parent, describe(owner), WATCH_S)
        gone = _has_no_heartbeat(path, text)
    if not gone:
        raise LockedError(
            f"{path.parent}: locked by {describe(owner)}; use another run.dir, wait for it, "
            f"or delete {path.name} in it if that process has ended"
        )
    if _remove(path, text):
        log.warning("%s: the lock of %s, which has ended, is taken over", path.parent, describe(owner))


def _has_no_heartbeat(path: Path, text: bytes) -> bool:
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_S / 2, WATCH_S / 10))
        if _read(path) != text:
            return _read(path) is None
    return True


def _remove(path: Path, text: bytes) -> bool:
    """Remove the lock with this text; one that another process has just created stays."""
    doomed = path.with_name(f".tmp-lock-{uuid.uuid4().hex}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return False
    same = doomed.read_bytes() == text
    if not same:
        with contextlib.suppress(FileExistsError):
            os.link(doomed, path)
    doomed.unlink()
    return same
