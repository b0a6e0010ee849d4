"""Every command that writes is killed as it renames a file, and run again: it leaves what an undisturbed run leaves.

A kill comes before each rename of the main thread; at URLs, where a file is renamed three times on its way, before
every third one. Checkpoints at URLs are killed in tests/runs/test_remote.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import kill_points
import pytest
import tiny_bundle
from kill_points import Attempts, tree

from mocme_dist.errors import MocmeError
from mocme_dist.serving.bundle import Bundle

LIBRARIES = (
    *("mocme_dist.data.packing", "webdataset", "pyarrow.parquet"),
    *("mocme_dist.encoders.pipeline", "mocme_dist.encoders.image", "tiny_pictures"),
    *("mocme_dist.serving.export", "mocme_dist.serving.manifest", "mocme_dist.serving.batch", "mocme_dist.train"),
    *("mocme_dist.training.loop", "mocme_dist.runs.launch", "mocme_dist.training.engine"),
)
PACK, EXTRACT, EXPORT = "mocme_dist.pack:main", "mocme_dist.extract:main", "mocme_dist.export:main"
QUERY, TRAIN = "mocme_dist.query:main", "mocme_dist.train:main"
ENCODED = ("--local", "--modalities", "numeric", "image", "--set", *tiny_bundle.ENCODERS[2:])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(kill_points.why_not() is not None, reason=str(kill_points.why_not())),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$MOCME_CACHE of all attempts."""
    return tmp_path_factory.mktemp("cache") / "cache"


@pytest.fixture(scope="module")
def attempts(cache: Path) -> Iterator[Attempts]:
    """A server with every command's libraries; forks of it start in a moment."""
    with kill_points.attempts(*LIBRARIES, environment={"MOCME_CACHE": str(cache)}) as server:
        yield server


def finish(attempts: Attempts, function: str, *arguments: object) -> str:
    code, output = attempts.run(function, *arguments)
    assert code == 0, output
    return output


@pytest.fixture(params=["folder", "url"])
def place(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Callable[[str], tuple[Path, str, int]]:
    """`place(name)`: where its files lie, the name for a command, and every how many renames it is killed."""
    shutil.rmtree(cache, ignore_errors=True)

    def named(name: str) -> tuple[Path, str, int]:
        folder = tmp_path / name / "out"
        return (
            (folder, str(folder), 1)
            if request.param == "folder"
            else (folder, f"file://{folder}", int(os.environ.get("MOCME_KILL_EVERY", "5")))
        )

    return named


def put_back(folder: Path, cache: Path, content: Path | None) -> Callable[[], None]:
    """Brings the disk to where an attempt starts: `content` or nothing at `folder`, and nothing cached."""

    def before() -> None:
        for old in (folder.parent, cache):
            shutil.rmtree(old, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        if content is not None:
            shutil.copytree(content, folder)

    return before


def test_a_killed_pack(attempts, tiny_raw, place, cache):
    folder, name, every = place("killed")
    arguments = (PACK, tiny_raw, name, "--shard-rows", 32)
    put_back(folder, cache, None)()
    finish(attempts, *arguments)
    expected, kills = tree(folder), 0
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, None), every=every):
        kills += 1
        finish(attempts, *arguments)
        assert tree(folder) == expected and os.listdir(folder.parent) == ["out"]
    assert kills * every >= len(expected) / 2


def test_a_killed_extraction(attempts, tiny_dataset, place, cache):
    folder, name, every = place("killed")
    arguments = (EXTRACT, name, *ENCODED)
    put_back(folder, cache, tiny_dataset)()
    finish(attempts, *arguments)
    expected, kills = tree(folder / "features"), 0
    assert any(name.startswith("image/part") for name in expected)
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, tiny_dataset), every=every):
        kills += 1
        finish(attempts, *arguments)
        found = tree(folder / "features")
        assert found == expected
        assert not [path for path in tree(folder) if ".tmp-" in path]
    assert kills * every >= len(expected) / 2


def test_a_killed_export_that_replaces_another(attempts, answered_run, place, cache, tmp_path):
    """Between the kill and the next try there is a whole bundle, the old one or the new one."""
    folder, name, every = place("killed")
    arguments = (EXPORT, answered_run, name, "--trust-encoders")
    put_back(folder, cache, None)()
    finish(attempts, *arguments, "--dtype", "float16")
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    finish(attempts, *arguments)
    expected, kills, seen = tree(folder), 0, set()
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, old), every=every):
        kills += 1
        opened = Bundle.open(folder if name == str(folder) else sole_folder(folder))
        seen |= {str(opened.vector_parts[0].dtype)}
        finish(attempts, *arguments)
        assert tree(folder) == expected and os.listdir(folder.parent) == ["out"]
    assert kills * every >= 5 and seen == {"float16"}  # the last of its renames puts the new one in place


def sole_folder(folder: Path) -> Path:
    """The bundle that counts at a URL that is a folder."""
    import json

    return folder / json.loads((folder / "bundle.json").read_text())["generation"]


def test_a_killed_first_export_is_none_and_the_next_one_is_whole(attempts, answered_run, tmp_path, cache):
    folder = tmp_path / "killed" / "out"
    arguments = (EXPORT, answered_run, f"file://{folder}", "--trust-encoders")
    put_back(folder, cache, None)()
    finish(attempts, *arguments)
    expected = tree(folder)
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, None), every=4):
        with pytest.raises(MocmeError, match=r"no bundle.json in it"):
            Bundle.open(f"file://{folder}")
        finish(attempts, *arguments)
        assert tree(folder) == expected


def test_a_killed_batch_of_questions(attempts, bundle_dir, place, cache, tmp_path):
    folder, name, every = place("killed")
    (tmp_path / "questions.tsv").write_text("item 05\tnear\t?\n?\tkind\titem 07\n")
    answers = folder.parent / "answers.tsv"
    arguments = (QUERY, name, "--queries", tmp_path / "questions.tsv", "--output", answers)
    put_back(folder, cache, bundle_dir)()
    finish(attempts, *arguments)
    expected, kills = answers.read_bytes(), 0
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, bundle_dir), every=every):
        kills += 1
        assert not answers.exists()
        finish(attempts, *arguments)
        assert answers.read_bytes() == expected and sorted(os.listdir(folder.parent)) == ["answers.tsv", "out"]
    assert kills >= 1


def test_a_killed_training_goes_on_to_the_same_checkpoints(attempts, tiny_dataset, cache, tmp_path):
    import tiny_run

    folder = tmp_path / "killed" / "out"
    settings = (*tiny_run.TINY, "modalities=[structure]", "fusion.estimator=uniform", "train.projector=0")
    arguments = (TRAIN, "--set", *settings, f"data.dataset={tiny_dataset}", f"run.dir={folder}")
    put_back(folder, cache, None)()
    finish(attempts, *arguments)
    expected, kills = tiny_run.final_hashes(folder, 27), 0
    names = sorted(os.listdir(folder / "checkpoints"))
    for _ in attempts.each_kill(*arguments, before=put_back(folder, cache, None), every=5):
        kills += 1
        finish(attempts, *arguments)
        assert tiny_run.final_hashes(folder, 27) == expected
        assert sorted(os.listdir(folder / "checkpoints")) == names
    assert kills >= 3 and len(expected) == 2
