"""Libraries are built once, in a folder that nobody else can write, and a compiler's failure says why."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mocme_dist.kernels import builder

COMPILER = builder.compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_a_source_is_built_once_and_again_when_anything_differs(cache, tmp_path):
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven(void) { return 7; }')
    assert builder.build(source, COMPILER, FLAGS).seven() == 7
    (first,) = cache.glob("*.so")
    before = first.stat().st_mtime_ns
    builder.build(source, COMPILER, FLAGS)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]  # and nothing is left of the building
    builder.build(source, COMPILER, FLAGS, b"another CPU")
    builder.build(source, COMPILER, (*FLAGS, "-O2"))
    source.write_text('extern "C" int seven(void) { return 8; }')
    assert builder.build(source, COMPILER, FLAGS).seven() == 8
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_library_is_built_anew(cache, tmp_path, damage):
    source = tmp_path / "nine.cpp"
    source.write_text('extern "C" int nine(void) { return 9; }')
    builder.build(source, COMPILER, FLAGS)
    (path,) = cache.glob("*.so")
    whole = path.read_bytes()
    middle = whole.index(b"\x09\x00\x00\x00")  # the constant of the one function
    broken = {
        "flipped": whole[:middle] + b"\x08" + whole[middle + 1 :],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": b"no library",
    }[damage]
    path.unlink()  # a new file: what is loaded stays mapped
    path.write_bytes(broken)
    assert builder.build(source, COMPILER, FLAGS).nine() == 9
    assert path.read_bytes() == whole


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1:1: error: no such thing' >&2\necho '    | ^' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        builder.try_compiler(str(broken))
    assert builder.complaint(caught.value) == "x.cpp:1:1: error: no such thing"
    assert builder.complaint(OSError("")) == "OSError" and builder.complaint(OSError("a\nb")) == "b"


def test_what_does_not_compile_says_why_and_leaves_nothing(cache, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int broken(void) { return nothing; }")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        builder.build(source, COMPILER, FLAGS)
    assert "nothing" in caught.value.stderr
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_may_write_is_not_used(cache):
    assert builder.library_folder() == cache
    cache.chmod(0o777)
    assert builder.library_folder() != cache
