"""export and query as a user meets them: from a run to answers on the command line, and one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest

from mocme_dist import evaluate, export, query
from mocme_dist.data import files
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.errors import CheckpointError, ConfigError, StorageError
from mocme_dist.serving.bundle import Bundle

HEAVY = ("torch", "ray", "deepspeed", "transformers", "pandas", "torchvision", "tensorboard")


@pytest.fixture
def ask(bundle_dir, monkeypatch, capsys):
    """`ask(*arguments)`: the query command in this process; what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["query", str(bundle_dir), "--trust-encoders", *arguments])
        query.main()
        return capsys.readouterr().out

    return run


def shown(row: Any) -> str:
    """Pattern of an answer's name in a table."""
    return re.escape(row["id"] if row["id"] == row["label"] else f"{row['label']} ({row['id']})")


def test_a_question_gives_a_table(ask, bundle):
    first, *lines = ask("--head", "item 05", "--relation", "near", "--top", "3").splitlines()
    frame = bundle.predict("item 05", "near", k=3)
    assert first == "label of item 05 (item 05) -near-> ?" and len(lines) == 3
    for line, (_, row) in zip(lines, frame.iterrows(), strict=True):
        assert re.fullmatch(
            rf"\s+{row['rank']:g}  {shown(row)}\s+{row['probability']:.1%}  score\s+{row['score']:.3f}", line
        )
    assert "known" in ask("--head", "item 05", "--relation", "near", "--top", "60", "--filter", "none")
    assert ask("--tail", "item 05", "--relation", "near").splitlines()[0] == "? -near-> label of item 05 (item 05)"
    placed = ask("--head", "item 05", "--relation", "near", "--tail", "item 09").splitlines()[1:]
    assert [line.split("as the ")[1] for line in placed] == ["tail", "head"]


def test_json_holds_what_the_table_holds_and_the_explanation(ask, bundle):
    found = json.loads(ask("--head", "item 05", "--relation", "near", "--top", "3", "--json", "--explain"))
    frame = bundle.predict("item 05", "near", k=3)
    assert [answer["id"] for answer in found["answers"]] == frame["id"].tolist()
    assert set(found["answers"][0]) == {"direction", "rank", "id", "label", "score", "probability", "known"}
    assert found["explanation"]["source"]["id"] == "item 05" and len(found["explanation"]["answers"]) == 3
    text = ask("--head", "item 05", "--relation", "near", "--explain")
    assert "label of item 05 (item 05): vector made of structure " in text and "    nearest by structure: " in text
    for answer in found["explanation"]["answers"]:
        row = bundle.find_entity(answer["id"])
        assert answer["reasons"] == json.loads(json.dumps(bundle.explain("item 05", "near", row)))
        assert all(sentence in text for sentence in answer["reasons"]["sentences"])


def test_a_new_entity_is_asked_about_without_training(ask, bundle):
    found = json.loads(
        ask("--new", "name=item X,text=a longer text,size=0.5", "--relation", "near", "--json", "--explain")
    )
    assert found["head"] == "item X" and found["tail"] is None and len(found["answers"]) == 10
    weights = found["explanation"]["source"]["weights"]
    assert set(weights) == {"text", "numeric"} and sum(weights.values()) == pytest.approx(1)
    assert (
        ask("--new", "name=item X,text=a", "--as", "tail", "--relation", "near").splitlines()[0]
        == "? -near-> item X (new)"
    )


def test_verify_reads_every_file_of_a_copy_that_was_verified_before(ask, bundle_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_YOUNG_S", 0.0)
    read, whole = [], files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path.name) or whole(path))
    question, names = ("--head", "item 05", "--relation", "near"), json.loads((bundle_dir / "bundle.json").read_text())
    for arguments, expected in ((question, True), (question, False), ((*question, "--verify"), True)):
        read.clear()
        ask(*arguments)
        assert sorted(read) == (sorted(names["files"]) if expected else [])


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
        (["--relations", "--head", "a"], "--head: not together with --relations"),
        (["--relations", "--entities", "a"], "--entities, --relations: give one of them"),
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
        (
            2,
            r"entity 'itm 05': not known here; did you mean 'item 05'",
            bundle_dir,
            "--head",
            "itm 05",
            "--relation",
            "near",
        ),
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
        trust = (
            ["--trust-encoders"] if module is export else []
        )  # the pictures of this run are read by a module of the tests
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments), *trust])
        module.main()
        return capsys.readouterr().out.splitlines()[-1]

    report = json.loads(run(export, answered_run, tmp_path / "bundle", "--dtype", "float16"))
    assert report["kind"] == "bundle" and report["num_entities"] == 60 and report["bytes"] > 0
    found = json.loads(run(query, tmp_path / "bundle", "--head", "item 05", "--relation", "near", "--json"))
    assert len(found["answers"]) == 10
    for kind, message, *arguments in (
        (ConfigError, r"not a run directory: no config.yaml in it", tmp_path, tmp_path / "out"),
        (
            ConfigError,
            r"holds an export of format bundle, not npz",
            answered_run,
            tmp_path / "bundle",
            "--format",
            "npz",
        ),
        (
            CheckpointError,
            r"no checkpoint of step 999; it has",
            answered_run,
            tmp_path / "out",
            "--step",
            "999",
        ),
    ):
        with pytest.raises(kind, match=message):
            run(export, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path, monkeypatch):
    """A place for a bundle behind fsspec, with an own cache of copies."""
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    yield f"file://{tmp_path}/there/bundle" if request.param == "file" else f"memory://{tmp_path.name}/bundle"
    fsspec.filesystem("memory").store.clear()


def test_an_export_at_a_url_is_replaced_by_one_write(answered_run, url, monkeypatch, capsys):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["export", "--trust-encoders", str(answered_run), url, *map(str, arguments)])
        export.main()

    run()
    mirror, opened = RemoteStorage(url), Bundle.open(url)
    before = mirror.list()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bundle"] == url
    assert {name.split("/")[0] for name in before} == {"bundle.json", opened.directory.name}

    put, sent = RemoteStorage.put, []

    def failing(self, name, content):
        sent.append(name)
        if len(sent) == 3:
            raise StorageError("no answer")
        put(self, name, content)

    monkeypatch.setattr(RemoteStorage, "put", failing)
    with pytest.raises(StorageError):
        run("--dtype", "float16")
    assert Bundle.open(url).vector_parts[0].dtype == np.float32
    run("--dtype", "float16")
    assert len(sent) == len(set(sent)) + 1  # what had been sent did not go again
    assert Bundle.open(url).vector_parts[0].dtype == np.float16
    assert len(mirror.list()) == len(before) and not opened.directory.exists()
    assert opened.vector_parts[0].dtype == np.float32  # it was mapped when it was opened
    with pytest.raises(ConfigError, match="holds an export of format bundle, not npz"):
        run("--format", "npz")
    mirror.remove("bundle.json")
    run()  # as a first export that was killed
    mirror.put("thesis.tex", b"1")
    mirror.remove("bundle.json")
    with pytest.raises(ConfigError, match="holds files that are no export"):
        run()


def test_the_commands_tell_enough_to_work_from():
    told = {
        "export": ("RUN_DIR", "BUNDLE_DIR", "--format", "--step", "--dtype"),
        "query": ("--head", "--new", "--queries", "--explain", "--entities", "--relations", "--range", "--candidates"),
    }
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


EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
"""


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A file that appears when the module `evil_encoder` is imported, which can be found."""
    (tmp_path / "evil_encoder.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_encoder", raising=False)
    return tmp_path / "ran"


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_bundle_of_a_stranger_runs_no_code_unless_its_encoders_are_trusted(
    bundle_dir, evil, modality, monkeypatch, tmp_path
):
    """Before any hash is looked at, and whichever modality the question gives."""
    from PIL import Image

    given = Path(shutil.copytree(bundle_dir, tmp_path / "given"))
    manifest = json.loads((given / "bundle.json").read_text())
    manifest["config"]["encoders"][modality]["model"] = "evil_encoder:build"
    (given / "bundle.json").write_text(json.dumps(manifest))
    Image.new("RGB", (8, 8)).save(tmp_path / "new.png")
    question = ["query", str(given), "--new", f"name=X,image={tmp_path / 'new.png'}", "--relation", "near"]
    monkeypatch.setattr(sys, "argv", question)
    refused = rf"given: .*encoders\.{modality}\.model='evil_encoder:build' would import and run code.*--trust-encoders"
    with pytest.raises(ConfigError, match=refused):
        query.main()
    assert not evil.exists()
    if modality == "image":
        monkeypatch.setattr(sys, "argv", [*question, "--trust-encoders"])
        with pytest.raises(ConfigError, match=r"evil_encoder:build: .*has no attribute 'build'"):
            query.main()
        assert evil.exists()


def test_a_run_of_a_stranger_names_no_code_either(answered_run, evil, tmp_path, monkeypatch):
    run = Path(shutil.copytree(answered_run, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    assert "model: log_mel" in text
    (run / "config.yaml").write_text(text.replace("model: log_mel", "model: evil_encoder:build"))
    for module, more in ((export, [str(tmp_path / "out")]), (evaluate, [])):
        monkeypatch.setattr(sys, "argv", ["command", str(run), *more])
        with pytest.raises(ConfigError, match=r"run: .*encoders\.audio\.model='evil_encoder:build'.*--trust-encoders"):
            module.main()
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "out"), "--trust-encoders"])
    export.main()
    assert (tmp_path / "out" / "bundle.json").is_file() and not evil.exists()
