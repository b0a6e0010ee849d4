"""How the tests of serving open a run: the encoders of its data set, its configuration, its best checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mocme_dist.config import Config, load_config
from mocme_dist.serving.rows import RunRows

TRAINING_TESTS = str(Path(__file__).resolve().parents[1] / "training")
if TRAINING_TESTS not in sys.path:
    sys.path.insert(0, TRAINING_TESTS)

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
    from mocme_dist.training import checkpoint
    from mocme_dist.training.worker import open_dataset

    saved = checkpoint.find(run / "checkpoints", "auto", best=True)
    assert saved is not None
    config = config_of(run)
    return RunRows(config, open_dataset(config), saved)
