"""Every parser survives edited inputs: a refusal is one line, never another exception."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.fuzz import Target, fuzz, make_targets

NAMES = (
    *("triples", "tsv", "gzip", "text", "numeric", "media", "entity2id", "configuration", "setting", "manifest"),
    *("feature part", "shard", "array", "vectors.npy", "vectors.safetensors", "vectors.pt", "image", "audio"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    yield make_targets(folder)


def test_every_target_is_listed(targets):
    assert tuple(targets) == NAMES


RUN_NAMES = (
    *("status", "curve", "report", "run configuration", "checkpoint", "checkpoint rows", "checkpoint dense", "blend"),
    *("bundle manifest", "bundle vectors-00000.safetensors", "bundle entities.parquet", "bundle known_all_targets.npy"),
    *("questions", "candidates", "description", "lock", "N-Triples", "Turtle", "RDF in gzip"),
    *("request", "questions by HTTP", "upload"),
)


@pytest.fixture(scope="module")
def targets_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    from tools.fuzz_runs import make_run, run_targets

    folder: Path = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOCME_CACHE", str(folder / "cache"))
        made = run_targets(*make_run(folder), folder)
        assert tuple(made) == RUN_NAMES
        yield {name: Target(*parts) for name, parts in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_NAMES)
def test_readers_of_runs_bundles_and_requests_refuse_hostile_input_in_one_line(targets_of_a_run, name):
    fuzz(name, targets_of_a_run[name], examples=25, seed_number=1)


@pytest.mark.parametrize("name", NAMES)
def test_parsers_refuse_hostile_input_in_one_line(targets, name):
    fuzz(name, targets[name], examples=60, seed_number=1)
