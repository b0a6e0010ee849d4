"""Frozen picture encoders. The one module that imports torchvision.

`encoders.image.model` is one of
    torchvision:NAME        a classification network without its last Linear (vgg16: the 4096 numbers before it);
    transformers:FOLDER     a transformers vision model, its last hidden state averaged over positions;
    MODULE:FUNCTION         FUNCTION() returns an nn.Module that maps (B, 3, H, W) float32 pictures, scaled to [0, 1]
                            and then normalised by `mean` and `std`, to (B, F); its attributes: width (F, int), mean
                            and std (three floats each), weights_sha256 (str, pins the features on disk).
What cannot be decoded is counted and left out; see `encoders.pictures`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mocme_dist.config.schema import ImageEncoderConfig
from mocme_dist.data.files import sha256_file
from mocme_dist.encoders.encoder import Decoded, decode_files, network_from_function
from mocme_dist.encoders.pictures import PIXELS, decode_picture, guard_pillow
from mocme_dist.encoders.text import load_transformer, may_download, resolve_model, weights_hash
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from mocme_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Backbone:
    """A network from normalised pictures to features, and what must be known of it."""

    network: nn.Module
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_settings(config: ImageEncoderConfig, max_pixels: int) -> dict[str, Any]:
    """What pins the picture features; hashes files, and builds the network only for MODULE:FUNCTION."""
    kind, name = _split(config.model)
    if kind == "torchvision":
        identity = {"network": config.model, "weights": _torchvision_hash(config, name)}
    elif kind == "transformers":
        identity = {"network": "transformers", "weights": weights_hash(_transformers_folder(name), config.random_weights)}
    else:
        identity = {"network": config.model, "weights": _from_function(config.model)[1]}
    model = f"transformers:{Path(name).name}" if kind == "transformers" else config.model
    return {"model": model, "size": config.size, "precision": config.precision, "max_pixels": max_pixels, "pixels": PIXELS, **identity}


def _split(model: str) -> tuple[str, str]:
    kind, colon, name = model.partition(":")
    if not colon or not name:
        raise ConfigError(f"encoders.image.model: got {model!r}, expected torchvision:NAME, transformers:FOLDER or MODULE:FUNCTION")
    return kind, name


def build_backbone(config: ImageEncoderConfig) -> Backbone:
    """The network that `config` names, frozen, in eval mode.

    Raises:
        ConfigError: the network is unknown, or its weights cannot be had or do not fit.
    """
    kind, name = _split(config.model)
    if kind == "torchvision":
        return _torchvision_backbone(config, name)
    if kind == "transformers":
        return _transformers_backbone(name, config.random_weights)
    return _from_function(config.model)[0]


# -- torchvision


def _torchvision_models() -> Any:
    prepare_torchvision()
    import torchvision.models

    return torchvision.models


def _weights_file(config: ImageEncoderConfig, name: str) -> Path:
    """The state-dict file of a torchvision network: the configured one, or torchvision's own (cached or fetched)."""
    if config.weights is not None:
        path = Path(config.weights)
        if not path.is_file():
            raise ConfigError(f"encoders.image.weights: {path.absolute()}: file not found")
        return path
    url = _torchvision_models().get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            if not may_download():
                raise RuntimeError("HF_HUB_OFFLINE is set")
            log.warning("encoders.image: downloading %s to %s", url, path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"encoders.image.model: weights of {name} are not in {path.parent} and cannot be fetched ({error}); "
                "pass encoders.image.weights=FILE, or encoders.image.random_weights=true for a trial"
            ) from None
    return path


def _check_name(name: str) -> None:
    known = _torchvision_models().list_models(module=_torchvision_models())
    if name not in known:
        raise ConfigError(f"encoders.image.model: torchvision has no classification network {name!r}; it has {', '.join(known)}")


def _torchvision_hash(config: ImageEncoderConfig, name: str) -> str:
    _check_name(name)
    if config.random_weights:
        return hashlib.sha256(f"random weights, seed 0, torchvision {name}".encode()).hexdigest()
    return sha256_file(_weights_file(config, name))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth read with weights_only: nothing in it can run.

    Raises:
        ConfigError: the file is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, header errors: each reader has its own
        raise ConfigError(f"encoders.image.weights: {path}: no state dict can be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"encoders.image.weights: {path}: expected a dictionary of tensors (model.state_dict())")
    return state


def drop_classifier(network: nn.Module) -> tuple[str, int]:
    """Replace the last Linear by the identity, or the last convolution where there is none (SqueezeNet).

    Returns:
        Its name, and the width of the features that now come out.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if layers:
        name, linear = layers[-1]
        width = linear.in_features
    else:
        name, convolution = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)][-1]
        width = convolution.in_channels
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return name, width


def _torchvision_backbone(config: ImageEncoderConfig, name: str) -> Backbone:
    _check_name(name)
    if config.random_weights:
        log.warning("encoders.image: RANDOM WEIGHTS: features say nothing about the content; for tests only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _torchvision_models().get_model(name, weights=None)
    dropped, width = drop_classifier(network)
    if not config.random_weights:
        path = _weights_file(config, name)
        # a network trained on other classes differs in its last layer only, which is gone
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(f"{dropped}.")}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise ConfigError(f"encoders.image.weights: {path} does not fit torchvision's {name}: {reason}") from None
    return Backbone(network.eval().requires_grad_(False), width, IMAGENET_MEAN, IMAGENET_STD)


# -- transformers, and anything else


def _transformers_folder(name: str) -> Path:
    return resolve_model(name, "encoders.image.model")


class _MeanHidden(nn.Module):
    """Last hidden state of a vision model, averaged over its positions: (B, T, F) or (B, F, H, W) to (B, F)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        hidden = self.model(pixel_values=image_BCHW).last_hidden_state
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)


def _transformers_backbone(name: str, random_weights: bool) -> Backbone:
    folder = _transformers_folder(name)
    model = load_transformer(folder, random_weights, "encoders.image")
    vision = getattr(model, "vision_model", model)  # CLIP and its kind carry a text half as well
    config = vision.config
    width = getattr(config, "hidden_size", None) or list(getattr(config, "hidden_sizes", ()) or (0,))[-1]
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if (folder / "preprocessor_config.json").is_file():
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf8"))
        mean, std = tuple(values.get("image_mean", mean)), tuple(values.get("image_std", std))
    return Backbone(_MeanHidden(vision).eval(), int(width), mean, std)


def _from_function(model: str) -> tuple[Backbone, str]:
    made = network_from_function("encoders.image.model", model, ("width", "mean", "std", "weights_sha256"), "encoders/image.py")
    return Backbone(made.eval().requires_grad_(False), int(made.width), tuple(made.mean), tuple(made.std)), str(made.weights_sha256)


class ImageEncoder:
    """Pictures to features; see `encoders.encoder.Encoder` for the contract."""

    modality = "image"

    def __init__(self, config: ImageEncoderConfig, max_pixels: int, device: str = "cpu") -> None:
        guard_pillow(max_pixels)
        self.config, self.max_pixels, self.device = config, max_pixels, torch.device(device)
        self.settings = image_settings(config, max_pixels)
        backbone = build_backbone(config)
        self.dtype: torch.dtype = getattr(torch, config.precision)
        # a third to two thirds faster on a CPU than channels first, and what tensor cores want
        network = backbone.network.to(self.device, self.dtype)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.width, self.chunk = backbone.width, config.batch_size
        self.mean = torch.tensor(backbone.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(backbone.std, device=self.device).view(1, 3, 1, 1)

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """One (size, size, 3) uint8 array for each picture of an entity that can be decoded."""
        return decode_files(members, lambda content: decode_picture(content, self.config.size, self.max_pixels))

    def collate(self, pieces: list[np.ndarray]) -> Tensor:
        """(B, H, W, 3) uint8: a quarter of the bytes of floats on the way to the device."""
        stacked = torch.from_numpy(np.stack(pieces))
        return stacked.pin_memory() if self.device.type == "cuda" else stacked

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> np.ndarray:
        """(B, F) float32 features.

        Raises:
            DataError: the network gives another shape than it promised.
        """
        pictures = (
            batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32).contiguous(memory_format=torch.channels_last)
        )
        features = self.network(pictures.div_(255.0).sub_(self.mean).div_(self.std).to(self.dtype)).float()
        if features.shape != (len(batch), self.width):
            raise DataError(f"encoders.image: {self.config.model} gave shape {tuple(features.shape)}, expected {(len(batch), self.width)}")
        return features.cpu().numpy()
