"""Memory of this process and machine: glibc's allocator, and how much is free. Needs the standard library alone."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
# The largest threshold that glibc accepts.
_MAPPED_BYTES = 32 << 20


def keep_pages() -> None:
    """Make the allocator keep the pages of large tensors for the next ones; called once by a worker process.

    By default glibc maps and unmaps each of them. The page faults cost about half of a training step on a CPU, and an
    eighth of a text encoder's time in an actor's thread.
    """
    _tune({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1})


def map_large_tensors() -> None:
    """Make the allocator map tensors of 32 MiB and more one by one, and keep the pages of smaller ones as before.

    For models whose parameters are that large: in a heap that keeps pages, values, gradients and copies of them leave
    gaps into which the next ones do not fit.
    """
    _tune({_M_MMAP_THRESHOLD: _MAPPED_BYTES, _M_MMAP_MAX: 65_536})


def _tune(settings: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
    for parameter, value in settings.items():
        mallopt(parameter, value)


def return_pages() -> None:
    """Return unused pages that the allocator keeps to the system, between phases with tensors of different shapes.

    Memory that a step freed is fragmented, and tensors of a ranking do not fit into it: a rank would hold both.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory() -> int:
    """Return the bytes that processes of this machine can still allocate, within the limit of their container."""
    meminfo = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no limit is "max"
        return free
