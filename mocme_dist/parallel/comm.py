"""The ranks of a run: this process's rank and device, and the few collectives that other packages need.

There is always a process group, also for one process, so that no code needs a branch for it. A second gloo group
carries the ids of coming steps from a background thread, so its collectives never mix with those of the step.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mocme_dist import environment, errors
from mocme_dist.errors import ConfigError, RankError
from mocme_dist.parallel.meeting import join_store, listen, listen_beside, open_store

log = logging.getLogger(__name__)

Value = TypeVar("Value")
_HERE = "mocme_dist/rank 0 is here"
_LONG, _SAY_S = timedelta(days=30), 60


@dataclass(frozen=True)
class Comm:
    """This process and its group.

    Attributes:
        ahead: the background thread's own group.
    """

    rank: int
    world_size: int
    device: torch.device
    ahead: dist.ProcessGroup

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over all ranks, as a new tensor without a gradient."""
        total = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether any rank passes True."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in order, on every rank; for small plain objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value on every rank; for small plain objects."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.sum(torch.zeros(1, device=self.device))

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank if any passes an error: its own there, the first failing rank's kind elsewhere."""
        found = self.gather(None if error is None else (type(error).__name__, f"rank {self.rank}: {error}"))
        if error is not None:
            raise error
        if failed := [pair for pair in found if pair]:
            kind = getattr(errors, failed[0][0], RankError)
            raise kind("; ".join(message for _, message in failed))


def single() -> Comm:
    """Return a single rank on the CPU without a process group; its sums are its own values."""
    return Comm(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def pick_device(gpus: float | Literal["auto"] = "auto") -> torch.device:
    """Return the device of this rank.

    Args:
        gpus: GPUs per rank, as launch.gpus_per_worker; 0 means the CPU, "auto" a GPU if torch finds one.

    Raises:
        ConfigError: a GPU is requested and torch finds none.
    """
    if gpus == 0 or (gpus == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"launch.gpus_per_worker={gpus:g}: torch finds no GPU on {socket.gethostname()}; "
            "install a torch with CUDA there, or set launch.gpus_per_worker=0"
        )
    return torch.device("cuda", environment.local_rank() % torch.cuda.device_count())


@contextmanager
def communication(timeout_s: int, gpus: float | Literal["auto"] = "auto") -> Iterator[Comm]:
    """Join the process group that a launcher made or described in the environment, or make one of a single rank.

    Under Ray Train the group exists already. Under torchrun RANK and MASTER_ADDR say how to join, and the others wait
    for rank 0, however long it prepares. A group made here is destroyed at the end.

    Args:
        timeout_s: seconds after which a waiting collective fails.
        gpus: see `pick_device`.
    """
    device = pick_device(gpus)
    made_here = not dist.is_initialized()
    if made_here:
        if environment.has_launcher():
            store, rank, world_size = _meet()
        else:
            listen_beside("127.0.0.1")
            store, rank, world_size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
        make_group(device, store, rank, world_size, timeout_s)
    elif device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        ahead = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        yield Comm(dist.get_rank(), dist.get_world_size(), device, ahead)
    finally:
        if made_here:
            dist.destroy_process_group()


def make_group(device: torch.device, store: Any, rank: int, world_size: int, timeout_s: int) -> None:
    """Make the process group of all ranks; collective."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _meet() -> tuple[Any, int, int]:
    """Return the ranks' common store, this rank and the world size, once rank 0 has arrived.

    Rank 0 packs and extracts first, perhaps for hours; a process group's own time limit would end the others
    meanwhile. If rank 0 fails, the launcher notices: torchrun ends the others.
    """
    listen_beside(environment.master_host())
    if environment.launcher_serves_store():
        store, rank, world_size = next(rendezvous("env://", timeout=_LONG))
    else:
        rank, world_size = environment.rank_and_world_size()
        host, port = environment.master_host(), environment.master_port()
        store = open_store(listen(host, port), _LONG) if rank == 0 else join_store(host, port, _LONG)
    if rank == 0:
        store.set(_HERE, "")
    while rank != 0:
        try:
            store.wait([_HERE], timedelta(seconds=_SAY_S))
            break
        except dist.DistStoreError:
            log.info("rank %d: waiting for rank 0, which prepares the data", rank)
    return store, rank, world_size
