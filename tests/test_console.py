"""What reaches the user: our lines, errors of others, the result alone on standard output.

Not the talk of libraries.
"""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from mocme_dist import console

ROOT = Path(__file__).resolve().parents[1]
NOISE = (
    "[2026-11-30 02:19:50,178 E 12210 12210] core_worker.cc:2465: Actor with class name: 'MapWorker(Map(_Actor))' and"
    " ID: '96aa' has constructor arguments in the object store and max_restarts > 0. If the arguments ... details."
)
# What a command does that uses libraries which write to both streams, past Python and through it.
TALKATIVE = f"""
import logging, os, sys, warnings
from mocme_dist import console
console.open_console("INFO")
console.reserve_stdout()
console.filter_stderr()
os.write(2, {(NOISE + chr(10)).encode()!r})
os.write(2, b"[2026-11-30 E 1 1] gcs_client.cc:1: cannot reach the cluster\\n")
os.write(1, b"Embedding dir exists\\n")
print("printed by a library")
logging.getLogger("mocme_dist.training").info("ours")
logging.getLogger("some.library").warning("theirs")
logging.getLogger("some.library").error("their error")
warnings.warn("for authors of libraries")
console.print_result({{"mrr": 0.5, "name": "Zürich"}}, "a table")
"""


def run(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | more
    )


def test_the_result_is_alone_on_standard_output_and_noise_nowhere():
    done = run(TALKATIVE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"mrr": 0.5, "name": "Zürich"}\n'
    assert "constructor arguments" not in done.stderr and "theirs" not in done.stderr
    assert "for authors" not in done.stderr and "\x1b" not in done.stderr and "a table" not in done.stderr
    for text in ("cannot reach the cluster", " ours\n", "their error", "Embedding dir exists", "printed by a library"):
        assert text in done.stderr, text


def test_debug_shows_everything():
    done = run(TALKATIVE.replace('"INFO"', '"DEBUG"'), MOCME_LOG="DEBUG")
    assert "constructor arguments" in done.stderr and "theirs" in done.stderr and "for authors" in done.stderr
    assert done.stdout.count("\n") == 1


def test_what_a_crash_writes_still_passes_the_filter():
    code = (
        "from mocme_dist import console; import os; console.filter_stderr(); os.write(2, b'last words\\n'); os.abort()"
    )
    done = run(code)
    assert done.returncode == -6 and "last words" in done.stderr


def test_on_a_terminal_a_table_stands_before_the_result():
    main, side = pty.openpty()
    code = "from mocme_dist import console; console.reserve_stdout(); console.print_result({'mrr': 1}, 'a table')"
    with os.fdopen(main, "rb", buffering=0) as screen:
        done = subprocess.run([sys.executable, "-c", code], stdout=side, stderr=side, cwd=ROOT, timeout=120)
        text = screen.read(4096).decode()
        os.close(side)
    assert done.returncode == 0 and text.replace("\r", "") == 'a table\n{"mrr": 1}\n'


@pytest.fixture
def hear(monkeypatch):
    """The function that gets what Ray's workers write, and the states that it passes on."""
    ray_worker = pytest.importorskip("ray._private.worker")
    monkeypatch.setattr(ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    states: list[tuple[str, dict[str, object]]] = []
    console.listen_to_workers(lambda worker, state: states.append((worker, state)))
    return ray_worker.print_to_stdstream, states


def lines(*texts: str, pid: object = 7) -> dict[str, object]:
    return {"ip": "127.0.0.1", "pid": pid, "is_err": True, "lines": list(texts)}


def marked(monkeypatch, capsys, rank: int | None, act) -> list[str]:
    """What a worker writes while it acts."""
    monkeypatch.setattr(console._output, "rank", None)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        console.speak_to_driver(rank)
        act()
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    return capsys.readouterr().err.splitlines()


def test_the_driver_shows_what_workers_say_once_and_not_what_libraries_say(hear, monkeypatch, capsys, caplog):
    def act() -> None:
        logging.getLogger("mocme_dist.x").warning("two\nlines")
        logging.getLogger("mocme_dist.x").info("a | b")
        logging.getLogger("library").warning("theirs")
        console.send_state({"number": 1, "over": False})

    first, second = (marked(monkeypatch, capsys, rank, act) for rank in (0, 1))
    receive, states = hear
    with caplog.at_level(logging.INFO):
        receive(lines(*first, "Embedding dir exists", NOISE))
        receive(lines(*second, pid=8), ignore_prefix=False)
        receive(lines("mocme|I|1|of the second alone", pid=8))
        receive(lines("mocme|I|0|a | b", pid=9))  # the same rank after a restart
    assert caplog.messages == ["two", "lines", "a | b", "rank 1: of the second alone", "a | b"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "INFO", "INFO"]
    assert states == [("127.0.0.1:7", {"number": 1, "over": False}), ("127.0.0.1:8", {"number": 1, "over": False})]


def test_the_ends_of_processes_and_news_of_the_cluster_reach_the_user(hear, caplog):
    receive, _ = hear
    with caplog.at_level(logging.INFO):
        receive(lines("*** SIGSEGV received at time=1 ***", "ValueError: bad", "torch.OutOfMemoryError: no", "fine"))
        receive(
            lines("\x1b[33m2 Workers (tasks / actors) killed due to memory pressure (OOM)\x1b[0m\nmore", pid="raylet")
        )
        receive(lines("A worker died or was killed while executing a task", pid="raylet"))
        receive(lines("======== Autoscaler status ========", pid="autoscaler"))
    assert caplog.messages == [
        "process 7: *** SIGSEGV received at time=1 ***",
        "process 7: ValueError: bad",
        "process 7: torch.OutOfMemoryError: no",
        "ray: 2 Workers (tasks / actors) killed due to memory pressure (OOM)",
    ]


def test_names_cannot_control_a_terminal(capsys):
    name = "a\x1b[2J\x9b1m\u202eb\u2066c\rd"
    assert console.printable(name) == "a\\u001b[2J\\u009b1m\\u202eb\\u2066c\\u000dd"
    console.write_line(name)
    console.print_result({"name": name})
    shown = capsys.readouterr()
    assert not set("\x1b\x9b\u202e\u2066\r") & set(shown.err + shown.out)
    assert json.loads(shown.out) == {"name": name}


@pytest.mark.parametrize(
    "line",
    [
        "[src/libmpg123/layer3.c:INT123_do_layer3():1804] error: dequantization failed!",
        "[src/libmpg123/parse.c:do_readahead():1099] warning: Cannot read next header, a one-frame stream? Duh...",
        "Note: Illegal Audio-MPEG-Header 0x00000000 at offset 4593.",
    ],
)
def test_lines_of_damaged_audio_are_noise(line):
    assert console._NOISE.search(line)
    assert not console._NOISE.search("error: StorageError: disk full")
