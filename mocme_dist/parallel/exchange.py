"""Who needs whose rows, and moving D numbers an entity between ranks.

A rank asks for ascending unique ids; ranges are contiguous, so its requests fall into one run per owner. An owner
answers each asked row once to each asker, and computes it once whoever asked. Ids travel ahead of the step on their
own group (`plan_route`); vectors travel inside it (`Exchange`), forward, and gradients backward. Ranks on the CPUs of
one machine pass all of it through memory (`SharedExchange`, see shared.py); there is nothing to set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.shared import SharedSwap
from mocme_dist.partition import RowPartition


@dataclass(frozen=True)
class Route:
    """One step's exchange, seen from one rank.

    Attributes:
        rows_V: (V,) ascending unique local rows of this rank that anybody asked for.
        asked_A: (A,) position in rows_V of each vector that is sent, askers in order of rank.
        asked_counts: how many of them go to each rank; sums to A.
        wanted_counts: how many vectors come from each rank; sums to U.
        rank: this rank.
    """

    rows_V: Tensor
    asked_A: Tensor
    asked_counts: list[int]
    wanted_counts: list[int]
    rank: int

    def moved(self, send: Callable[[Tensor], Tensor]) -> Route:
        """The same route with its tensors where `send` brings them."""
        return Route(send(self.rows_V), send(self.asked_A), self.asked_counts, self.wanted_counts, self.rank)

    @property
    def sent_vectors(self) -> int:
        """Vectors that leave this rank for another one."""
        return sum(self.asked_counts) - self.asked_counts[self.rank]


def plan_route(ids_U: np.ndarray, partition: RowPartition, comm: Comm) -> Route:
    """Tell every owner which of its rows this rank needs, and learn which of one's own are needed.

    Collective over `comm.ahead`, on the CPU; called by the background thread a step ahead.

    Args:
        ids_U: (U,) ascending unique global ids.
    """
    first, _ = partition.bounds(comm.rank)
    cuts = np.searchsorted(ids_U, partition.starts())
    wanted_counts = np.diff(cuts).tolist()
    if comm.world_size == 1:
        rows_V = torch.from_numpy(ids_U)
        return Route(rows_V, torch.arange(len(ids_U)), wanted_counts, wanted_counts, 0)
    ids_A, asked_counts = _ask(torch.from_numpy(np.ascontiguousarray(ids_U)), wanted_counts, comm)
    rows_V, asked_A = torch.unique(ids_A - first, sorted=True, return_inverse=True)
    return Route(rows_V, asked_A, asked_counts, wanted_counts, comm.rank)


def _ask(ids_U: Tensor, wanted_counts: list[int], comm: Comm) -> tuple[Tensor, list[int]]:
    """Send each owner its ids: (A,) those that are asked of this rank, and how many of them by each."""
    if comm.swap_ahead is not None:
        wanted = ids_U.split(wanted_counts)
        for ids, out in zip(wanted, comm.swap_ahead.outgoing(wanted_counts, torch.int64), strict=True):
            out.copy_(ids[: len(out)])
        comm.swap_ahead.send()
        asked = comm.swap_ahead.incoming(torch.int64)
        asked[comm.rank] = wanted[comm.rank]
        return torch.cat(asked), [len(ids) for ids in asked]
    counts = torch.empty(comm.world_size, dtype=torch.int64)
    dist.all_to_all_single(counts, torch.tensor(wanted_counts, dtype=torch.int64), group=comm.ahead)
    asked_counts = counts.tolist()
    ids_A = torch.empty(sum(asked_counts), dtype=torch.int64)
    dist.all_to_all_single(ids_A, ids_U, asked_counts, wanted_counts, group=comm.ahead)
    return ids_A, asked_counts


class Exchange(torch.autograd.Function):
    """Vectors from their owners to those who asked; gradients the other way, added where several asked."""

    @staticmethod
    def forward(ctx, z_VD: Tensor, route: Route) -> Tensor:  # type: ignore[no-untyped-def]
        """(V, D) this rank's vectors to (U, D) the asked ones, in the order of the ids asked for."""
        ctx.route, ctx.num_rows = route, len(z_VD)
        return _swap(z_VD.index_select(0, route.asked_A), route.wanted_counts, route.asked_counts)

    @staticmethod
    def backward(ctx, grad_UD: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """(U, D) gradients of what was asked for to (V, D) gradients of this rank's vectors."""
        route: Route = ctx.route
        grad_AD = _swap(grad_UD.contiguous(), route.asked_counts, route.wanted_counts)
        return grad_UD.new_zeros(ctx.num_rows, grad_UD.shape[1]).index_add(0, route.asked_A, grad_AD), None


def _swap(value: Tensor, receive: list[int], send: list[int]) -> Tensor:
    out = value.new_empty(sum(receive), *value.shape[1:])
    dist.all_to_all_single(out, value, receive, send)
    return out


class SharedExchange(torch.autograd.Function):
    """`Exchange` through memory that the ranks share; the same bits, and no tensor of all that is sent or received.

    What a rank asks of itself is not sent, and is moved while the others are at theirs.
    """

    @staticmethod
    def forward(ctx, z_VD: Tensor, route: Route, swap: SharedSwap) -> Tensor:  # type: ignore[no-untyped-def]
        """See `Exchange`."""
        ctx.route, ctx.num_rows, ctx.swap = route, len(z_VD), swap
        D, asked = z_VD.shape[1], route.asked_A.split(route.asked_counts)
        out_UD = z_VD.new_empty(sum(route.wanted_counts), D)
        wanted = out_UD.split(route.wanted_counts)
        rooms = swap.outgoing([D * count for count in route.asked_counts], z_VD.dtype)
        for rank, room in enumerate(rooms):
            if rank != route.rank:
                torch.index_select(z_VD, 0, asked[rank], out=room.view(-1, D))
        swap.send()
        torch.index_select(z_VD, 0, asked[route.rank], out=wanted[route.rank])
        for rank, part in enumerate(swap.incoming(z_VD.dtype)):
            if rank != route.rank:
                wanted[rank].copy_(part.view_as(wanted[rank]))
        return out_UD

    @staticmethod
    def backward(ctx, grad_UD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        """See `Exchange`."""
        route, swap, D = ctx.route, ctx.swap, grad_UD.shape[1]
        wanted = grad_UD.split(route.wanted_counts)
        rooms = swap.outgoing([D * count for count in route.wanted_counts], grad_UD.dtype)
        for rank, room in enumerate(rooms):
            if rank != route.rank:
                room.view(-1, D).copy_(wanted[rank])
        swap.send()
        out_VD = grad_UD.new_zeros(ctx.num_rows, D)
        parts = swap.incoming(grad_UD.dtype)
        for rank, asked in enumerate(route.asked_A.split(route.asked_counts)):  # in the order in which `Exchange` adds
            out_VD.index_add_(0, asked, wanted[rank] if rank == route.rank else parts[rank].view(-1, D))
        return out_VD, None, None


def exchange(z_VD: Tensor, route: Route, swap: SharedSwap | None = None) -> Tensor:
    """(U, D) vectors that this rank asked for, from the (V, D) that all ranks computed; differentiable.

    Args:
        swap: of all ranks, where they have one and vectors are on the CPU.
    """
    if len(route.asked_counts) == 1:
        return z_VD  # one rank asks itself for all rows in order
    return Exchange.apply(z_VD, route) if swap is None else SharedExchange.apply(z_VD, route, swap)
