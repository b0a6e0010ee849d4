"""Ranks agree: sums, flags, objects and errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from mocme_dist.errors import DataError, RankError
from mocme_dist.parallel.comm import Comm, communication


def check_collectives(comm: Comm) -> None:
    mine = torch.arange(3.0, dtype=torch.float64, requires_grad=True) + comm.rank
    total = comm.sum(mine)
    expected = sum(torch.arange(3.0, dtype=torch.float64) + rank for rank in range(comm.world_size))
    assert torch.equal(total, expected)
    assert not total.requires_grad
    assert total.data_ptr() != mine.data_ptr()
    assert comm.gather({"rank": comm.rank}) == [{"rank": rank} for rank in range(comm.world_size)]
    assert comm.broadcast(f"from {comm.rank}") == "from 0"
    last = comm.world_size - 1
    assert comm.any(comm.rank == last) is True
    assert comm.any(False) is False
    comm.barrier()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_agree_on_every_rank(run_ranks, world):
    run_ranks(world, check_collectives)


def fail_on_last(comm: Comm, kind: type[Exception] | None) -> tuple[type[Exception], str] | None:
    failing = kind is not None and comm.rank == comm.world_size - 1
    try:
        comm.raise_together(kind("part 3 is torn") if failing else None)
    except Exception as raised:
        return type(raised), str(raised)
    return None


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_error_of_one_rank_is_raised_on_all_with_its_kind(run_ranks, world):
    found = run_ranks(world, fail_on_last, DataError)
    assert found[-1] == (DataError, "part 3 is torn")
    assert found[:-1] == [(DataError, f"rank {world - 1}: part 3 is torn")] * (world - 1)


def test_an_error_that_is_no_kind_of_ours_reaches_others_as_rank_error(run_ranks):
    assert run_ranks(2, fail_on_last, ValueError) == [
        (RankError, "rank 1: part 3 is torn"),
        (ValueError, "part 3 is torn"),
    ]


def test_no_error_raises_nothing(run_ranks):
    assert run_ranks(3, fail_on_last, None) == [None, None, None]


def fail_without_telling(comm: Comm) -> None:
    if comm.rank == 1:
        raise DataError("only rank 1 knows")
    comm.barrier()


def test_a_rank_that_fails_fails_the_test_with_its_trace(run_ranks):
    with pytest.raises(AssertionError, match="only rank 1 knows"):
        run_ranks(2, fail_without_telling)


def test_alone_there_is_a_group_of_one_and_it_ends(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with communication(30) as comm:
        assert (comm.rank, comm.world_size) == (0, 1)
        assert torch.distributed.is_initialized()
        check_collectives(comm)
    assert not torch.distributed.is_initialized()


def test_a_launcher_s_environment_is_joined_and_left(monkeypatch):
    """As under torchrun: RANK, WORLD_SIZE and MASTER_* say how to join."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    with communication(30) as comm:
        assert comm.gather(comm.rank) == [0]
    assert not torch.distributed.is_initialized()


def test_a_group_that_a_launcher_made_is_left_standing():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with communication(30) as comm:
            assert comm.world_size == 1
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


RANK = """
import sys, time
from mocme_dist.parallel.comm import communication
print("here", flush=True)
time.sleep(float(sys.argv[1]))
with communication(20) as comm:
    print(comm.gather(comm.rank))
"""


@contextmanager
def late_rank_0(by_torchrun: bool) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks, of which the first comes 24 seconds or more after the other to collectives of 20."""
    # Held until the end: the store may listen beside a socket that is only bound, and nobody else is given the port.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if by_torchrun:  # its agent holds the store, so that the followers find one at once
        agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = []
    for rank, delay in (("1", "0"), ("0", "24")):
        command = [sys.executable, "-c", RANK, delay]
        ranks.append(subprocess.Popen(command, env={**env, "RANK": rank}, stdout=subprocess.PIPE, text=True))
        # A follower that is late itself on a busy machine would miss rank 0's collectives.
        assert ranks[-1].stdout.readline() == "here\n"
    try:
        yield ranks
    finally:
        held.close()
        for rank in ranks:
            rank.kill()
        if by_torchrun:
            del agent


@pytest.mark.slow
def test_followers_wait_for_rank_0_longer_than_a_collective_may_take():
    """Both ways at once: it is waiting that takes the time."""
    with late_rank_0(by_torchrun=False) as alone, late_rank_0(by_torchrun=True) as with_agent:
        for ranks in (alone, with_agent):
            assert [rank.communicate(timeout=400)[0].strip() for rank in ranks] == ["[0, 1]"] * 2
            assert [rank.returncode for rank in ranks] == [0, 0]
