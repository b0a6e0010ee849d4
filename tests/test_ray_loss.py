"""How the loss of Ray is noticed, on processes that stand for it.

Tests/runs/test_signals_on_ray.py kills the real one.
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
from pathlib import Path

from mocme_dist import ray_loss

LISTEN = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
    unix.bind(sys.argv[1])
    unix.listen()
    print(tcp.getsockname()[1], flush=True)
    time.sleep(60)
"""


def test_the_end_of_a_listening_process_is_seen_at_once():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: the name of a socket may have 107 characters
        name = str(Path(folder) / "raylet")
        process = subprocess.Popen([sys.executable, "-c", LISTEN, name], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with ray_loss._process_behind(name) as handles:
                assert len(handles) == 2 and not select.select(handles, [], [], 0)[0]
                assert ray_loss._listens("127.0.0.1", port)
                process.kill()
                assert select.select(handles[:1], [], [], 10)[0] and select.select(handles[1:], [], [], 10)[0]
        finally:
            process.kill()
            process.wait()
        assert not ray_loss._listens("127.0.0.1", port)
        with ray_loss._process_behind(name) as handles:
            assert handles == []


def test_a_raylet_that_closes_its_connections_before_it_ends_is_seen_at_once():
    closes = LISTEN.replace("time.sleep(60)", "unix.accept()[0].close(); time.sleep(60)")
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "raylet")
        process = subprocess.Popen([sys.executable, "-c", closes, name], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline()
            with ray_loss._process_behind(name) as handles:
                assert select.select(handles, [], [], 10)[0] and process.poll() is None
        finally:
            process.kill()
            process.wait()
