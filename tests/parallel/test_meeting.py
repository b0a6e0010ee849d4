"""Ranks of one machine listen on loopback and nowhere else, however they meet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from mocme_dist.parallel.meeting import interface_towards, join_store, listen, open_store

RANK = """
import json
import psutil
from mocme_dist.parallel.comm import communication
with communication(60, 0) as comm:
    comm.barrier()
    found = [each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
    comm.barrier()
    print(json.dumps(found))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize("world", [1, 2])
def test_every_socket_of_every_rank_is_on_loopback(world):
    """Store, gloo and the thread's own gloo, by the environment that a launcher makes; none for one rank."""
    ours = ("GLOO_", "NCCL_", "RANK", "WORLD_SIZE", "MASTER_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    if world > 1:
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=env | ({"RANK": str(rank)} if world > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        found = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(found), found  # each listens: on gloo's port, and rank 0 on the store's
    assert {address.removeprefix("::ffff:") for each in found for address in each} == {"127.0.0.1"}


def test_a_store_is_served_on_the_address_that_was_listened_on_only():
    listening = listen("127.0.0.1")
    host, port = listening.getsockname()
    assert host == "127.0.0.1"
    store = open_store(listening, timedelta(seconds=30))
    store.set("key", "value")
    assert join_store("127.0.0.1", port, timedelta(seconds=30)).get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):  # another address of loopback, which every-interface would answer
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_a_name_that_only_others_resolve_to_an_address_of_its_own_is_listened_for_everywhere(monkeypatch):
    """Debian gives a host's own name 127.0.1.1: bound to that, no other machine would find it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"node1": "127.0.1.1", "service": "192.0.2.1"}[name])
    for name in ("node1", "service"):
        with listen(name) as everywhere:
            assert everywhere.getsockname()[0] == "0.0.0.0"


def test_the_interface_is_that_of_the_way_to_the_other_ranks():
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"
    assert interface_towards("no-such-host.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of documentation: nothing is sent
        except OSError:
            pytest.skip("this machine has no way to other machines")
    assert interface_towards("192.0.2.1") in {name for _, name in socket.if_nameindex()} - {"lo"}
