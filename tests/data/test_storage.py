"""Remote folders: what comes, what goes, in which order, and what a store that fails leaves behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest

from mocme_dist.data import files
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError, DataError, StorageError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    """An empty remote folder, on disk and in memory."""
    place = f"file://{tmp_path}/remote/data" if request.param == "file" else f"memory://{tmp_path.name}/data"
    yield place
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def put(url: str, name: str, content: str) -> None:
    with fsspec.open(f"{url}/{name}", "w", auto_mkdir=True) as file:
        file.write(content)


def get(url: str, name: str) -> str:
    with fsspec.open(f"{url}/{name}", "r") as file:
        return file.read()


@pytest.mark.parametrize(
    "place, answer",
    [("s3://bucket/x", True), ("memory://x", True), ("runs/demo", False), ("/a/b", False), ("C:/x", False)],
)
def test_a_url_is_told_from_a_path(place, answer):
    assert is_url(place) is answer


def test_files_come_once_and_again_when_they_change(url):
    put(url, "manifest.json", "one")
    put(url, "shards/a.tar", "tar")
    mirror = RemoteStorage(url)
    assert mirror.pull() == ["manifest.json", "shards/a.tar"]
    assert (mirror.path / "shards" / "a.tar").read_text() == "tar"
    assert RemoteStorage(url).pull() == []
    put(url, "manifest.json", "two!")
    assert RemoteStorage(url).pull() == ["manifest.json"]
    (mirror.path / "shards" / "a.tar").unlink()
    assert RemoteStorage(url).pull("shards/*") == ["shards/a.tar"]


def test_patterns_choose_what_comes(url):
    for name in (
        "manifest.json",
        "graph/train.npy",
        "features/text/part-000000.safetensors",
        "features/text/part-000001.safetensors",
    ):
        put(url, name, name)
    path = RemoteStorage(url).path
    RemoteStorage(url).pull("manifest.json", "graph/*", "features/*/part-000001.*")
    found = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert found == ["features/text/part-000001.safetensors", "graph/train.npy", "manifest.json"]


def test_what_a_killed_writer_left_is_not_listed_and_is_swept_from_a_disk(tmp_path):
    mirror = RemoteStorage(f"file://{tmp_path}/remote")
    mirror.put("a/b", b"x")
    left = tmp_path / "remote" / "a" / f".tmp-{files._HOST}-12345678-c"
    left.write_bytes(b"half")
    assert list(mirror.list()) == ["a/b"] and mirror.pull() == ["a/b"]
    mirror.sweep()
    assert not left.exists() and (tmp_path / "remote" / "a" / "b").exists()


def test_a_tree_goes_there_with_the_manifest_last(url, monkeypatch):
    mirror = RemoteStorage(url)
    for name in ("MANIFEST.json", "rows.safetensors", "z.txt", ".tmp-x/half", "a/.tmp-half", "lock"):
        (mirror.path / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.path / name).write_text(name)
    order: list[str] = []
    whole = RemoteStorage.push
    monkeypatch.setattr(RemoteStorage, "push", lambda self, names: whole(self, order.extend(names) or order))
    mirror.push_tree(last=["MANIFEST.json"], skip=["lock"])
    assert order == ["rows.safetensors", "z.txt", "MANIFEST.json"]
    assert sorted(mirror.list()) == sorted(order)
    assert get(url, "MANIFEST.json") == "MANIFEST.json"


def test_what_is_removed_is_gone_and_removing_nothing_is_no_error(url):
    put(url, "step_1/MANIFEST.json", "x")
    put(url, "step_2/MANIFEST.json", "x")
    mirror = RemoteStorage(url)
    mirror.remove("step_1")
    mirror.remove("step_9")
    assert list(mirror.list()) == ["step_2/MANIFEST.json"]


def test_a_push_that_fails_leaves_no_half_file_under_a_final_name(tmp_path, monkeypatch):
    mirror = RemoteStorage(f"file://{tmp_path}/remote")
    mirror.path.mkdir(parents=True)
    (mirror.path / "part").write_bytes(b"x" * 1000)

    def half(local, target, **_):
        with open(target, "wb") as file:
            file.write(b"x" * 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mirror.files, "put_file", half)
    with pytest.raises(StorageError, match=r"could not be written: part: .*No space left"):
        mirror.push(["part"])
    assert not (tmp_path / "remote" / "part").exists()


def test_a_kind_of_url_without_its_package_says_what_to_install():
    with pytest.raises(ConfigError, match=r"nosuchstore://x: .*install the fsspec package"):
        RemoteStorage("nosuchstore://x")


def test_names_that_lead_outside_are_refused(url, monkeypatch):
    mirror = RemoteStorage(url)
    monkeypatch.setattr(mirror, "_found", lambda *_: {f"{mirror.root}/../../etc/passwd": {"size": 1}})
    with pytest.raises(DataError, match="no name inside it"):
        mirror.pull()


def test_several_who_pull_at_once_get_whole_files_and_fetch_each_once(url, monkeypatch):
    put(url, "big", "x" * 100_000)
    fetched = []
    mirrors = [RemoteStorage(url) for _ in range(4)]
    get_file = type(mirrors[0].files).get_file
    monkeypatch.setattr(
        type(mirrors[0].files),
        "get_file",
        lambda self, *args, **more: (fetched.append(args[0]), get_file(self, *args, **more)),
    )
    threads = [threading.Thread(target=mirror.pull) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1 and (mirrors[0].path / "big").stat().st_size == 100_000


def test_a_store_that_does_not_answer_is_told(url, monkeypatch):
    mirror = RemoteStorage(url)
    monkeypatch.setattr(mirror, "_found", lambda *_: (_ for _ in ()).throw(ConnectionError("timed out")))
    with pytest.raises(StorageError, match="could not be listed: timed out; check the address"):
        mirror.pull()


def test_a_cache_that_cannot_be_written_is_told(url, tmp_path, monkeypatch):
    if os.getuid() == 0:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "file"))
        put(url, "x", "x")
        with pytest.raises((StorageError, NotADirectoryError)):
            RemoteStorage(url).pull()
    else:
        (tmp_path / "cache").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="set MOCME_CACHE"):
            RemoteStorage(url).pull()


def test_a_file_that_goes_while_a_disk_is_listed_hides_no_other(tmp_path, monkeypatch):
    mirror = RemoteStorage(f"file://{tmp_path}/remote")
    for name in ("a/1", "a/2", "a/3"):
        mirror.put(name, b"x")
    stat = Path.stat

    def late(self, **kwargs):
        if self.name == "2":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return stat(self, **kwargs)

    monkeypatch.setattr(Path, "stat", late)
    assert list(mirror.list()) == ["a/1", "a/3"]


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    mirror = RemoteStorage(f"file://{tmp_path}/remote")
    mirror.put("a/b", b"x")

    def refused(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(StorageError, match=r"could not be listed: .*Permission denied"):
        mirror.list()
