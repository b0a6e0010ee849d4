"""A packed data set with numeric features, and one finished tiny run of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_run

from mocme_dist.train import train


@pytest.fixture(scope="session")
def featured_dataset(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dataset` with the features of its numbers; read only."""
    from mocme_dist.config.schema import EncodersConfig
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.encoders.pipeline import extract_features

    path = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("featured") / "dataset"))
    extract_features(Dataset.open(path), EncodersConfig(), ("label",), ["numeric"], use_ray=False)
    return path


@pytest.fixture(scope="session")
def finished_run(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with structure and numbers, to its end; read only, copy it to go on."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run.tiny_config(featured_dataset, path, "modalities=[structure, numeric]"))
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """An own copy of `finished_run`."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
