"""The pack command: what it prints, and the code it leaves with."""

import re
import subprocess
import sys

import pytest

from mocme_dist import pack
from mocme_dist.config import load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import ConfigError


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mocme_dist.pack", *map(str, arguments)], capture_output=True, text=True, timeout=400
    )


def test_report_names_counts_shares_and_leakage(tiny_raw, tmp_path, capsys):
    pack.main([str(tiny_raw), str(tmp_path / "out"), "--shard-rows", "16"])
    text = capsys.readouterr().out
    assert "60 entities, 4 relations" in text and "4 shards of 16 ids" in text
    for pattern in (
        r"triples: +train 288, valid 36, test 36",
        r"duplicates: train 0 dropped",
        r"text: +\d+ of 60 \([\d.]+ %\) of entities; columns label, description",
        r"none: +\d+ of 60 \([\d.]+ %\) of entities",
        r"0 of 36 \(0.0 %\) test triples that occur in train",
        r"0 of 36 \(0.0 %\) test triples whose \(tail, head\) is linked in train",
        (
            r"0 of 36 \(0.0 %\) valid triples with an entity \(0\) or relation \(0\) that train never shows;"
            r" data.unseen=error"
        ),
    ):
        assert re.search(pattern, text), (pattern, text)


def test_flags_stand_above_set_and_set_above_files(tiny_raw, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {seed: 3, shard_rows: 11, unseen: keep}\n")
    arguments = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--set",
        "data.shard_rows=12",
        "data.dev=cut:0.1",
        "--shard-rows",
        "13",
    ]
    pack.main([str(tiny_raw), str(tmp_path / "out"), *arguments])
    manifest = Dataset.open(tmp_path / "out").manifest
    assert (manifest["seed"], manifest["shard_rows"], manifest["dev"]) == (3, 13, "cut:0.1")
    assert manifest["source"]["settings"]["unseen"] == "keep"
    with pytest.raises(ConfigError, match=r"data.shard_rows: .* got 0"):
        pack.main([str(tiny_raw), str(tmp_path / "zero"), "--shard-rows", "0"])
    assert load_config().data.shard_rows == 4096


def test_command_leaves_with_the_code_of_its_error_and_one_line(raw_copy, tmp_path):
    done = run(raw_copy, tmp_path / "a b é")
    assert done.returncode == 0 and "fingerprint" in done.stdout
    with (raw_copy / "train.txt").open("a") as file:
        file.write("item 01\tnear\n")
    wrong = run(raw_copy, tmp_path / "out")
    assert wrong.returncode == 3
    assert (
        wrong.stderr
        == "error: DataError: train.txt:289: expected 3 tab-separated fields (head, relation, tail), got 2\n"
    )
    typo = run(raw_copy, tmp_path / "out", "--set", "data.shard_row=5")
    assert typo.returncode == 2 and "did you mean shard_rows?" in typo.stderr and "Traceback" not in typo.stderr


def test_help_answers_without_heavy_imports():
    code = (
        "import sys, mocme_dist.pack; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'webdataset',"
        " 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=400).returncode == 0
    shown = run("--help")
    assert shown.returncode == 0 and "RAW_DIR" in shown.stdout and "exit codes" in shown.stdout
