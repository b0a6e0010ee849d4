"""Replicas of Ray Serve.

They listen on loopback only, and one that is killed under load loses no request that is retried.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from service_client import Server, free_port, listening

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REQUESTS = 400
CLIENTS = 4


@pytest.fixture(scope="module")
def replicated(bundle_dir: Path):
    server = Server(str(bundle_dir), "--replicas", "2", port=free_port())
    yield server
    server.stop()


def descendants(root: int) -> dict[int, str]:
    """Command lines of the processes below one, by process id."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    found: dict[int, str] = {}
    wanted = {root}
    while wanted:
        new = {int(pid): args for pid, parent, args in rows if int(parent) in wanted and int(pid) not in found}
        found |= new
        wanted = set(new)
    return found


def test_every_process_listens_on_loopback_only(replicated):
    # without `_close_internal_server` each replica has a listener on all interfaces
    pids = [replicated.process.pid, *descendants(replicated.process.pid)]
    addresses = set()
    for pid in pids:
        if Path(f"/proc/{pid}/fd").exists():
            addresses |= listening(pid)
    assert f"127.0.0.1:{replicated.port}" in addresses
    outside = [address for address in addresses if not re.match(r"(127\.|::1:|::ffff:127\.)", address)]
    assert outside == []


def test_a_replica_killed_under_load_loses_no_request_that_is_retried(replicated):
    expected = replicated.get("/predict", head="item 05", relation="near", top=5).json
    answered: list[Any] = []
    retries = [0]
    give_up = time.monotonic() + 240

    def client() -> None:
        for _ in range(REQUESTS // CLIENTS):
            while True:
                assert time.monotonic() < give_up
                try:
                    reply = replicated.get("/predict", head="item 05", relation="near", top=5)
                except OSError:
                    reply = None
                if reply is not None and reply.status == 200:
                    answered.append(reply.json)
                    break
                retries[0] += 1
                time.sleep(0.2)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while len(answered) < REQUESTS // 8:
        time.sleep(0.01)
    replicas = [pid for pid, args in descendants(replicated.process.pid).items() if "ServeReplica" in args]
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(answered) == REQUESTS and all(answer == expected for answer in answered)
    print(f"{retries[0]} retries", file=sys.stderr)
    while len([1 for args in descendants(replicated.process.pid).values() if "ServeReplica" in args]) < 2:
        assert time.monotonic() < give_up, "the killed replica was not replaced"
        time.sleep(0.5)


def test_metrics_add_up_over_replicas(replicated):
    text = replicated.get("/metrics").body.decode()
    [count] = re.findall(r'mocme_requests_total\{route="/predict",status="200"\} (\d+)', text)
    assert int(count) >= REQUESTS
