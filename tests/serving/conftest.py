"""One tiny run with structure, text, pictures and numbers, and its bundle in parts of 16 entities; read only."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import ENCODERS, PART_BYTES, rows_of

from mocme_dist.serving.bundle import Bundle
from mocme_dist.train import train


@pytest.fixture(scope="session")
def answered_run(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run over all four modalities."""
    import tiny_run

    from mocme_dist.data.dataset import Dataset
    from mocme_dist.encoders.pipeline import extract_features

    dataset = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("serving") / "dataset"))
    config = tiny_run.tiny_config(dataset, dataset.parent / "run", *ENCODERS)
    extract_features(
        Dataset.open(dataset), config.encoders, config.data.text_columns, ["text", "image", "numeric"], use_ray=False
    )
    train(config)
    return dataset.parent / "run"


@pytest.fixture(scope="session")
def bundle_dir(answered_run: Path) -> Path:
    """Its bundle: four parts."""
    from mocme_dist.serving.export import export_bundle

    target = answered_run.parent / "bundle"
    export_bundle(rows_of(answered_run), target, part_bytes=PART_BYTES)
    return target


@pytest.fixture(scope="session")
def bundle(bundle_dir: Path) -> Bundle:
    """It, opened."""
    return Bundle.open(bundle_dir)


@pytest.fixture(scope="session")
def blended_run(answered_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same data with evidence; its blend has a weight for every term."""
    import tiny_run

    from mocme_dist.evidence.blend import load_blend, save_blend

    path = tmp_path_factory.mktemp("blended") / "run"
    more = ("evidence.spaces=auto", "blend.steps=5", "fusion.form=blocks", "experts.width=20", "train.epochs=2")
    train(tiny_run.tiny_config(answered_run.parent / "dataset", path, *ENCODERS, *more))
    blend = load_blend(path / "blend.safetensors")
    gen = np.random.default_rng(0)
    weight_PF = (gen.random(blend.weight_PF.shape).astype(np.float32) + 0.25).round(2)
    weight_PF[::3, -4:] = 0
    save_blend(path / "blend.safetensors", blend._replace(weight_PF=weight_PF))
    return path


@pytest.fixture(scope="session")
def blended_bundle(blended_run: Path) -> Bundle:
    """Its bundle."""
    from mocme_dist.serving.export import export_bundle

    target = blended_run.parent / "bundle"
    export_bundle(rows_of(blended_run), target, part_bytes=PART_BYTES)
    return Bundle.open(target)
