"""Heartbeats move the bar while a shard is on its way, and what killed runs leave is swept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mocme_dist.data.progress import Progress
from mocme_dist.encoders import heartbeat
from mocme_dist.encoders.heartbeat import Heartbeat, rows_done, watch
from mocme_dist.errors import StorageError


def test_rows_of_all_actors_reach_the_bar_and_the_folder_goes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        heartbeat, "_EVERY_S", 1000.0
    )  # so that no machine is too slow for two beats between two writes
    with Progress("extract", 100) as progress:
        with watch(tmp_path / "features", progress, every_s=0.01) as folder:
            one, other = Heartbeat(folder), Heartbeat(folder)
            one.beat(30)
            one.beat(5)  # so soon after the first: written with the next
            other.beat(12)
            assert rows_done(folder) == 42
            for _ in range(5000):
                if progress.done == 42:
                    break
                time.sleep(0.01)
            assert progress.done == 42
            (folder / "torn").write_text("")
            (folder / "foreign").write_text("x")
            assert rows_done(folder) == 42
        assert not folder.exists()
        progress.raise_to(40)
        assert progress.done == 42
        progress.raise_to(1000)  # rows done twice after an actor was lost
        assert progress.done == 100


def test_an_actor_without_its_folder_goes_on(tmp_path: Path):
    Heartbeat(tmp_path / "gone").beat(3)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        Progress("extract", 1) as progress,
        pytest.raises(StorageError, match="features: cannot be written"),
        watch(tmp_path / "file" / "features", progress),
    ):
        pass


def test_only_old_heartbeats_are_swept(tmp_path: Path):
    old, young, part = tmp_path / ".progress-dead", tmp_path / ".progress-alive", tmp_path / "text" / "part"
    for folder in (old, young, part):
        folder.mkdir(parents=True)
    for folder in (old, part):
        os.utime(folder, (time.time() - 4000,) * 2)
    with Progress("extract", 1) as progress, watch(tmp_path, progress):
        assert not old.exists() and young.exists() and part.exists()
