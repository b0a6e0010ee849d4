"""torch.compile is used where all that it takes is there, and what is missing is named before the first step."""

from __future__ import annotations

import logging
import re
import shutil
import sysconfig

import pytest
import torch
from tiny_run import tiny_config

from mocme_dist.config import load_config
from mocme_dist.errors import ConfigError
from mocme_dist.parallel.comm import communication
from mocme_dist.training import monitor
from mocme_dist.training.worker import Worker, open_dataset, use_compiler

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


def test_a_machine_that_has_all_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert use_compiler("auto", CPU) and use_compiler("on", CPU)


def test_cuda_graphs_without_a_gpu_are_refused(featured_dataset, tmp_path):
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure]", "train.cuda_graphs=true")
    with communication(60) as comm, pytest.raises(ConfigError, match=r"train.cuda_graphs: needs a GPU and compile=on; .*set it to false"):
        Worker(config, open_dataset(config), comm)


def test_who_has_amx_is_told_what_is_faster_unless_it_is_set(monkeypatch):
    advised = lambda *settings: monitor.advice(load_config([], list(settings)), CPU)  # noqa: E731
    monkeypatch.setattr(monitor, "has_amx", lambda: False)
    assert advised() is None
    monkeypatch.setattr(monitor, "has_amx", lambda: True)
    assert "train.precision=bfloat16x3 mine.precision=bfloat16x3" in advised()
    for setting in ("mine.precision=bfloat16", "deepspeed.bf16=true", "compile=off", "deepspeed.stage=3"):
        assert advised(setting) is None, setting
    assert monitor.advice(load_config([], []), torch.device("cuda")) is None
