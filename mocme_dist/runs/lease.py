"""Single-writer lease of a run at a URL.

Each lease is an object `lease/N.json`, created exclusively; the highest N is the current writer. Stores behind fsspec
have no compare-and-swap, but can create an object only if it does not exist. The holder updates its lease with
heartbeats. A process that finds a lease without heartbeats for WATCH_S creates N + 1. A holder that sees a higher
number has lost the run, and commits nothing from then on. Numbers are never reused, so they also tell which checkpoints
belong to whom: a lease lists the checkpoints of earlier holders that its run descends from, and whatever one of those
commits later, after a long suspension, does not count.

A store cannot guarantee that a holder which has just checked its lease still holds it when its next write arrives. This
window is one small write, to a name that no other process writes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.data.storage import Storage
from mocme_dist.errors import LockedError, StorageError
from mocme_dist.runs.lock import describe, is_gone, parse, this_process

log = logging.getLogger(__name__)

FOLDER = "lease"
# Heartbeat period, and how long a lease of another machine may go without one before its holder counts as dead
# (seconds).
BEAT_S, WATCH_S = 10.0, 60.0
# Wait between creating a lease and checking it, for a store that lets two processes create the same object (seconds).
SETTLE_S = 0.5


@dataclass(frozen=True)
class Held:
    """The lease that a run is under, as its ranks know it."""

    number: int
    token: str

    def check(self, storage: Storage) -> None:
        """Verify that the lease is still the current one.

        Raises:
            LockedError: another run has taken over. StorageError: the storage does not answer.
        """
        number, owner = newest(storage)
        if number < self.number:
            raise StorageError(
                f"{storage.place}: {_name(self.number)}, the lease of this run, not found; was it deleted?"
            )
        if (number, owner.get("token")) != (self.number, self.token):
            raise LockedError(
                f"{storage.place}: taken over by {describe(owner)}; this run commits nothing there any more; "
                f"what it has not sent is in {storage.path}"
            )


def newest(storage: Storage) -> tuple[int, dict[str, Any]]:
    """Return number and fields of the current or last lease; 0 and an empty dictionary if there never was one."""
    number, text = _top(storage)
    return number, parse(text)


def counts(number: int, owner: dict[str, Any], made_by: int, name: str) -> bool:
    """Return whether a checkpoint that was made under lease `made_by` belongs to the run of the newest lease,
    `number`."""
    if made_by in (number, *owner.get("heir_of", [])):
        return True
    inherits = owner.get("inherits")
    return made_by < number and (inherits is None or name in inherits)


class Lease:
    """Held from its creation to `release`; a thread sends heartbeats."""

    def __init__(self, storage: RemoteStorage) -> None:
        """Take the lease.

        Raises:
            LockedError: a living run holds it; with its host and start time. StorageError: the storage does not answer.
        """
        # An object of its own, because another thread uses it.
        self.storage = RemoteStorage(storage.url)
        last, text = _top(self.storage)
        if last and not _is_free(self.storage, text):
            _wait_for_death(self.storage, last, text)
        self.before = last
        self._mine: dict[str, Any] = {
            **this_process(),
            "boot": _boot(),
            # Until `inherit` is called: the checkpoints that counted for the previous holder, and all that it made.
            "inherits": parse(text).get("inherits"),
            "heir_of": [*parse(text).get("heir_of", []), last],
            "ended": False,
        }
        self.held = Held(last + 1, self._mine["token"])
        self._writing = threading.Lock()
        if not self.storage.put_if_absent(_name(self.held.number), self._text()):
            raise LockedError(f"{storage.place}: another run has just taken it; wait for it or use another run.dir")
        time.sleep(SETTLE_S)
        self.held.check(self.storage)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def inherit(self, names: list[str]) -> None:
        """Write down from which checkpoints this run descends; others of earlier holders do not count from now on.

        Raises:
            LockedError, StorageError: see `Held.check`.
        """
        self.held.check(self.storage)
        with self._writing:
            self._mine |= {"inherits": names, "heir_of": []}
            self.storage.put(_name(self.held.number), self._text())

    def release(self) -> None:
        """End the lease. Its object stays, so that its number is not reused; earlier ones are removed."""
        self._over.set()
        self._thread.join(WATCH_S)  # a store that does not answer may hold it
        try:
            self.held.check(self.storage)
            self._mine["ended"] = True
            self.storage.put(_name(self.held.number), self._text())
            for name in self.storage.list(f"{FOLDER}/*.json"):
                if name != _name(self.held.number):
                    self.storage.remove(name)
        except LockedError:
            return
        except StorageError as error:
            log.warning("the lease could not be released; another run will wait %g s for this one: %s", WATCH_S, error)

    def _text(self) -> bytes:
        return json.dumps(self._mine, indent=1).encode()

    def _beat(self) -> None:
        failing = False
        while not self._over.wait(BEAT_S):
            try:
                self.held.check(self.storage)
                with self._writing:
                    self._mine["beats"] += 1
                    self.storage.put(_name(self.held.number), self._text())
                failing = False
            except LockedError as error:
                # No heartbeat arrived for so long (no network, a suspended machine) that another machine took over.
                log.error("%s; this run stops", error)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except StorageError as error:
                if not failing:
                    log.warning("the heartbeat of the lease could not be written: %s", error)
                failing = True


def _name(number: int) -> str:
    return f"{FOLDER}/{number:010d}.json"


def _top(storage: Storage) -> tuple[int, bytes | None]:
    names = [name for name in storage.list(f"{FOLDER}/*.json") if Path(name).stem.isdecimal()]
    if not names:
        return 0, None
    name = max(names)
    return int(Path(name).stem), storage.get(name)


def _boot() -> str | None:
    """Return what tells apart two machines of one name, and a machine from itself after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _is_free(storage: Storage, text: bytes | None) -> bool:
    """Return whether the holder has released the lease, or was a process of this machine that has ended."""
    owner = parse(text)
    if owner.get("ended"):
        return True
    is_here = (owner.get("host"), owner.get("boot")) == (socket.gethostname(), _boot())
    if not is_here or not isinstance(owner.get("pid"), int) or not is_gone(owner):
        return False
    log.warning("%s: the lease of %s, which has ended, is taken over", storage.place, describe(owner))
    return True


def _wait_for_death(storage: Storage, number: int, text: bytes | None) -> None:
    """Watch a lease until it has gone without a heartbeat for WATCH_S, or raise LockedError."""
    holder = describe(parse(text))
    log.warning("%s: held by %s; watching it for %g s", storage.place, holder, WATCH_S)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_S / 2, WATCH_S / 10))
        now, read = _top(storage)
        if (now, read) != (number, text):
            if now == number and parse(read).get("ended"):
                return
            raise LockedError(f"{storage.place}: a run of {holder} is active there; use another run.dir or wait for it")
    log.warning("%s: the lease of %s, without a heartbeat for %g s, is taken over", storage.place, holder, WATCH_S)
