"""A copy is verified once.

Whatever changes afterwards is noticed, also where size and time of modification are as before.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mocme_dist.data import files
from mocme_dist.data.files import verify_once


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_YOUNG_S", 0.0)
    (tmp_path / "copy").mkdir()
    for name in ("a", "b"):
        (tmp_path / "copy" / name).write_text(name)
    return tmp_path / "copy"


def checks(folder: Path, names: tuple[str, ...] = ("a", "b"), **more: bool) -> int:
    """How often the check ran in one call."""
    ran: list[None] = []
    verify_once(folder, names, lambda: ran.append(None), **more)
    return len(ran)


def test_a_copy_is_checked_once_and_again_when_asked(folder):
    assert [checks(folder), checks(folder), checks(folder, again=True), checks(folder)] == [1, 0, 1, 0]
    assert checks(folder, ("a",)) == 1


def test_a_change_of_equal_size_and_time_is_noticed(folder):
    checks(folder)
    before = (folder / "a").stat()
    time.sleep(0.02)  # the clock of file systems ticks every 4 ms or so
    (folder / "a").write_text("x")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / "a").stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert checks(folder) == 1


def test_what_fails_or_is_not_there_is_not_remembered(folder):
    def fails() -> None:
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            verify_once(folder, ("a",), fails)
    assert [checks(folder, ("a", "missing")) for _ in range(2)] == [1, 1]


def test_files_that_have_just_changed_are_not_remembered(folder, monkeypatch):
    monkeypatch.setattr(files, "_YOUNG_S", 60.0)
    assert [checks(folder), checks(folder)] == [1, 1]


def test_a_torn_record_costs_a_check_and_folders_that_are_gone_are_forgotten(folder, tmp_path):
    record = tmp_path / "cache" / "verified.json"
    record.parent.mkdir()
    for content in ("[", "[]", json.dumps({str(tmp_path / "gone"): "1"})):
        record.write_text(content)
        assert checks(folder) == 1
    assert list(json.loads(record.read_text())) == [str(folder)]


def test_a_cache_that_cannot_be_written_costs_a_check(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(folder / "a" / "no-folder"))
    assert [checks(folder), checks(folder)] == [1, 1]
