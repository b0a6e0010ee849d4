"""The extract command as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder

ROOT = Path(__file__).parent.parent
TINY = ["--set", "encoders.text.model=tiny-random", "encoders.text.random_weights=true"]


def extract(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mocme_dist.extract", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


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
    assert report["modalities"]["text"]["present"] == 2 and report["modalities"]["text"]["parts"] == {"done": 2, "skipped": 0}
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


def test_help_answers_at_once():
    started = time.monotonic()
    done = extract("--help")
    assert done.returncode == 0 and "--strict" in done.stdout and time.monotonic() - started < 5
