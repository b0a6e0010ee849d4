"""The extract command as a user runs it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mocme_dist.extract
from mocme_dist.commands import run_command
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder

ROOT = Path(__file__).parent.parent
TINY = ["--set", "encoders.text.model=tiny-random", "encoders.text.random_weights=true"]


def extract(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mocme_dist.extract", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)


@pytest.fixture
def extract_here(monkeypatch, capsys, caplog) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in this process, which has imported its libraries already."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command, code = ["extract", *map(str, arguments)], 0
        monkeypatch.setattr("sys.argv", command)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            try:
                run_command(mocme_dist.extract.main)
            except SystemExit as end:
                code = int(end.code or 0)
        told = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, told.out, caplog.text + told.err)

    return call


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.txt").write_text("a\tknows\tb\nb\tknows\tc\nc\tknows\ta\n")
    (raw / "valid.txt").write_text("b\tknows\ta\n")
    (raw / "test.txt").write_text("a\tknows\tc\n")
    (raw / "text.tsv").write_text("entity\tlabel\na\tAnna\nb\tBo\n")
    pack_folder(raw, tmp_path / "dataset", DataConfig(shard_rows=2))
    return tmp_path / "dataset"


def test_the_last_line_is_the_report(directory):
    done = extract(directory, "--local", *TINY)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["modalities"]["text"]["present"] == 2 and report["modalities"]["text"]["parts"] == {
        "done": 2,
        "skipped": 0,
    }
    assert "RANDOM WEIGHTS" in done.stderr and "modality" in done.stderr
    assert (directory / "features" / "text" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--set", "encoders.actor=3"], 2, "did you mean actors?"),
        (["--set", "encoders.text.model=./nowhere"], 2, "folder not found"),
    ],
)
def test_mistakes_leave_with_their_code_and_one_block(directory, arguments, code, message):
    done = extract(directory, "--local", *arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_no_data_set_is_a_data_error(tmp_path):
    done = extract(tmp_path, "--local")
    assert done.returncode == 3 and "run python -m mocme_dist.pack" in done.stderr


def test_help_names_the_flags():
    """How soon it answers, and that it imports nothing heavy, is in test_commands.py."""
    done = extract("--help")
    assert done.returncode == 0 and all(
        flag in done.stdout for flag in ("--strict", "--max-missing", "--on-bad-shard", "--local")
    )


def test_flags_reach_the_configuration(directory, extract_here):
    done = extract_here(directory, "--local", *TINY, "--max-missing", "0.1")
    assert done.returncode == 3 and "1 of 3 entities have no features (33.3 %)" in done.stderr
    shutil.rmtree(directory / "features")
    shard = directory / "shards" / "entities-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    done = extract_here(directory, "--local", *TINY)
    assert (
        done.returncode == 3
        and "entities-000000.tar" in done.stderr
        and "sha256" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = extract_here(directory, "--local", *TINY, "--on-bad-shard", "skip")
    assert done.returncode == 0 and "left out: entities-000000.tar" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["n_skipped"] == 1
