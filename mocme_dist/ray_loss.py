"""Ends a command with its own exit code when Ray dies.

Ray's core ends a driver whose raylet or GCS has died with exit code 1, without an exception or cleanup. A thread
detects this first: the death of the raylet's process by descriptors that wake the thread at once, and that of the
GCS, which may be on another machine and may come back, by its port. It calls the callbacks registered by `telling`,
prints one line and exits. A raylet that got SIGTERM announces its end before it closes a connection; `end_if_lost`
recognises the error that this makes of running work. Ray's core exits within some hundredths of a second from then on,
so nothing slow happens in between.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from mocme_dist.errors import RankError, error_block

# Ray itself waits a minute for a GCS.
GCS_SILENT_S = 30.0
# Interval of checks of the flag, and of the GCS.
_LOOK_S = 0.5
_ASK_S = 3.0
_GONE = "its raylet on this machine is gone"

_tell: list[Callable[[RankError], None]] = []
_leaving = threading.Event()
_ending = threading.Lock()


@contextmanager
def watching() -> Iterator[None]:
    """Watch the Ray that this process joins or starts within the block."""
    _leaving.clear()
    thread = threading.Thread(target=_watch, name="ray-loss", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving()
        thread.join(_LOOK_S)


@contextmanager
def telling(callback: Callable[[RankError], None]) -> Iterator[None]:
    """Call `callback` before the process ends if Ray is lost within the block."""
    _tell.append(callback)
    try:
        yield
    finally:
        _tell.remove(callback)


def leaving() -> None:
    """Declare that Ray's end is intended from here on."""
    _leaving.set()


def end_if_lost(error: BaseException) -> None:
    """End the process if `error` says that this process is dead, as Ray says of all processes of a lost raylet."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        own = ray._private.worker.global_worker.worker_id.hex()
        if "owner has died" in str(error) and own in str(error):
            _end(_GONE)


def _watch() -> None:
    while not _leaving.wait(_LOOK_S):
        ray = sys.modules.get("ray")
        if ray is not None and getattr(ray, "is_initialized", bool)():
            break
    else:
        return
    node = sys.modules["ray"]._private.worker.global_worker.node
    if node is None:  # a Ray client, whose server is the driver
        return
    host, _, port = node.gcs_address.rpartition(":")
    answered = asked = time.monotonic()
    with _process_behind(node.raylet_socket_name, node.plasma_store_socket_name) as raylet:
        while not _leaving.is_set():
            if not raylet:
                _leaving.wait(_LOOK_S)
            elif select.select(raylet, [], [], _LOOK_S)[0]:
                _end(_GONE)
            if time.monotonic() - asked < _ASK_S:
                continue
            asked = time.monotonic()
            if _listens(host.strip("[]"), int(port)):
                answered = asked
            elif asked - answered > GCS_SILENT_S:
                _end(f"its GCS at {node.gcs_address} has not answered for {GCS_SILENT_S:g} s")


@contextmanager
def _process_behind(*names: str) -> Iterator[list[int]]:
    """Yield descriptors that become readable when the process listening at Unix sockets ends; none if not visible.

    Some are connections to it: a raylet that got SIGTERM closes its connections some time before its process ends, and
    by then Ray's core may have ended this process.
    """
    with ExitStack() as stack:
        handles: list[int] = []
        with suppress(OSError):
            for name in names:
                peer = stack.enter_context(socket.socket(socket.AF_UNIX))
                peer.connect(name)
                handles.append(peer.fileno())
            pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid:  # 0 for a process of another container
                handles.append(os.pidfd_open(pid))
                stack.callback(os.close, handles[-1])
        yield handles


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ASK_S).close()
    except OSError:
        return False
    return True


def _end(what: str) -> None:
    if _leaving.is_set():
        return
    with _ending:  # never released: this thread ends the process
        error = RankError(f"Ray was lost: {what}; restart it if it is yours, and run the same command to continue")
        for callback in _tell:
            callback(error)
        print(error_block(error), file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # the processes of a local Ray are bound to this one, and end with it
