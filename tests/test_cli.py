"""The console command, and the commands that look at data: `mocme NAME` is `python -m mocme_dist.NAME`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mocme_dist import __version__, check, cli, init, split
from mocme_dist.config import load_config
from mocme_dist.config.load import documented, shipped_configs
from mocme_dist.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf8").splitlines()


def test_every_command_of_the_console_is_a_module_with_a_main():
    import importlib

    for module, summary in cli.COMMANDS.values():
        assert callable(importlib.import_module(f"mocme_dist.{module}").main), module
        assert summary


def test_the_console_command_says_its_version_and_dispatches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mocme", "--version"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0 and capsys.readouterr().out.strip() == f"mocme_dist {__version__}"
    monkeypatch.setattr(sys, "argv", ["mocme", "split", str(tmp_path / "nowhere.tsv"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 3 and "file not found" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["mocme", "trian"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2


def test_the_config_module_runs_as_a_command_and_prints_what_it_was_given():
    command = [sys.executable, "-m", "mocme_dist.config", "--config", "worldfacts", "--set", "experts.width=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "  width: 64\n" in done.stdout and "# D, width in real numbers" in done.stdout


@pytest.mark.parametrize("name", ["", *sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))])
def test_a_documented_configuration_reads_back_equal(name, tmp_path):
    config = load_config([name] if name else [])
    (tmp_path / "all.yaml").write_text(documented(config), encoding="utf8")
    assert load_config([tmp_path / "all.yaml"]) == config


def test_a_shipped_configuration_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["mkg_w"]) == load_config([ROOT / "configs" / "mkg_w.yaml"])
    assert set(shipped_configs()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    with pytest.raises(ConfigError, match=r"--config mkg_x: neither a file nor a shipped configuration.*mkg_w"):
        load_config(["mkg_x"])
    # A file of that name in the working directory comes first.
    (tmp_path / "mkg_w").write_text("experts: {width: 32}", encoding="utf8")
    assert load_config(["mkg_w"]).experts.width == 32


def facts_file(folder: Path, count: int = 400) -> Path:
    path = folder / "facts.tsv"
    rows = [f"e{i % 40}\tr{i % 3}\te{(i * 7 + i // 40) % 40}" for i in range(count)]
    path.write_text("\n".join([*rows, rows[0], "lonely\trare\te1"]) + "\n", encoding="utf8")
    return path


def test_split_keeps_every_name_in_train_and_every_fact_once(tmp_path):
    facts = facts_file(tmp_path)
    report = split.split_facts(facts, tmp_path / "out", valid=0.1, test=0.2, seed=3)
    parts = {name: lines(tmp_path / "out" / f"{name}.txt") for name in split.SPLITS}
    every = Counter(line for part in parts.values() for line in part)
    assert every == Counter(set(lines(facts)))
    total = len(every)
    assert len(parts["test"]) == round(0.2 * total) == report["test"]
    assert abs(len(parts["valid"]) - 0.1 * total) <= 1
    names = [{name for line in part for name in line.split("\t")} for part in parts.values()]
    assert names[0] >= names[1] | names[2]
    assert "lonely\trare\te1" in parts["train"]
    split.split_facts(facts, tmp_path / "again", valid=0.1, test=0.2, seed=3)
    assert [lines(tmp_path / "again" / f"{name}.txt") for name in split.SPLITS] == list(parts.values())


def test_split_reports_what_train_gives_away_of_test(tmp_path):
    rows = [f"a{i}\tr\tb{i}\nb{i}\tinverse\ta{i}" for i in range(50)] + [f"a{i}\tx\tb{i + 1}" for i in range(49)]
    (tmp_path / "facts.tsv").write_text("\n".join(rows) + "\n", encoding="utf8")
    report = split.split_facts(tmp_path / "facts.tsv", tmp_path / "out")
    train = {tuple(line.split("\t")[::2]) for line in lines(tmp_path / "out" / "train.txt")}
    test = [tuple(line.split("\t")[::2]) for line in lines(tmp_path / "out" / "test.txt")]
    assert report["test_inverse_pairs_in_train"]["triples"] == sum((t, h) in train for h, t in test) > 0


def test_split_refuses_what_it_cannot_do(tmp_path):
    facts = facts_file(tmp_path)
    with pytest.raises(ConfigError, match="expected shares above 0 with a sum below 1"):
        split.split_facts(facts, tmp_path / "out", valid=0.5, test=0.5)
    split.split_facts(facts, tmp_path / "out")
    before = lines(tmp_path / "out" / "train.txt")
    with pytest.raises(ConfigError, match=r"train\.txt exists already"):
        split.split_facts(facts, tmp_path / "out")
    assert lines(tmp_path / "out" / "train.txt") == before
    (tmp_path / "few.tsv").write_text("a\tr\tb\n", encoding="utf8")
    with pytest.raises(DataError, match=r"^--test 0\.1: 1 of 1 train triples to hold out"):
        split.split_facts(tmp_path / "few.tsv", tmp_path / "few")


def test_check_reports_as_pack_does_and_leaves_nothing(tiny_raw, tiny_dataset, tmp_path, monkeypatch, capsys):
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.pack import report_lines

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    check.main([str(tiny_raw), "--set", "data.shard_rows=16"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{tiny_raw}: 60 entities, 4 relations")
    assert shown[1:] == list(report_lines(Dataset.open(tiny_dataset)))[1:]
    assert list(tmp_path.iterdir()) == []


def test_init_writes_a_configuration_for_what_is_there(raw_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    init.main([str(raw_copy)])
    config = load_config([tmp_path / "raw.yaml"])
    assert config.modalities == ("structure", "text", "numeric", "image")
    assert config.data.text_columns == ("label", "description")
    assert config.data.raw == str(raw_copy)
    assert "mocme train --config raw.yaml" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists already"):
        init.main([str(raw_copy)])
    (raw_copy / "text.tsv").write_text("entity\tkind\tname\nitem 01\ta\tb\n")
    init.main([str(raw_copy), "--output", "named.yaml"])
    assert load_config([tmp_path / "named.yaml"]).data.text_columns == ("name", "kind")
    (raw_copy / "valid.txt").unlink()
    (raw_copy / "text.tsv").unlink()
    init.main([str(raw_copy), "--output", "other.yaml"])
    config = load_config([tmp_path / "other.yaml"])
    assert config.data.dev == "cut:0.1" and "text" not in config.modalities


def test_init_names_a_folder_that_is_no_raw_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        init.main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"train\.txt"):
        init.main([str(tmp_path)])


def test_an_import_prints_its_counts_as_json(tmp_path, capsys):
    import importlib

    command = importlib.import_module("mocme_dist.import")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "valid", "test"):
        (source / f"{name}.del").write_text("0\t0\t1\n", encoding="utf8")
    (source / "entity_ids.del").write_text("0\ta\n1\tb\n", encoding="utf8")
    (source / "relation_ids.del").write_text("0\tr\n", encoding="utf8")
    command.main(["libkge", str(source), str(tmp_path / "raw")])
    assert json.loads(capsys.readouterr().out)["train.txt"] == 1
    assert lines(tmp_path / "raw" / "train.txt") == ["a\tr\tb"]


@pytest.mark.parametrize(
    "line, found",
    [
        ("mocme tr", ["train"]),
        ("mocme config --config mkg_", ["mkg_w", "mkg_y"]),
        ("mocme train --set train.epo", ["train.epochs="]),
        ("mocme split facts.tsv out --va", ["--valid"]),
    ],
)
def test_the_shell_completes_commands_options_configurations_and_settings(line, found, tmp_path):
    answer = tmp_path / "answer"
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    variables |= {"COMP_TYPE": "9", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    command = [sys.executable, "-m", "mocme_dist.cli"]
    subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, check=True, timeout=200)
    assert [word.strip() for word in answer.read_text().split("\n") if word.strip()] == found
