"""The ranks of a run: who am I, on which device, and the few collectives that others need.

There is always a process group, also for one process, so that no code has a branch for it. A second group of gloo
carries the ids of coming steps from a background thread: its collectives never mix with those of the step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mocme_dist import errors
from mocme_dist.errors import RankError
from mocme_dist.parallel.shared import SharedSwap, join

log = logging.getLogger(__name__)

Value = TypeVar("Value")
_HERE = "mocme_dist/rank 0 is here"
_LONG, _SAY_S = timedelta(days=30), 60
# What a rank may read of others for a sum: all that each of them has. A ring moves twice what one has, however many there are.
SUM_BYTES = 16 << 20


@dataclass(frozen=True)
class Comm:
    """This process among the others.

    Attributes:
        ahead: the background thread's own group.
        swap, swap_ahead: pass tensors on the CPU through memory, where all ranks are on one machine; of the step, and
            of the background thread. What they do not take goes through the process groups.
    """

    rank: int
    world_size: int
    device: torch.device
    ahead: dist.ProcessGroup
    swap: SharedSwap | None = None
    swap_ahead: SharedSwap | None = None

    def sum(self, value: Tensor) -> Tensor:
        """`value` added over all ranks, as a new tensor without a gradient."""
        if self.swap is not None and value.device.type == "cpu" and value.nbytes * (self.world_size - 1) <= SUM_BYTES:
            return self.swap.sum(value.detach())
        total = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any rank passes True."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in order, on every rank; for small plain objects."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank; for small plain objects."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.sum(torch.zeros(1, device=self.device))

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank when any rank passes an error: its own there, the first failing rank's kind elsewhere."""
        found = self.gather(None if error is None else (type(error).__name__, f"rank {self.rank}: {error}"))
        if error is not None:
            raise error
        if failed := [pair for pair in found if pair]:
            kind = getattr(errors, failed[0][0], RankError)
            raise kind("; ".join(message for _, message in failed))


def pick_device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@contextmanager
def communication(timeout_s: int) -> Iterator[Comm]:
    """Join the process group that a launcher has made or described in the environment; alone otherwise.

    Under Ray Train the group exists already; under torchrun RANK and MASTER_ADDR say how to join, and the others wait
    for rank 0, however long it prepares; else this process is the only rank. A group made here is destroyed at the end.
    """
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    made_here = not dist.is_initialized()
    if made_here:
        backend, timeout = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            store, rank, world_size = _meet()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        ahead = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        comm = Comm(dist.get_rank(), dist.get_world_size(), device, ahead)
        with ExitStack() as stack:
            swap, swap_ahead = (_join_memory(comm, stack, timeout_s) for _ in range(2))
            yield replace(comm, swap=swap, swap_ahead=swap_ahead)
    finally:
        if made_here:
            dist.destroy_process_group()


def _join_memory(comm: Comm, stack: ExitStack, timeout_s: int) -> SharedSwap | None:
    """A way through memory, closed with `stack`; two of them never meet."""
    if comm.world_size == 1 or comm.device.type != "cpu":
        return None
    way = join(comm.rank, comm.world_size, timeout_s, comm.gather)
    if way is not None:
        stack.callback(way.close)
    return way


def _meet() -> tuple[Any, int, int]:
    """The ranks' common store, this rank and how many there are; comes back when rank 0 is here as well.

    Rank 0 packs and extracts before it comes, for hours perhaps; a group's own time limit would end the others meanwhile.
    A rank 0 that fails is their launcher's to notice: torchrun ends them.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=_LONG))
    if rank == 0:
        store.set(_HERE, "")
    while rank != 0:
        try:
            store.wait([_HERE], timedelta(seconds=_SAY_S))
            break
        except dist.DistStoreError:
            log.info("rank %d: waiting for rank 0, which prepares the data", rank)
    return store, rank, world_size
