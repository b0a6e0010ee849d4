"""torch.compile is used where all that it takes is there, and what is missing is named before the first step."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sysconfig

import pytest
import torch
from tiny_run import tiny_config
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import clear_caches

from mocme_dist.errors import ConfigError
from mocme_dist.parallel.comm import communication
from mocme_dist.training import build
from mocme_dist.training.build import build_worker, compiler_fails, open_dataset, use_compiler

CPU = torch.device("cpu")


@pytest.mark.parametrize("missing", ["C++ compiler", "Python.h"])
def test_what_is_missing_is_named_and_auto_goes_on_without(monkeypatch, tmp_path, caplog, missing):
    if missing == "C++ compiler":
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    else:
        monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"compile: on, but no {re.escape(missing)}.* is found on this machine"):
        use_compiler("on", CPU)
    assert not use_compiler("off", CPU) and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not use_compiler("auto", CPU)
    assert missing in caplog.text and "plain form" in caplog.text


@pytest.mark.parametrize("when", ["at once", pytest.param("at the first graph", marks=pytest.mark.slow)])
def test_a_compiler_that_fails_is_quoted_and_auto_goes_on_without(monkeypatch, tmp_path, caplog, when):
    # torch compiles to find out what the CPU can, and keeps it: not by a compiler that fails, for the tests to come.
    pick_vec_isa()
    script = "case $1 in *version) exec /usr/bin/g++ $1;; esac\n"  # torch asks for it
    script += "" if when == "at once" else "case $3 in -c) exit 0;; esac\n"
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{script}echo 'fatal error: cannot execute cc1plus' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    clear_caches()  # what an earlier test of this process compiled
    compiler_fails.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"compile: on, but the compiler fails \(fatal error: .* cc1plus\); "):
            use_compiler("on", CPU)
        with caplog.at_level(logging.WARNING):
            assert not use_compiler("auto", CPU)
        assert [record.getMessage() for record in caplog.records if "cc1plus" in record.getMessage()] == [
            "the compiler fails (fatal error: cannot execute cc1plus): the loss runs in its plain form, "
            "about a hundred times slower"
        ]
    finally:
        # torch remembers the compiler that it found, and what it could compile with it.
        monkeypatch.undo()
        cpp_builder.cpp_compiler_search.cache_clear()
        clear_caches()
        compiler_fails.cache_clear()
        torch.compiler.reset()


def test_a_machine_that_has_all_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build, "compiler_fails", lambda _: None)
    assert use_compiler("auto", CPU) and use_compiler("on", CPU)


def test_cuda_graphs_without_a_gpu_are_refused(featured_dataset, tmp_path):
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure]", "train.cuda_graphs=true")
    with (
        communication(60) as comm,
        pytest.raises(ConfigError, match=r"train.cuda_graphs: needs a GPU and compile=on; .*set it to auto or false"),
    ):
        build_worker(config, open_dataset(config.data), comm)


def test_zero_3_on_a_gpu_tells_rank_0_that_encoding_has_no_graph(caplog):
    """`_encodes_in_graph` is what `build_worker` asks; no GPU is needed to be told."""
    with caplog.at_level(logging.WARNING):
        assert build._encodes_in_graph(True, 2, 0)
        assert not build._encodes_in_graph(False, 3, 0) and not build._encodes_in_graph(True, 3, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not build._encodes_in_graph(True, 3, 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "deepspeed.stage=3" in record.getMessage() and "without the graph" in record.getMessage()
