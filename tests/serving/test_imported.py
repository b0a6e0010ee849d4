"""A model of imported vectors is exported and queried; only a new entity cannot have what no encoder here makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import rows_of

from mocme_dist.config import load_config
from mocme_dist.errors import ConfigError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.unseen import UnseenEntityEncoder
from mocme_dist.train import resolve_paths, train

IMPORTED = ("text", "image", "numeric")


@pytest.fixture(scope="module")
def imported_bundle(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of one epoch over vectors of texts, pictures and numbers that were computed elsewhere."""
    import tiny_run

    folder = tmp_path_factory.mktemp("imported")
    raw = Path(shutil.copytree(tiny_raw, folder / "raw"))
    (raw / "features").mkdir()
    gen = np.random.default_rng(0)
    for modality in IMPORTED:
        np.save(raw / "features" / f"{modality}.npy", gen.normal(size=(60, 5)).astype(np.float32))
        (raw / "features" / f"{modality}.ids").write_text("".join(f"item {i:02d}\n" for i in range(60)))
    paths = (f"data.raw={json.dumps(str(raw))}", f"run.dir={json.dumps(str(folder / 'run'))}", "data.shard_rows=16")
    train(resolve_paths(load_config([], [*tiny_run.TINY, *paths, "train.epochs=1"])))
    export_bundle(rows_of(folder / "run"), folder / "bundle")
    return Bundle.open(folder / "bundle")


def test_a_bundle_of_imported_vectors_opens_and_answers(imported_bundle):
    assert set(imported_bundle.modalities) == {"structure", *IMPORTED}
    assert {imported_bundle.manifest["features"][name]["imported"] for name in IMPORTED} == {
        f"{name}.npy" for name in IMPORTED
    }
    assert len(imported_bundle.predict("item 05", "kind", k=3)) == 3


@pytest.mark.parametrize("given", ["text=words", "image=picture.png", "size=3"])
def test_a_new_entity_is_told_what_cannot_be_made(imported_bundle, tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(b"")
    encoder = UnseenEntityEncoder(imported_bundle)
    message = (
        "size: unknown key"
        if given == "size=3"
        else r"given, but this model's features of it were imported .*leave it out"
    )
    with pytest.raises(ConfigError, match=message):
        encoder.features_of(encoder.describe(given))
