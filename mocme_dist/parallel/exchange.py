"""Plans which rank needs rows of which owner, and moves D numbers per entity between ranks.

A rank requests ascending unique ids; ranges are contiguous, so its requests form one run per owner. An owner computes a
requested row once and sends it once to each rank that requested it. Ids are exchanged ahead of the step on a group of
their own (`plan_route`); vectors are exchanged within the step (`Exchange`), and their gradients in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mocme_dist.parallel.comm import Comm
from mocme_dist.partition import RowPartition


@dataclass(frozen=True)
class Route:
    """One step's exchange, seen from one rank.

    Attributes:
        rows_V: (V,) ascending unique local rows of this rank that any rank requested.
        send_A: (A,) position in rows_V of each vector that is sent, in order of the receiving ranks.
        send_counts: number of vectors sent to each rank; they sum to A.
        recv_counts: number of vectors received from each rank; they sum to U.
        rank: this rank.
        stop: whether any rank asked to end the run when it planned; the same on every rank.
    """

    rows_V: Tensor
    send_A: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    rank: int
    stop: bool = False

    def moved(self, send: Callable[[Tensor], Tensor]) -> Route:
        """Return the route with its tensors moved by `send`."""
        return replace(self, rows_V=send(self.rows_V), send_A=send(self.send_A))

    @property
    def sent_vectors(self) -> int:
        """Number of vectors that this rank sends to other ranks."""
        return sum(self.send_counts) - self.send_counts[self.rank]


def plan_route(ids_U: np.ndarray, partition: RowPartition, comm: Comm, stop: bool = False) -> Route:
    """Tell every owner which of its rows this rank needs, and learn which of its own rows are needed.

    Collective over `comm.ahead`, on the CPU; called by the background thread, ahead of the step.

    Args:
        ids_U: (U,) ascending unique global ids.
        stop: whether this rank asks to end the run; it goes with the counts, so that no step has to agree on it.
    """
    first, _ = partition.bounds(comm.rank)
    cuts = np.searchsorted(ids_U, partition.starts())
    recv_counts = np.diff(cuts).tolist()
    if comm.world_size == 1:
        rows_V = torch.from_numpy(ids_U)
        return Route(rows_V, torch.arange(len(ids_U)), recv_counts, recv_counts, 0, stop)
    ids_A, send_counts, stop = _request(torch.from_numpy(np.ascontiguousarray(ids_U)), recv_counts, comm, stop)
    rows_V, send_A = torch.unique(ids_A - first, sorted=True, return_inverse=True)
    return Route(rows_V, send_A, send_counts, recv_counts, comm.rank, stop)


def _request(ids_U: Tensor, recv_counts: list[int], comm: Comm, stop: bool) -> tuple[Tensor, list[int], bool]:
    """Send each owner its ids; return the (A,) ids requested from this rank, the number from each rank, and whether any
    rank asks to stop."""
    counts = torch.empty(comm.world_size, 2, dtype=torch.int64)
    mine = torch.tensor([[count, int(stop)] for count in recv_counts], dtype=torch.int64)
    dist.all_to_all_single(counts, mine, group=comm.ahead)
    send_counts = counts[:, 0].tolist()
    ids_A = torch.empty(sum(send_counts), dtype=torch.int64)
    dist.all_to_all_single(ids_A, ids_U, send_counts, recv_counts, group=comm.ahead)
    return ids_A, send_counts, bool(counts[:, 1].any())


class Exchange(torch.autograd.Function):
    """Moves vectors from owners to the ranks that requested them, and gradients back, added up at the owner."""

    @staticmethod
    def forward(ctx, z_VD: Tensor, route: Route) -> Tensor:  # type: ignore[no-untyped-def]
        """Send this rank's (V, D) vectors; return the (U, D) requested ones, in the order of the requested ids."""
        ctx.route, ctx.num_rows = route, len(z_VD)
        return _swap(z_VD.index_select(0, route.send_A), route.recv_counts, route.send_counts)

    @staticmethod
    def backward(ctx, grad_UD: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """Send (U, D) gradients of the requested vectors; return (V, D) gradients of this rank's vectors."""
        route: Route = ctx.route
        grad_AD = _swap(grad_UD.contiguous(), route.send_counts, route.recv_counts)
        return grad_UD.new_zeros(ctx.num_rows, grad_UD.shape[1]).index_add(0, route.send_A, grad_AD), None


def _swap(value: Tensor, recv_counts: list[int], send_counts: list[int]) -> Tensor:
    out = value.new_empty(sum(recv_counts), *value.shape[1:])
    dist.all_to_all_single(out, value, recv_counts, send_counts)
    return out


def exchange(z_VD: Tensor, route: Route) -> Tensor:
    """Return the (U, D) vectors that this rank requested, given the (V, D) that it computed; differentiable."""
    if len(route.send_counts) == 1:
        return z_VD  # a single rank requests its own rows in order
    return Exchange.apply(z_VD, route)
