"""Ranks of one machine pass tensors through memory that they share: no copies by the kernel, no thread that makes them.

A rank writes what it has for the others into a slot of its own, tells each of them through a pipe where its part lies,
and reads their parts where they wrote them. Slots are memory files without a name: whatever ends a process, nothing
stays behind, and the size of /dev/shm does not matter. A process that is gone has closed its pipes, so the others
notice at once. `join` finds out whether all ranks are on one machine; where they are not, torch.distributed serves.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import mmap
import os
import secrets
import select
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocme_dist.errors import RankError

log = logging.getLogger(__name__)

# What a slot's file has from the beginning; pages that nobody has touched take no memory.
_SMALLEST = 1 << 20
# The longest that poll can wait, in milliseconds: 24 days.
_LONGEST_MS = 2**31 - 1
# Parts begin at multiples of this, so that numbers of any type may begin there, in a cache line of their own.
_ALIGN = 64
# Where a part begins, its size, the size of the slot's file. Short enough for a pipe to take and to give it whole.
_MESSAGE = struct.Struct("=qqq")


class _Offer(NamedTuple):
    """A rank's files as others find them: N of /proc/PID/fd/N, and what this link reads when it is the one that is meant."""

    pid: int
    slots: list[tuple[int, str]]
    inboxes: list[tuple[int, str]]


class _Slot:
    """A memory file and its bytes as a tensor; the rank that owns it makes it larger, the others follow."""

    def __init__(self, file: FileIO, own: bool) -> None:
        """Seen from the beginning, while ranks can still do without: a view takes a file descriptor of its own."""
        self.file = file
        with torch.inference_mode(False):
            self.bytes = torch.empty(0, dtype=torch.uint8)
        (self.grow if own else self.follow)(_SMALLEST)

    def grow(self, size: int) -> None:
        """Make room for `size` bytes at least; what lies there need not stay."""
        if size > len(self.bytes):
            size = max(_SMALLEST, 1 << (size - 1).bit_length())
            os.ftruncate(self.file.fileno(), size)
            self.follow(size)

    def follow(self, size: int) -> None:
        """See `size` bytes, which the file has."""
        if size > len(self.bytes):
            # It may be a ranking that needs more room; a training could not write into what inference mode has made.
            with torch.inference_mode(False):
                self.bytes = torch.frombuffer(mmap.mmap(self.file.fileno(), size), dtype=torch.uint8)


class SharedSwap:
    """Turns in which every rank has something for every other one; collective, in the same order on all ranks.

    A turn is `outgoing`, filling what it gives, `send`, `incoming`, and using what that gives before the next `send`.

    Slots are two, for even and odd turns, and no rank waits for readers. It fills a slot again two turns later, say in
    turn n + 2. Its turn n + 1 has ended then, so all others have sent in turn n + 1; each did so after it had used what
    turn n gave.
    """

    def __init__(self, rank: int, timeout_s: float, slots: list[list[_Slot]], inboxes: list[FileIO | None], outboxes: list[FileIO | None]):
        """Made by `join`.

        Args:
            slots: of each rank. inboxes, outboxes: ends of the pipes from and to each rank, None at this rank's place.
        """
        self.rank, self.world_size, self._timeout_s = rank, len(slots), timeout_s
        self._slots, self._inboxes, self._outboxes = slots, inboxes, outboxes
        self._turn = 0
        self._parts: list[tuple[int, int]] = []

    def outgoing(self, counts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Flat tensors of so many numbers for each rank, to be filled; this rank's own is empty."""
        sizes = [0 if rank == self.rank else count * dtype.itemsize for rank, count in enumerate(counts)]
        ends = list(itertools.accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes))
        self._parts = list(zip([0, *ends[:-1]], sizes, strict=True))
        slot = self._slots[self.rank][self._turn % 2]
        slot.grow(ends[-1])
        return [slot.bytes[begin : begin + size].view(dtype) for begin, size in self._parts]

    def send(self) -> None:
        """Tell the others that their parts are there."""
        size = len(self._slots[self.rank][self._turn % 2].bytes)
        for rank, outbox in enumerate(self._outboxes):
            if outbox is not None:
                try:
                    outbox.write(_MESSAGE.pack(*self._parts[rank], size))
                except BrokenPipeError:
                    raise self._gone(rank) from None

    def incoming(self, dtype: torch.dtype) -> list[Tensor]:
        """What each rank has for this one, flat, where it wrote it; this rank's own is empty. Waits for all.

        Raises:
            RankError: a rank is gone, or has sent nothing for as long as a collective may take.
        """
        found = []
        for rank, (inbox, slots) in enumerate(zip(self._inboxes, self._slots, strict=True)):
            begin, size, file_size = (0, 0, 0) if inbox is None else _MESSAGE.unpack(self._hear(rank, inbox))
            slot = slots[self._turn % 2]
            slot.follow(file_size)
            found.append(slot.bytes[begin : begin + size].view(dtype))
        self._turn += 1
        return found

    def sum(self, value: Tensor) -> Tensor:
        """`value` added over all ranks, in their order, so that all have the same bits."""
        slot, size = self._slots[self.rank][self._turn % 2], value.nbytes
        slot.grow(size)
        mine = slot.bytes[:size].view(value.dtype).view(value.shape)
        mine.copy_(value)
        self._parts = [(0, size)] * self.world_size
        self.send()
        values = [part.view(value.shape) if rank != self.rank else mine for rank, part in enumerate(self.incoming(value.dtype))]
        total = values[0] + values[1]
        for other in values[2:]:
            total += other
        return total

    def close(self) -> None:
        """Leave; the others may still read what they were sent."""
        for file in (*self._inboxes, *self._outboxes, *(slot.file for slots in self._slots for slot in slots)):
            if file is not None:
                file.close()

    def _hear(self, rank: int, inbox: FileIO) -> bytes:
        poll = select.poll()
        poll.register(inbox, select.POLLIN)
        if not poll.poll(min(1e3 * self._timeout_s, _LONGEST_MS)):
            raise RankError(f"rank {self.rank}: timed out waiting for rank {rank}: it sent nothing for {self._timeout_s:g} s")
        message = inbox.read(_MESSAGE.size)
        if not message:
            raise self._gone(rank)
        return message

    def _gone(self, rank: int) -> RankError:
        return RankError(f"rank {self.rank}: connection closed by peer: rank {rank} is gone")


def join(rank: int, world_size: int, timeout_s: float, gather: Callable[[Any], list[Any]]) -> SharedSwap | None:
    """Share memory with all ranks; with none where one of them cannot: it is on another machine, or its system forbids it.

    Collective.

    Args:
        timeout_s: how long a rank may wait for another one.
        gather: gives the values of all ranks.
    """
    with ExitStack() as files:
        own = _offer(rank, world_size, files)
        offers = gather(None if own is None else own.offer)
        found = None if own is None or None in offers else _accept(rank, offers, files)
        if not all(gather(found is not None)) or own is None or found is None:
            return None
        # A pipe ends with the process that writes into it only when nobody else holds that end.
        own.ends.close()
        files.pop_all()
    slots, outboxes = found
    return SharedSwap(rank, timeout_s, [own.slots if other is None else other for other in slots], own.inboxes, outboxes)


class _Own(NamedTuple):
    """This rank's files: two slots, the inboxes by rank, and the ends of these that others write into, until they have opened them."""

    offer: _Offer
    slots: list[_Slot]
    inboxes: list[FileIO | None]
    ends: ExitStack


def _offer(rank: int, world_size: int, files: ExitStack) -> _Own | None:
    """Make this rank's files; None where the system has no such thing."""
    ends = files.enter_context(ExitStack())
    try:
        if sys.platform != "linux":
            raise OSError("memory files without a name are of Linux")
        name = f"mocme-{secrets.token_hex(16)}"  # no other file of this machine, or of another, is called so
        slots = [_Slot(files.enter_context(FileIO(_memory_file(f"{name}-{turn}"), "r+")), own=True) for turn in range(2)]
        inboxes: list[FileIO | None] = []
        offered: list[tuple[int, str]] = []
        for other in range(world_size):
            pair = os.pipe() if other != rank else None
            inboxes.append(None if pair is None else files.enter_context(FileIO(pair[0], "r")))
            offered.append((0, "") if pair is None else _link(ends.enter_context(FileIO(pair[1], "w"))))
        offer = _Offer(os.getpid(), [_link(slot.file) for slot in slots], offered)
    except OSError as error:
        log.debug("rank %d: no shared memory: %s", rank, error)
        return None
    return _Own(offer, slots, inboxes, ends)


def _memory_file(name: str) -> int:
    """Descriptor of a new memory file, closed on exec.

    A Python that was built for an old glibc, as conda's and uv's are, has no `os.memfd_create`, though the system has it.

    Raises:
        OSError: the system has no such thing, or refuses it.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    create = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    found = -1 if create is None else int(create(name.encode(), 1))  # MFD_CLOEXEC
    if found < 0:
        raise OSError(ctypes.get_errno() or errno.ENOSYS, "memfd_create")
    return found


def _link(file: FileIO) -> tuple[int, str]:
    return file.fileno(), str(Path(f"/proc/self/fd/{file.fileno()}").readlink())


def _accept(rank: int, offers: list[_Offer], files: ExitStack) -> tuple[list[list[_Slot] | None], list[FileIO | None]] | None:
    """Open what the others offer, by rank; None where one of the files is not to be had."""
    slots: list[list[_Slot] | None] = []
    outboxes: list[FileIO | None] = []
    try:
        for other, offer in enumerate(offers):
            opened = None if other == rank else [files.enter_context(_open(offer.pid, *slot, "r+")) for slot in offer.slots]
            slots.append(None if opened is None else [_Slot(file, own=False) for file in opened])
            outboxes.append(None if other == rank else files.enter_context(_open(offer.pid, *offer.inboxes[rank], "w")))
    except OSError as error:
        log.debug("rank %d: no shared memory with rank %d: %s", rank, other, error)
        return None
    return slots, outboxes


def _open(pid: int, fd: int, link: str, mode: str) -> FileIO:
    """A file of another process.

    Raises:
        OSError: there is no such process on this machine, the file is another one, or it may not be opened.
    """
    path = Path(f"/proc/{pid}/fd/{fd}")
    found = str(path.readlink())
    if found != link:  # that process is of another machine, or of another container
        raise OSError(f"{path} is {found}, not {link}")
    return FileIO(path, mode)
