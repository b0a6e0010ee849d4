"""export and query as a user meets them: from a run to answers on the command line, and one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mocme_dist import export, query
from mocme_dist.errors import CheckpointError, ConfigError

HEAVY = ("torch", "ray", "deepspeed", "transformers", "pandas", "torchvision", "tensorboard")


@pytest.fixture
def ask(bundle_dir, monkeypatch, capsys):
    """`ask(*arguments)`: the query command in this process; what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["query", str(bundle_dir), *arguments])
        query.main()
        return capsys.readouterr().out

    return run


def test_a_question_gives_a_table(ask, bundle):
    first, *lines = ask("--head", "item 05", "--relation", "near", "--top", "3").splitlines()
    frame = bundle.predict(head="item 05", relation="near", top=3)
    assert first == "item 05 -near-> ?" and len(lines) == 3
    for line, (_, row) in zip(lines, frame.iterrows(), strict=True):
        assert re.fullmatch(rf"\s+{row['rank']:g}  {row['answer']}\s+{row['probability']:.1%}  score\s+{row['score']:.3f}", line)
    assert "known" in ask("--head", "item 05", "--relation", "near", "--top", "60", "--filter", "none")
    assert ask("--tail", "item 05", "--relation", "near").splitlines()[0] == "? -near-> item 05"
    placed = ask("--head", "item 05", "--relation", "near", "--tail", "item 09").splitlines()[1:]
    assert [line.split("as the ")[1] for line in placed] == ["tail", "head"]


def test_json_holds_what_the_table_holds_and_the_explanation(ask, bundle):
    found = json.loads(ask("--head", "item 05", "--relation", "near", "--top", "3", "--json", "--explain"))
    frame = bundle.predict(head="item 05", relation="near", top=3)
    assert [answer["entity"] for answer in found["answers"]] == frame["answer"].tolist()
    assert set(found["answers"][0]) == {"rank", "entity", "side", "score", "probability", "known"}
    assert found["explanation"]["source"]["entity"] == "item 05" and len(found["explanation"]["answers"]) == 3
    text = ask("--head", "item 05", "--relation", "near", "--explain")
    assert "item 05: vector made of structure " in text and "    nearest by structure: item " in text


def test_a_new_entity_is_asked_about_without_training(ask, bundle):
    found = json.loads(ask("--new", "name=item X,text=a longer text,size=0.5", "--relation", "near", "--json", "--explain"))
    assert found["head"] == "item X" and found["tail"] is None and len(found["answers"]) == 10
    weights = found["explanation"]["source"]["weights"]
    assert set(weights) == {"text", "numeric"} and sum(weights.values()) == pytest.approx(1)
    assert ask("--new", "name=item X,text=a", "--as", "tail", "--relation", "near").splitlines()[0] == "? -near-> item X (new)"


def test_a_file_of_questions_is_answered_into_parquet(ask, tmp_path):
    import pyarrow.parquet

    (tmp_path / "questions.tsv").write_text("item 05\tnear\t?\n?\tkind\titem 07\n")
    out = ask("--queries", str(tmp_path / "questions.tsv"), "--output", str(tmp_path / "answers.parquet"), "--top", "5")
    assert json.loads(out) == {"output": str(tmp_path / "answers.parquet"), "questions": 2, "answers": 10}
    assert pyarrow.parquet.read_table(tmp_path / "answers.parquet").num_rows == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --relation with --head, --tail or --new, or --queries FILE"),
        (["--queries", "x.tsv"], "--queries needs --output FILE"),
        (["--queries", "x.tsv", "--output", "y.tsv", "--head", "a"], "--head: not together with --queries"),
        (["--relation", "near", "--output", "y.tsv"], "--output goes with --queries"),
        (["--relation", "near", "--as", "tail"], "--as goes with --new"),
    ],
)
def test_what_does_not_go_together_is_said(ask, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        ask(*arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=400)


def test_mistakes_leave_with_their_code_and_one_line(bundle_dir, tmp_path):
    for code, message, *arguments in (
        (2, r"entity 'itm 05': not known here; did you mean 'item 05'", bundle_dir, "--head", "itm 05", "--relation", "near"),
        (3, r"no bundle.json in it; not a bundle", tmp_path, "--head", "a", "--relation", "b"),
    ):
        done = command("mocme_dist.query", *arguments)
        assert done.returncode == code and done.stdout == "", done.stderr
        assert len(done.stderr.splitlines()) == 1 and re.match(rf"error: \w+: .*{message}", done.stderr)


def test_a_question_starts_without_the_heavy_libraries(bundle_dir):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['query', {str(bundle_dir)!r}, '--head', 'item 05', '--relation', 'near', '--explain']\n"
        "runpy.run_module('mocme_dist.query', run_name='__main__')\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout[-300:] + done.stderr


def test_the_export_command_writes_what_the_query_command_reads(answered_run, tmp_path, monkeypatch, capsys):
    def run(module: ModuleType, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out.splitlines()[-1]

    report = json.loads(run(export, answered_run, tmp_path / "bundle", "--dtype", "float16"))
    assert report["kind"] == "bundle" and report["num_entities"] == 60 and report["bytes"] > 0
    found = json.loads(run(query, tmp_path / "bundle", "--head", "item 05", "--relation", "near", "--json"))
    assert len(found["answers"]) == 10
    for kind, message, *arguments in (
        (ConfigError, r"not a run directory: no config.yaml in it", tmp_path, tmp_path / "out"),
        (ConfigError, r"holds an export of format bundle, not npz", answered_run, tmp_path / "bundle", "--format", "npz"),
        (CheckpointError, r"step_0000000999: MANIFEST.json is missing or torn", answered_run, tmp_path / "out", "--step", "999"),
    ):
        with pytest.raises(kind, match=message):
            run(export, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_the_commands_tell_enough_to_work_from():
    told = {"export": ("RUN_DIR", "BUNDLE_DIR", "--format", "--step", "--dtype"), "query": ("--head", "--new", "--queries", "--explain")}
    for module, words in told.items():
        done = command(f"mocme_dist.{module}", "--help")
        assert done.returncode == 0 and done.stderr == ""
        assert all(word in done.stdout for word in (*words, "exit codes: 0 done, 2 configuration"))
    assert Path(query.__file__).name == "query.py"


def test_a_reader_that_goes_away_is_no_mistake(bundle_dir):
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "mocme_dist.query", str(bundle_dir), "--head", "item 05", "--relation", "near"]
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, text=True, timeout=400)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""
