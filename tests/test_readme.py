"""Python in README and in the package's own description runs as it stands, against a bundle of a small map of Europe.
So do the questions in README, in the documentation and in `mocme query --help`.

Every fenced block of python is a doctest (>>> lines); one that is not fails here, so none is skipped in silence. Blocks
run one after another in one session, in a folder that holds bundles/demo.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import mocme_dist
from mocme_dist.data.dataset import Dataset
from mocme_dist.runs.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
BORDERS = {
    "Norway": "Sweden Finland Russia",
    "Sweden": "Finland",
    "Finland": "Russia",
    "Denmark": "Germany",
    "Germany": "Poland France Austria Switzerland Netherlands Belgium Luxembourg Czechia",
    "France": "Belgium Luxembourg Switzerland Italy Spain",
    "Belgium": "Netherlands Luxembourg",
    "Austria": "Italy Switzerland Czechia Hungary",
    "Italy": "Switzerland",
    "Spain": "Portugal",
    "Poland": "Czechia Russia Lithuania",
    "Lithuania": "Latvia Russia",
    "Latvia": "Estonia Russia",
    "Estonia": "Russia",
}


CITIES = {"Fier": "Albania", "Tirana": "Albania", "Oslo": "Norway", "Bergen": "Norway"}


def questions(text: str, command: str = "query") -> list[str]:
    """The arguments of a command about the demo's bundle, continued lines joined, without remarks."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [re.search(rf"mocme {command} (bundles/demo .*?)(\s{{3,}}.*)?$", line) for line in lines]
    return [match[1] for match in found if match]


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, content) of the fenced blocks of python or pycon."""
    found = re.finditer(r"^```(?:python|pycon|py)\b[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


@pytest.fixture(scope="module")
def folder_with_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles/demo: a real, very short run over the borders above."""
    from mocme_dist.config import load_config
    from mocme_dist.serving.export import export_bundle
    from mocme_dist.serving.rows import RunRows
    from mocme_dist.train import resolve_paths, train
    from mocme_dist.training.build import open_dataset

    folder = tmp_path_factory.mktemp("readme")
    raw = folder / "raw"
    raw.mkdir()
    facts = [(head, "borders", tail) for head, tails in BORDERS.items() for tail in tails.split()]
    facts += [(tail, "borders", head) for head, _, tail in facts]
    facts += [(name, "in_continent", "Europe") for name in sorted({head for head, _, _ in facts})]
    facts += [(city, "city_in_country", country) for city, country in CITIES.items()]
    for split, part in (
        ("train", facts),
        ("valid", [("Portugal", "borders", "France")]),
        ("test", [("Hungary", "borders", "Czechia")]),
    ):
        (raw / f"{split}.txt").write_text("".join("\t".join(fact) + "\n" for fact in part), encoding="utf8")
    numbers = [f"{name}\tpopulation_log10\t{at}\n" for at, name in enumerate(sorted(BORDERS))]
    (raw / "numeric.tsv").write_text("".join(["entity\tattribute\tvalue\n", *numbers]), encoding="utf8")
    texts = [f"{name}\t{name}\ta country\n" for name in sorted(BORDERS)]
    (raw / "text.tsv").write_text("".join(["entity\tlabel\tdescription\n", *texts]), encoding="utf8")
    settings = [
        "launch.mode=local",
        "deepspeed.engine=torch",
        "compile=off",
        "modalities=[structure, numeric, text]",
        "encoders.text.model=tiny-random",
        "encoders.text.random_weights=true",
        "data.shard_rows=8",
        "experts.width=8",
        "train.epochs=2",
    ]
    settings += ["train.batch_size=16", "negatives.chunk_size=16", "negatives.count=8", "rotate.gamma=4"]
    settings += [f"data.raw={json.dumps(str(raw))}", f"run.dir={json.dumps(str(folder / 'runs' / 'demo'))}"]
    config = resolve_paths(load_config([], settings))
    train(config)
    saved = Checkpoints(folder / "runs" / "demo").find("auto", best=True)
    assert saved is not None
    export_bundle(RunRows(config, open_dataset(config.data), saved), folder / "bundles" / "demo")
    return folder


def run(text: str, name: str, line: int, names: dict[str, Any], folder: Path) -> None:
    """One block as a doctest; what it defines stays for the next."""
    test = doctest.DocTestParser().get_doctest(text, names, name, name, line)
    assert test.examples, (
        f"{name}:{line}: a block of python without >>> lines; write it as a doctest, so that it is tested"
    )
    told: list[str] = []
    here = Path.cwd()
    os.chdir(folder)
    try:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(
            test, out=told.append, clear_globs=False
        )
    finally:
        os.chdir(here)
    names.update(test.globs)
    assert result.failed == 0, "".join(told)


def test_every_block_of_python_in_readme_runs(folder_with_demo):
    names: dict[str, Any] = {}
    for line, text in blocks((ROOT / "README.md").read_text(encoding="utf8")):
        run(text, "README.md", line, names, folder_with_demo)
    # The features belong to the entities that have numbers, in the order of their rows.
    entities = Dataset.open(folder_with_demo / "runs" / "demo" / "dataset").entity_names()
    assert names["names"] == [name for name in entities if name in BORDERS]


def test_every_question_in_readme_documentation_and_help_is_answered(folder_with_demo, monkeypatch, capsys):
    from mocme_dist import query

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    commands = [
        command
        for text in (query.DESCRIPTION, *(page.read_text(encoding="utf8") for page in pages))
        for command in questions(text)
    ]
    assert len(commands) > 10 and any("--new" in command for command in commands)
    monkeypatch.chdir(folder_with_demo)
    Path("questions.tsv").write_text("Norway\tborders\t?\n", encoding="utf8")
    for command in dict.fromkeys(commands):
        monkeypatch.setattr(sys, "argv", ["query", *shlex.split(command)])
        query.main()
        shown = capsys.readouterr().out
        assert shown.strip() and "no answer is left" not in shown, command
    assert len(Path("answers.csv").read_text(encoding="utf8").splitlines()) == 11


def test_every_search_in_documentation_and_help_runs(folder_with_demo, monkeypatch, capsys):
    from mocme_dist import discover, serve

    pages = sorted((ROOT / "docs").glob("*.md"))
    texts = (discover.DESCRIPTION, *(page.read_text(encoding="utf8") for page in pages))
    commands = [command for text in texts for command in questions(text, "discover")]
    assert len(commands) >= 6
    monkeypatch.chdir(folder_with_demo)
    for command in dict.fromkeys(commands):
        discover.main(shlex.split(command))
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert Path(shown["output"]).is_file(), command
    for text in (serve.DESCRIPTION, *texts, (ROOT / "README.md").read_text(encoding="utf8")):
        for command in questions(text, "serve"):
            monkeypatch.setattr(sys, "argv", ["serve", *shlex.split(command, comments=True)])
            assert serve.parse().bundles[0] == "bundles/demo"


def test_the_quickstart_of_the_package_runs(folder_with_demo):
    run(mocme_dist.__doc__ or "", "mocme_dist", 0, {}, folder_with_demo)


def test_a_block_that_fails_or_is_no_doctest_is_found(tmp_path):
    text = "text\n```python\n>>> 1 + 1\n3\n```\n```python\nx = 1\n```\n```sh\nls\n```\n"
    found = blocks(text)
    assert [line for line, _ in found] == [3, 7]
    with pytest.raises(AssertionError, match=r"Expected:\n\s+3"):
        run(found[0][1], "x.md", 3, {}, tmp_path)
    with pytest.raises(AssertionError, match=r"x.md:7: a block of python without >>> lines"):
        run(found[1][1], "x.md", 7, {}, tmp_path)
