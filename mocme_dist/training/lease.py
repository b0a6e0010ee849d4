"""Who writes a run at a URL: numbered objects, each made once, of which the highest holds.

A store behind fsspec compares and swaps nothing, but it can make an object only where there is none. So `lease/N.json` is
made in that way, by one; its maker alone freshens it; who finds it standing still makes N + 1. Whoever sees another number
than his own on top has lost the run and commits nothing any more. Numbers are never used again, so they also tell
which checkpoints are whose: a lease says from which checkpoints of earlier holders its run descends, and what one of them
commits later, woken from a long sleep, does not count.

What a store cannot promise: that a holder that has just looked still holds when its next write arrives. That window is one
small write, of a name that nobody else writes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocme_dist.data.storage import Mirror
from mocme_dist.errors import LockedError, StorageError
from mocme_dist.training.lock import start_of

log = logging.getLogger(__name__)

FOLDER = "lease"
# A holder freshens its lease so often; another believes it dead after a time in which it would have done so often.
BEAT_S, WATCH_S = 10.0, 60.0
# After making it, for a store that lets two make the same object: the later one stays.
SETTLE_S = 0.5


@dataclass(frozen=True)
class Held:
    """What a rank needs to know of the lease that its run is under."""

    number: int
    token: str

    def check(self, mirror: Mirror) -> None:
        """See that it still holds.

        Raises:
            LockedError: another run has taken over. StorageError: the storage does not answer.
        """
        number, owner = newest(mirror)
        if number < self.number:
            raise StorageError(f"{mirror.url}: {_name(self.number)} is not there, by which this run holds it; was it deleted?")
        if (number, owner.get("token")) != (self.number, self.token):
            raise LockedError(
                f"{mirror.url}: taken over by {_who(owner)}; this run commits nothing there any more; "
                f"what it has not sent lies in {mirror.path}"
            )


def newest(mirror: Mirror) -> tuple[int, dict[str, Any]]:
    """Number and text of the lease that holds, or held last; 0 and nothing where there never was one."""
    number, text = _top(mirror)
    return number, _owner(text)


def counts(number: int, owner: dict[str, Any], made_by: int, name: str) -> bool:
    """Whether a checkpoint, made under lease `made_by`, is part of the run of the lease on top, `number`."""
    if made_by in (number, *owner.get("heir_of", [])):
        return True
    inherits = owner.get("inherits")
    return made_by < number and (inherits is None or name in inherits)


class Lease:
    """Held from its making to `release`, by a thread that freshens it."""

    def __init__(self, mirror: Mirror) -> None:
        """Take it.

        Raises:
            LockedError: a living run has it, named with host and start time. StorageError: the storage does not answer.
        """
        # A mirror of its own: it is used from another thread.
        self.mirror = Mirror(mirror.url)
        last, text = _top(self.mirror)
        if last and not _is_free(self.mirror, text):
            _wait_for_death(self.mirror, last, text)
        self.before = last
        self.held = Held(last + 1, uuid.uuid4().hex)
        self._mine: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": _boot(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "started": start_of(os.getpid()),
            "token": self.held.token,
            "beats": 0,
            # Until `inherit` says which: those that counted for the holder before, and all that it made itself.
            "inherits": _owner(text).get("inherits"),
            "heir_of": [*_owner(text).get("heir_of", []), last],
            "ended": False,
        }
        self._writing = threading.Lock()
        if not self.mirror.write(_name(self.held.number), self._text(), new=True):
            raise LockedError(f"{mirror.url}: another run took it in this moment; wait for it or use another run.dir")
        time.sleep(SETTLE_S)
        self.held.check(self.mirror)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def inherit(self, names: list[str]) -> None:
        """Say from which checkpoints this run descends; others of earlier holders do not count from now on.

        Raises:
            LockedError, StorageError: see `Held.check`.
        """
        self.held.check(self.mirror)
        with self._writing:
            self._mine |= {"inherits": names, "heir_of": []}
            self.mirror.write(_name(self.held.number), self._text())

    def release(self) -> None:
        """Let go. The object stays, so that its number is not used again; those below it go."""
        self._over.set()
        self._thread.join()
        try:
            self.held.check(self.mirror)
            self._mine["ended"] = True
            self.mirror.write(_name(self.held.number), self._text())
            for name in self.mirror.listing(f"{FOLDER}/*.json"):
                if name != _name(self.held.number):
                    self.mirror.remove(name)
        except LockedError:
            return
        except StorageError as error:
            log.warning("the lease is not given back; another run waits %g s for this one: %s", WATCH_S, error)

    def _text(self) -> bytes:
        return json.dumps(self._mine, indent=1).encode()

    def _beat(self) -> None:
        failing = False
        while not self._over.wait(BEAT_S):
            try:
                self.held.check(self.mirror)
                with self._writing:
                    self._mine["beats"] += 1
                    self.mirror.write(_name(self.held.number), self._text())
                failing = False
            except LockedError as error:
                # It was silent for so long (no network, a suspended machine) that another machine took the run over.
                log.error("%s; this one stops", error)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except StorageError as error:
                if not failing:
                    log.warning("the lease could not be freshened: %s", error)
                failing = True


def _name(number: int) -> str:
    return f"{FOLDER}/{number:010d}.json"


def _top(mirror: Mirror) -> tuple[int, bytes | None]:
    names = [name for name in mirror.listing(f"{FOLDER}/*.json") if Path(name).stem.isdecimal()]
    if not names:
        return 0, None
    name = max(names)
    return int(Path(name).stem), mirror.read(name)


def _owner(text: bytes | None) -> dict[str, Any]:
    """What a lease says; empty when it is torn."""
    try:
        owner = json.loads(text or b"")
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')} since {owner.get('since', 'an unknown time')}"


def _boot() -> str | None:
    """What tells two machines of one name apart, and a machine from itself after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _is_free(mirror: Mirror, text: bytes | None) -> bool:
    """Whether its holder has let go, or was a process of this machine that is gone."""
    owner = _owner(text)
    if owner.get("ended"):
        return True
    pid, started = owner.get("pid"), owner.get("started")
    if (owner.get("host"), owner.get("boot")) != (socket.gethostname(), _boot()) or not isinstance(pid, int):
        return False
    now = start_of(pid)
    gone = now is None or (started is not None and now != started)
    if gone:
        log.warning("%s: the lease of %s, which is gone, is taken over", mirror.url, _who(owner))
    return gone


def _wait_for_death(mirror: Mirror, number: int, text: bytes | None) -> None:
    """Watch a lease until it has stood still for long enough, or raise LockedError."""
    who = _who(_owner(text))
    log.warning("%s: held by %s; watching it for %g s", mirror.url, who, WATCH_S)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_S / 2, WATCH_S / 10))
        now, read = _top(mirror)
        if (now, read) != (number, text):
            if now == number and _owner(read).get("ended"):
                return
            raise LockedError(f"{mirror.url}: a run of {who} is going on there; use another run.dir or wait for it")
    log.warning("%s: the lease of %s, silent for %g s, is taken over", mirror.url, who, WATCH_S)
