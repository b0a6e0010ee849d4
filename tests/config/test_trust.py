"""What a configuration of a stranger may name as an encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mocme_dist.config import load_config
from mocme_dist.config.encoders import foreign_code, refuse_foreign_code
from mocme_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_need_no_trust(path):
    assert foreign_code(load_config([path]).encoders) == []


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize(
    "model", ["evil:run", "os:getcwd", "mocme_dist.train:main", "mocme_dist.encoders.efficientnet_lite:Any", "evil"]
)
def test_any_other_code_is_refused_with_the_setting_and_the_remedy(modality, model):
    encoders = load_config([], [f"encoders.{modality}.model={model}"]).encoders
    with pytest.raises(ConfigError, match=rf"^bundles/x: encoders\.{modality}\.model='{model}' .*--trust-encoders$"):
        refuse_foreign_code(encoders, "bundles/x")


def test_libraries_that_read_weights_are_accepted():
    overrides = ["encoders.image.model=torchvision:vgg16", "encoders.audio.model=transformers:some/folder"]
    refuse_foreign_code(load_config([], overrides).encoders, "bundles/x")
