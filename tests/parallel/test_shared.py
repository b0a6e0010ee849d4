"""Memory that ranks share: what arrives, in which order slots are used again, and what happens when a rank cannot take part or is gone."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mocme_dist.errors import RankError
from mocme_dist.parallel import shared
from mocme_dist.parallel.comm import SUM_BYTES, Comm
from mocme_dist.parallel.shared import SharedSwap, join

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files without a name are of Linux")
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def count_of(turn: int, source: int, target: int, largest: int) -> int:
    """How many numbers go from one rank to another in a turn: none, a few, or more than ever before."""
    draw = random.Random(f"{turn} {source} {target}")
    return draw.choice([0, 1, draw.randrange(100), draw.randrange(1 + largest * turn)])


def numbers(turn: int, source: int, target: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What goes: small whole numbers, which every type holds."""
    return ((torch.arange(count) * 7 + turn * 3 + source * 11 + target * 13) % 128).to(dtype)


def check_turns(comm: Comm, turns: int, largest: int) -> None:
    """Everything arrives, whatever its size and type, though ranks are slow at different places of a turn."""
    swap, delay = comm.swap, random.Random(comm.rank)
    assert swap is not None
    pause = lambda: time.sleep(delay.choice([0, 0, 0, 1e-4, 2e-3]))  # noqa: E731
    for turn in range(turns):
        dtype = TYPES[turn % 3 if turn % 5 else 3]
        counts = [count_of(turn, comm.rank, target, largest) for target in range(comm.world_size)]
        pause()
        for target, room in enumerate(swap.outgoing(counts, dtype)):
            assert len(room) == (counts[target] if target != comm.rank else 0)
            room.copy_(numbers(turn, comm.rank, target, len(room), dtype))
        swap.send()
        pause()
        parts = swap.incoming(dtype)
        pause()  # the others may be at their next turn
        for source, part in enumerate(parts):
            count = count_of(turn, source, comm.rank, largest) if source != comm.rank else 0
            assert torch.equal(part, numbers(turn, source, comm.rank, count, dtype)), f"turn {turn}, from {source}"
        if turn % 7 == 0:
            assert comm.sum(torch.tensor(comm.rank + turn)).item() == sum(rank + turn for rank in range(comm.world_size))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_turn_brings_what_was_sent_in_it(run_ranks, world):
    run_ranks(world, check_turns, 400, 30)


def test_slots_grow_as_parts_do(run_ranks):
    run_ranks(2, check_turns, 40, 20_000)


def check_sums(comm: Comm) -> None:
    """Sums are those of the group, of any shape and type, on every rank the same bits; large ones are the group's."""
    swap = comm.swap
    assert swap is not None
    gen = torch.Generator().manual_seed(comm.rank)
    values = [torch.randn(shape, generator=gen) for shape in ((), (0,), (3,), (5, 7), (300_000,))]
    values += [torch.randn(4, 6, generator=gen).t(), torch.randn(5, generator=gen).bfloat16(), torch.randint(9, (4,), generator=gen)]
    values += [torch.randn(2, generator=gen, dtype=torch.float64, requires_grad=True)]
    for value in values:
        before = value.detach().clone()
        plain = value.detach().clone()
        dist.all_reduce(plain)
        total = comm.sum(value)
        assert total.dtype == value.dtype and total.shape == value.shape and not total.requires_grad
        assert torch.equal(value, before)
        torch.testing.assert_close(total, plain)
        assert comm.world_size > 2 or torch.equal(total, plain)
        for other in gather(total.float().numpy()):
            assert torch.equal(torch.from_numpy(other), total.float())
    turn = swap._turn
    large = torch.ones(SUM_BYTES // 4 // (comm.world_size - 1) + 1)
    assert comm.sum(large).eq(comm.world_size).all() and swap._turn == turn
    assert comm.sum(large[1:]).eq(comm.world_size).all() and swap._turn == turn + 1


@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_those_of_the_group(run_ranks, world):
    run_ranks(world, check_sums)


def check_inference(comm: Comm) -> None:
    swap = comm.swap
    assert swap is not None
    with torch.inference_mode():
        for _ in range(2):
            comm.sum(torch.ones(1_000_000))
    for _ in range(2):
        rooms = swap.outgoing([4] * comm.world_size, torch.float32)
        rows = torch.randn(4, 1, requires_grad=True)
        with torch.no_grad():  # as inside of an autograd function
            torch.index_select(rows, 0, torch.arange(4), out=rooms[1 - comm.rank].view(4, 1))
        swap.send()
        swap.incoming(torch.float32)


def test_a_slot_that_grew_in_a_ranking_serves_a_training(run_ranks):
    run_ranks(2, check_inference)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def check_refusals(comm: Comm) -> None:
    """One rank that cannot is enough for all to do without, and nothing stays open; what a rank leaves is closed as well."""
    before, last = open_files(), comm.world_size - 1

    def refused(*_: object) -> Any:
        raise PermissionError("no")

    def another(pid: int, fd: int, link: str, mode: str) -> Any:
        return shared_open(pid, fd, "/memfd:of another machine", mode)

    def no_process(pid: int, fd: int, link: str, mode: str) -> Any:
        return shared_open(2**22 + 1, fd, link, mode)  # there is never such a process

    shared_open = shared._open
    for name, fault in (("_open", another), ("_open", no_process), ("_open", refused), ("_link", refused), ("_memory_file", refused)):
        original = getattr(shared, name)
        if comm.rank == last:
            setattr(shared, name, fault)
        try:
            assert join(comm.rank, comm.world_size, 60, gather) is None
        finally:
            setattr(shared, name, original)
        assert open_files() == before, f"{name}, {fault}"
    swap = join(comm.rank, comm.world_size, 60, gather)
    assert isinstance(swap, SharedSwap)
    assert swap.sum(torch.ones(3)).tolist() == [comm.world_size] * 3
    swap.close()
    swap.close()
    with pytest.raises(ValueError, match="closed"):
        swap.sum(torch.ones(3))
    del swap
    assert open_files() == before


@pytest.mark.parametrize("world", [2, 3])
def test_where_one_rank_cannot_share_none_does(run_ranks, world):
    run_ranks(world, check_refusals)


def check_old_python(comm: Comm) -> None:
    """The last rank's Python was built on an old glibc; then its system is as old."""
    before, create = open_files(), os.memfd_create
    if comm.rank == comm.world_size - 1:
        del os.memfd_create
    try:
        swap = join(comm.rank, comm.world_size, 60, gather)
        assert swap is not None and swap.sum(torch.ones(3)).tolist() == [comm.world_size] * 3
        swap.close()
        del swap
        assert open_files() == before

        class Libc:
            """It has nothing."""

            def __init__(self, *_: object, **__: object) -> None:
                pass

        found, shared.ctypes.CDLL = shared.ctypes.CDLL, Libc  # type: ignore[misc, assignment]
        assert (join(comm.rank, comm.world_size, 60, gather) is None) == (comm.world_size > 1)
        shared.ctypes.CDLL = found  # type: ignore[misc]
        assert open_files() == before
    finally:
        os.memfd_create = create


def test_a_python_of_an_old_glibc_shares_memory_where_its_system_has_it(run_ranks):
    run_ranks(2, check_old_python)


def check_few_files(comm: Comm) -> None:
    """However few files the last rank may open: either it has all that it needs from the beginning, or all ranks do without."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    joined = []
    for more in range(24):
        if comm.rank == comm.world_size - 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")) + more, allowed[1]))
        try:
            swap = join(comm.rank, comm.world_size, 60, gather)
            joined.append(swap is not None)
            for _ in range(2 if swap is not None else 0):
                assert swap.sum(torch.ones(3)).tolist() == [comm.world_size] * 3
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
        if swap is not None:
            swap.close()
        del swap
    assert joined == sorted(joined) and set(joined) == {False, True}


def test_who_may_open_too_few_files_knows_it_before_the_first_turn(run_ranks):
    run_ranks(2, check_few_files)


def lose_a_rank(comm: Comm, folder: Path) -> None:
    """Rank 1 is killed between two turns; the others are told so in the next one, and say it in a file."""
    assert comm.swap is not None
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.2)  # the others wait for it by then
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for _ in range(3):
            comm.barrier()
    except RankError as error:
        (folder / str(comm.rank)).write_text(f"{error}")
        assert time.monotonic() - started < 60  # the group's own limit is 200
        raise


def test_a_rank_that_is_killed_is_missed_at_once(run_ranks, tmp_path):
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(3, lose_a_rank, tmp_path)
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(said) == {"0", "2"}
    # One of them may miss the other, which has left because of rank 1.
    assert any("connection closed by peer: rank 1 is gone" in text for text in said.values())
    assert all("connection closed by peer: rank" in text for text in said.values())


def wait_for_a_rank(comm: Comm) -> None:
    swap = join(comm.rank, comm.world_size, 10**9, gather)
    assert swap is not None
    if comm.rank == 1:
        time.sleep(0.1)
    assert swap.sum(torch.ones(1)).item() == 2  # more seconds than poll takes milliseconds
    swap.close()
    swap = join(comm.rank, comm.world_size, 0.3, gather)
    assert swap is not None
    if comm.rank == 0:
        with pytest.raises(RankError, match=r"rank 0: timed out waiting for rank 1: it sent nothing for 0\.3 s"):
            swap.sum(torch.ones(1))
    comm.barrier()  # rank 1 is here meanwhile
    swap.close()


def test_a_rank_that_says_nothing_is_waited_for_as_long_as_is_allowed(run_ranks):
    run_ranks(2, wait_for_a_rank)
