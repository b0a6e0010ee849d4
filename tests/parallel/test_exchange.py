"""Routes and the exchange against indexing one plain table, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import exchange, plan_route
from mocme_dist.partition import RowPartition

WORLDS = [(1, 7), (2, 8), (3, 7), (3, 2), (2, 1), (3, 1)]


def request(rank: int, world: int, num_rows: int, case: str) -> np.ndarray:
    """Ascending unique ids that a rank asks for."""
    gen = np.random.default_rng([7, rank])
    if case == "everything":
        return np.arange(num_rows)
    if case == "nothing" or (case == "one asks" and rank != world - 1):
        return np.arange(0)
    if case == "same row":
        return np.array([num_rows - 1])
    return np.unique(gen.integers(num_rows, size=max(1, num_rows // 2)))


CASES = ("random", "everything", "same row", "one asks", "nothing")


def check_exchange(comm: Comm, num_rows: int) -> None:
    for case in CASES:  # one after another: starting ranks costs more than the check
        check_case(comm, num_rows, case)


def check_case(comm: Comm, num_rows: int, case: str) -> None:
    """The exchanged rows are those of one table, and so is the gradient of a weighted sum of cubes."""
    gen = torch.Generator().manual_seed(0)
    full_ED = torch.randn(num_rows, 6, generator=gen, dtype=torch.float64).requires_grad_()
    requests = [request(rank, comm.world_size, num_rows, case) for rank in range(comm.world_size)]
    slopes = [torch.randn(len(ids), 6, generator=gen, dtype=torch.float64) for ids in requests]
    partition = RowPartition(num_rows, comm.world_size)
    first, last = partition.bounds(comm.rank)

    route = plan_route(requests[comm.rank], partition, comm)
    asked = np.unique(np.concatenate(requests))
    mine = asked[(asked >= first) & (asked < last)]
    assert np.array_equal(route.rows_V.numpy() + first, mine)
    leaf_VD = full_ED.detach()[mine].requires_grad_()
    got_UD = exchange(leaf_VD, route)
    assert torch.equal(got_UD, full_ED.detach()[requests[comm.rank]]), case
    leaving = [np.sum((ids >= first) & (ids < last)) for rank, ids in enumerate(requests) if rank != comm.rank]
    assert route.sent_vectors == sum(leaving)

    (got_UD.pow(3) * slopes[comm.rank]).sum().backward()
    plain = sum((full_ED[ids].pow(3) * slope).sum() for ids, slope in zip(requests, slopes, strict=True))
    plain.backward()
    torch.testing.assert_close(leaf_VD.grad, full_ED.grad[mine], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("world", "num_rows"), WORLDS)
def test_exchange_equals_indexing_one_table(run_ranks, world, num_rows):
    run_ranks(world, check_exchange, num_rows)


def check_threads(comm: Comm) -> None:
    """Routes that are planned in a thread do not meet the collectives of the step."""
    import threading

    partition = RowPartition(11, comm.world_size)
    routes = []
    gen = np.random.default_rng(comm.rank)
    requests = [np.unique(gen.integers(11, size=5)) for _ in range(20)]
    thread = threading.Thread(target=lambda: routes.extend(plan_route(ids, partition, comm) for ids in requests))
    thread.start()
    for turn in range(50):
        assert comm.sum(torch.tensor([float(turn)])).item() == turn * comm.world_size
    thread.join()
    full_ED = torch.arange(22.0).view(11, 2)
    first, last = partition.bounds(comm.rank)
    for ids, route in zip(requests, routes, strict=True):
        assert torch.equal(exchange(full_ED[first:last][route.rows_V], route), full_ED[ids])


def test_routes_are_planned_beside_the_step(run_ranks):
    run_ranks(3, check_threads)


def check_duplicates(comm: Comm) -> None:
    """If ids were asked for more than once, each would be sent, but the owner would encode once and add
    the gradients.
    """
    partition = RowPartition(11, comm.world_size)
    first, last = partition.bounds(comm.rank)
    full_ED = torch.randn(11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    requests = [np.sort(np.random.default_rng(rank).integers(11, size=30)) for rank in range(comm.world_size)]
    route = plan_route(requests[comm.rank], partition, comm)
    assert len(route.rows_V) == len(route.rows_V.unique()) <= last - first
    leaf_VD = full_ED.detach()[first:last][route.rows_V].requires_grad_()
    got_UD = exchange(leaf_VD, route)
    assert torch.equal(got_UD, full_ED.detach()[requests[comm.rank]])
    got_UD.pow(3).sum().backward()
    sum(full_ED[ids].pow(3).sum() for ids in requests).backward()
    torch.testing.assert_close(leaf_VD.grad, full_ED.grad[first:last][route.rows_V], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("world", [2, 3])
def test_duplicates_are_coalesced_at_the_owner(run_ranks, world):
    run_ranks(world, check_duplicates)


def check_no_sizes_in_the_step(comm: Comm) -> None:
    """Forward and backward are one collective each, of vectors alone.

    Who sends how many to whom is known from the route.
    """
    import torch.distributed as dist

    partition = RowPartition(40, comm.world_size)
    first, last = partition.bounds(comm.rank)
    ids = np.unique(np.random.default_rng(comm.rank).integers(40, size=20))
    calls: list[tuple[str, torch.dtype, bool]] = []
    names = (
        "all_to_all_single",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "broadcast",
        "broadcast_object_list",
        "barrier",
    )
    originals = {name: getattr(dist, name) for name in names}

    def spy(name: str):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            dtype = args[0].dtype if args and isinstance(args[0], torch.Tensor) else None
            calls.append((name, dtype, kwargs.get("group") is comm.ahead))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, spy(name))
    try:
        route = plan_route(ids, partition, comm)
        assert calls == [("all_to_all_single", torch.int64, True)] * 2  # counts and ids, on the group of their own
        calls.clear()
        leaf_VD = torch.randn(last - first, 4)[route.rows_V].requires_grad_()
        exchange(leaf_VD, route).sum().backward()
        assert calls == [("all_to_all_single", torch.float32, False)] * 2
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def test_the_step_itself_exchanges_no_sizes(run_ranks):
    run_ranks(3, check_no_sizes_in_the_step)
