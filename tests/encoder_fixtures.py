"""Fixtures: a small packed data set with three modalities, and encoders small enough for a test.

A conftest.py imports them for the tests of its folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from raw_media import write_raw

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder


@pytest.fixture
def packed(tmp_path: Path) -> Dataset:
    """The raw folder packed into three shards: 8, 8 and 7 entities."""
    return pack_folder(write_raw(tmp_path / "raw"), tmp_path / "dataset", DataConfig(shard_rows=8, unseen="keep"))


@pytest.fixture
def encoders() -> EncodersConfig:
    """Encoders with random weights that are small enough for a test."""
    return EncodersConfig.model_validate(
        {
            "text": {"model": "tiny-random", "random_weights": True, "batch_size": 3, "max_tokens": 12},
            "image": {"model": "torchvision:squeezenet1_1", "random_weights": True, "size": 48, "batch_size": 2},
        }
    )
