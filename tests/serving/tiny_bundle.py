"""How the tests of serving open a run: the encoders of its data set, its configuration, its best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from mocme_dist.config import Config, load_config
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving.rows import RunRows

ENCODERS = (
    "encoders.text.model=tiny-random",
    "encoders.text.random_weights=true",
    "encoders.image.model=tiny_pictures:make",
    "encoders.image.size=8",
)
PART_BYTES = 16 * 8 * 4  # a part for every block of 16 entities


def config_of(run: Path) -> Config:
    return load_config([run / "config.yaml"], [f"run.dir={json.dumps(str(run))}"])


def rows_of(run: Path) -> RunRows:
    """The best checkpoint of a run, as the export command opens it."""
    from mocme_dist.training.build import open_dataset

    saved = Checkpoints(run).find("auto", best=True)
    assert saved is not None
    config = config_of(run)
    return RunRows(config, open_dataset(config.data), saved)
