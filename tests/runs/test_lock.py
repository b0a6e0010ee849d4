"""One run in one directory: who is turned away, and whose lock is taken over, on this host and from another one."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

import pytest

from mocme_dist.errors import LockedError
from mocme_dist.runs import lock
from mocme_dist.runs.lock import Lock

ELSEWHERE = {"pid": 7, "host": "elsewhere", "since": "2024-02-03 04:05:06", "token": "theirs", "beats": 3}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A beat and a watch that a test can wait for."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "WATCH_S", 0.6)


def test_a_held_lock_turns_others_away_and_a_released_one_does_not(tmp_path):
    held = Lock(tmp_path)
    with pytest.raises(
        LockedError, match=rf"locked by process {os.getpid()} on {socket.gethostname()} since .*; use another run.dir"
    ):
        Lock(tmp_path)
    held.release()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).release()


def test_a_holder_freshens_its_lock(tmp_path):
    held, deadline = Lock(tmp_path), time.monotonic() + 60
    while json.loads((tmp_path / "lock").read_text())["beats"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads((tmp_path / "lock").read_text())["beats"] >= 3
    held.release()


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ELSEWHERE).encode(),
        b"",
        b"{",
        b"[]",
        json.dumps({**ELSEWHERE, "pid": None}).encode(),
        b"\xff\xfe",
        b"[" * 9**5,
    ],
    ids=range(7),
)
def test_a_lock_of_another_host_that_stands_still_is_taken_over(tmp_path, text, caplog):
    (tmp_path / "lock").write_bytes(text)
    started = time.monotonic()
    held = Lock(tmp_path)
    assert time.monotonic() - started >= 0.6 and "is taken over" in caplog.text
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    held.release()


def test_a_lock_of_another_host_that_is_freshened_turns_away(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_S", 60.0)  # the first change that is seen ends it
    over = threading.Event()

    def freshen() -> None:
        for beats in range(10_000):
            (tmp_path / "new").write_text(json.dumps({**ELSEWHERE, "beats": beats}))
            (tmp_path / "new").replace(tmp_path / "lock")
            if over.wait(0.02):
                return

    thread = threading.Thread(target=freshen)
    thread.start()
    try:
        while not (tmp_path / "lock").exists():
            time.sleep(0.01)
        with pytest.raises(LockedError, match="locked by process 7 on elsewhere since 2024-02-03 04:05:06"):
            Lock(tmp_path)
    finally:
        over.set()
        thread.join()


def test_who_lost_its_lock_stops_and_leaves_the_new_one(tmp_path):
    asked = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        held = Lock(tmp_path)
        (tmp_path / "lock").write_text(json.dumps(ELSEWHERE))
        assert asked.wait(60)
        held.release()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert json.loads((tmp_path / "lock").read_text())["token"] == "theirs"


def test_a_lock_that_was_made_in_this_moment_is_not_taken_for_the_dead_one(tmp_path):
    (tmp_path / "lock").write_text("the new one")
    assert not lock._remove(tmp_path / "lock", b"the dead one")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and (tmp_path / "lock").read_text() == "the new one"
    assert lock._remove(tmp_path / "lock", b"the new one") and list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_answer_for_a_moment_does_not_end_the_beat(tmp_path, monkeypatch):
    asked = threading.Event()

    def stale(path: object) -> None:
        asked.set()
        raise OSError(116, "Stale file handle")

    held, deadline = Lock(tmp_path), time.monotonic() + 60
    with monkeypatch.context() as broken:
        broken.setattr(lock, "_read", stale)
        assert asked.wait(60)
    before = json.loads((tmp_path / "lock").read_text())["beats"]
    while json.loads((tmp_path / "lock").read_text())["beats"] <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads((tmp_path / "lock").read_text())["beats"] > before
    held.release()
