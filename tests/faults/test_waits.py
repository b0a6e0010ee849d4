"""Whatever waits has a limit, says what it waits for, and ends with a named error."""

from __future__ import annotations

import ast
import fcntl
import threading
import time
from collections.abc import Iterator

import pytest
from fault_harness import ROOT

from mocme_dist.data import remote_storage
from mocme_dist.data.files import temporary_file
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.errors import StorageError
from mocme_dist.prefetch import Prefetcher

# Waits without a limit of their own, and why they end.
ARGUED = {
    "discover.py: ray.get": "of a piece that ray.wait has returned",
    "encoders/pools.py: result": "of threads that write parts: a disk that hangs would hold the process's end, too",
    "encoders/shard.py: result": "of a thread that decodes; the caller is a Prefetcher, which has a limit",
    "runs/heartbeat.py: ray.get": "of a message that ray.wait has returned",
    "serving/service_replicas.py: wait": "the server itself, until a signal",
}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(file, call, name of what is called) of the whole package."""
    for path in sorted((ROOT / "mocme_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT / "mocme_dist").as_posix(), node, ast.unparse(node.func)


def is_unbounded(call: ast.Call, name: str) -> bool:
    """Whether a call may wait for ever: a lock, a thread, a process, a queue, Ray, a socket."""
    given = {keyword.arg for keyword in call.keywords}
    last = name.rpartition(".")[2]
    if name in ("ray.get", "ray.wait"):
        return "timeout" not in given
    if name == "fcntl.flock":
        return "LOCK_NB" not in ast.unparse(call.args[1]) and "LOCK_UN" not in ast.unparse(call.args[1])
    if name in ("subprocess.run", "subprocess.check_output", "subprocess.check_call"):
        return "timeout" not in given
    if name in ("socket.create_connection", "urllib.request.urlopen"):
        return "timeout" not in given
    if last in ("join", "wait", "get", "result", "acquire", "communicate"):
        return not call.args and not given
    return False


def test_no_wait_of_the_package_is_without_a_limit():
    found = set()
    for file, call, name in calls():
        if is_unbounded(call, name):
            found.add(f"{file}: {name if name.startswith('ray.') else name.rpartition('.')[2]}")
    assert found == ARGUED.keys()


def test_an_item_that_never_comes_is_an_error_that_says_what_it_is():
    over = threading.Event()

    def hang() -> Iterator[int]:
        yield 1
        over.wait(60)

    items = Prefetcher(hang(), what="the batch of a step", limit_s=0.3)
    with pytest.raises(StorageError, match=r"waited 0\.3 s for the batch of a step, and nothing came"), items:
        list(items)
    over.set()


def test_an_item_that_takes_long_is_waited_for_as_long_as_its_source_is_alive():
    rows: list[int] = []

    def slow() -> Iterator[int]:
        for row in range(25):
            time.sleep(0.1)
            rows.append(row)
        yield 1

    with Prefetcher(slow(), limit_s=2, alive=lambda: len(rows)) as items:
        assert list(items) == [1]


def test_a_lock_of_another_process_is_waited_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_storage, "LOCK_S", 0.2)
    storage = RemoteStorage(f"file://{tmp_path}/bucket")
    with storage._locked():
        pass
    (path,) = (path for path in (tmp_path / "cache").rglob("lock") if path.is_file())
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"waited 0\.2 s for another process of this machine"), storage._locked():
            pass
    with storage._locked():
        pass


def test_a_sweep_that_stands_still_does_not_hold_a_writer_up(tmp_path, monkeypatch):
    """It holds the lock of a new file at the moment in which that is made, and never goes on."""
    real, held = fcntl.flock, []

    def flock(handle: int, kind: int) -> None:
        if not held:
            (path,) = tmp_path.glob(".tmp-*")
            held.append(path.open("rb"))
            real(held[0], fcntl.LOCK_EX)
        real(handle, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with temporary_file(tmp_path / "x") as temporary:
        temporary.write_text("whole")
        temporary.replace(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "whole" and not list(tmp_path.glob(".tmp-*"))
