"""Libraries are built once, in a folder that nobody else can write, and a compiler's failure says why."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mocme_dist import compiled

COMPILER = compiled.first_of("cc", "gcc", "clang")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_a_source_is_built_once_and_again_when_anything_differs(cache, tmp_path):
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    assert compiled.build(source, COMPILER, FLAGS).seven() == 7
    (first,) = cache.glob("*.so")
    before = first.stat().st_mtime_ns
    compiled.build(source, COMPILER, FLAGS)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]  # and nothing is left of the building
    compiled.build(source, COMPILER, FLAGS, b"another CPU")
    compiled.build(source, COMPILER, (*FLAGS, "-O2"))
    source.write_text("int seven(void) { return 8; }")
    assert compiled.build(source, COMPILER, FLAGS).seven() == 8
    assert len(list(cache.iterdir())) == 4


def test_what_does_not_compile_says_why_and_leaves_nothing(cache, tmp_path):
    source = tmp_path / "broken.c"
    source.write_text("int broken(void) { return nothing; }")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compiled.build(source, COMPILER, FLAGS)
    assert "nothing" in caught.value.stderr
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_may_write_is_not_used(cache):
    assert compiled.cache_folder() == cache
    cache.chmod(0o777)
    assert compiled.cache_folder() != cache
