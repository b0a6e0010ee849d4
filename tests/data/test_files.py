"""Files are whole or absent; what killed writers leave is swept, what living ones write is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocme_dist.data import files
from mocme_dist.data.files import atomic_path, exchange, held, sweep, temporary_file

WRITER = """
import sys
from pathlib import Path
from mocme_dist.data.files import temporary_file
with temporary_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    sys.stdin.read()
"""


def test_files_of_a_killed_writer_are_swept_and_those_of_a_living_one_stay(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "part")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    half = Path(process.stdout.readline().strip())
    sweep(tmp_path)
    assert half.read_text() == "half"
    process.kill()
    process.wait()
    (tmp_path / "part").write_text("whole")
    (tmp_path / ".tmp-mine").write_text("of somebody else")
    sweep(tmp_path, "another")
    assert half.exists()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", "part"]


def test_a_file_of_another_host_is_swept_after_a_day(tmp_path):
    young, old = tmp_path / ".tmp-000000-12345678-a", tmp_path / ".tmp-0123456789ab-a"
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    sweep(tmp_path)
    assert young.exists() and not old.exists()


def test_a_writer_whose_file_is_swept_as_it_is_made_makes_another(tmp_path, monkeypatch):
    lock, swept = files.fcntl.flock, []

    def late(handle, how):
        if not swept:
            swept.extend(path.unlink() or path for path in tmp_path.iterdir())
        lock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with atomic_path(tmp_path / "part") as temporary:
        temporary.write_text("whole")
    assert len(swept) == 1 and [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "lock"
    path.write_text("")  # a killed holder left it
    with held(path), pytest.raises(BlockingIOError), held(path):
        pass
    with held(path):
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_two_folders_are_swapped_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot swap two folders")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "missing")


def test_a_temporary_file_is_gone_afterwards(tmp_path):
    with pytest.raises(KeyboardInterrupt), temporary_file(tmp_path / "part"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
