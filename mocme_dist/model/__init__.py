"""MoCME in tensors on one device, with torch alone. `MoCME` is the module, `ModelSettings` its sizes and switches."""

from mocme_dist.model.fusion import FusionSettings
from mocme_dist.model.mocme import MoCME, ModelSettings

__all__ = ["FusionSettings", "MoCME", "ModelSettings"]
