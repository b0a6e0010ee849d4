"""Frozen image encoders. The only module that imports torchvision.

`encoders.image.model` is one of
    torchvision:NAME        a classification network without its last Linear (vgg16: the 4096 numbers before it);
    transformers:FOLDER     a transformers vision model, its last hidden state averaged over positions;
    MODULE:FUNCTION         FUNCTION() returns an nn.Module that maps (B, 3, H, W) float32 images, scaled to [0, 1]
                            and then normalised by `mean` and `std`, to (B, F); its attributes: width (F, int), mean
                            and std (three floats each), weights_sha256 (str, identifies the features on disk).
Files that cannot be decoded are counted and left out; see `encoders.image_files`.
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
from mocme_dist.encoders.device import Copies, Fetch, Overlapped
from mocme_dist.encoders.encoder import Decoded, decode_files
from mocme_dist.encoders.image_files import PIXELS, decode_image, limit_pillow
from mocme_dist.encoders.pretrained import (
    MeanHidden,
    load_transformer,
    may_download,
    network_from_function,
    resolve_model,
    weights_hash,
)
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from mocme_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Backbone:
    """A network from normalised images to features, with its width and normalisation."""

    network: nn.Module
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_settings(config: ImageEncoderConfig, max_pixels: int) -> dict[str, Any]:
    """Return the settings that determine image features; hashes files, builds the network for MODULE:FUNCTION only."""
    kind, name = _split(config.model)
    if kind == "torchvision":
        identity = {"network": config.model, "weights": _torchvision_hash(config, name)}
    elif kind == "transformers":
        identity = {
            "network": "transformers",
            "weights": weights_hash(_transformers_folder(name), config.random_weights),
        }
    else:
        identity = {"network": config.model, "weights": _from_function(config.model)[1]}
    model = f"transformers:{Path(name).name}" if kind == "transformers" else config.model
    return {
        "model": model,
        "size": config.size,
        "precision": config.precision,
        "max_pixels": max_pixels,
        "pixels": PIXELS,
        **identity,
    }


def _split(model: str) -> tuple[str, str]:
    kind, colon, name = model.partition(":")
    if not colon or not name:
        raise ConfigError(
            f"encoders.image.model: got {model!r}, expected torchvision:NAME, transformers:FOLDER or MODULE:FUNCTION"
        )
    return kind, name


def build_backbone(config: ImageEncoderConfig) -> Backbone:
    """Return the network that `config` names, frozen, in eval mode.

    Raises:
        ConfigError: the network is unknown, or its weights are not available or do not fit.
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
    """Return the state-dict file of a torchvision network.

    The configured one, or torchvision's own (cached or fetched).
    """
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
        raise ConfigError(
            f"encoders.image.model: torchvision has no classification network {name!r}; it has {', '.join(known)}"
        )


def _torchvision_hash(config: ImageEncoderConfig, name: str) -> str:
    _check_name(name)
    if config.random_weights:
        return hashlib.sha256(f"random weights, seed 0, torchvision {name}".encode()).hexdigest()
    return sha256_file(_weights_file(config, name))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a .pth read with weights_only; no code in it can run.

    Raises:
        ConfigError: the file is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, header errors: each reader has its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if type(error).__name__ == "UnpicklingError":  # torch's own message explains how to unpickle it all the same
            reason = "it holds something other than tensors, and nothing in it was run"
        raise ConfigError(f"encoders.image.weights: {path}: no state dict can be read: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"encoders.image.weights: {path}: expected a dictionary of tensors (model.state_dict())")
    return state


def drop_classifier(network: nn.Module) -> tuple[str, int]:
    """Replace the last Linear by the identity, or the last convolution if there is none (SqueezeNet).

    Returns:
        Its name, and the width of the network's new output.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if layers:
        name, linear = layers[-1]
        width = linear.in_features
    else:
        name, convolution = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)][
            -1
        ]
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
        # a network trained on other classes differs only in its last layer, which was removed
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(f"{dropped}.")}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise ConfigError(f"encoders.image.weights: {path} does not fit torchvision's {name}: {reason}") from None
    return Backbone(network.eval().requires_grad_(False), width, IMAGENET_MEAN, IMAGENET_STD)


# -- transformers and MODULE:FUNCTION


def _transformers_folder(name: str) -> Path:
    return resolve_model(name, "encoders.image.model")


def _transformers_backbone(name: str, random_weights: bool) -> Backbone:
    folder = _transformers_folder(name)
    model = load_transformer(folder, random_weights, "encoders.image")
    vision = getattr(model, "vision_model", model)  # CLIP and similar models also have a text encoder
    config = vision.config
    width = getattr(config, "hidden_size", None) or list(getattr(config, "hidden_sizes", ()) or (0,))[-1]
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    if (folder / "preprocessor_config.json").is_file():
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf8"))
        mean = tuple(values.get("image_mean", mean))
        std = tuple(values.get("image_std", std))
    return Backbone(MeanHidden(vision).eval(), int(width), mean, std)


def _from_function(model: str) -> tuple[Backbone, str]:
    made = network_from_function(
        "encoders.image.model", model, ("width", "mean", "std", "weights_sha256"), "encoders/image.py"
    )
    return Backbone(made.eval().requires_grad_(False), int(made.width), tuple(made.mean), tuple(made.std)), str(
        made.weights_sha256
    )


class ImageDecoder:
    """Decodes and resizes images; see `encoders.encoder.Decoder` for the contract."""

    modality = "image"

    def __init__(self, config: ImageEncoderConfig, max_pixels: int) -> None:
        limit_pillow(max_pixels)
        self.config = config
        self.max_pixels = max_pixels
        self.chunk = config.batch_size

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return a (size, size, 3) uint8 array per decodable image of an entity."""
        return decode_files(members, lambda content: decode_image(content, self.config.size, self.max_pixels))

    def collate(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Return (B, H, W, 3) uint8, which is a quarter of the bytes of floats for the copy to the device."""
        return np.stack(pieces)


class ImageEncoder(ImageDecoder, Overlapped):
    """Encodes images; see `encoders.encoder.Encoder` for the contract."""

    def __init__(self, config: ImageEncoderConfig, max_pixels: int, device: str = "cpu") -> None:
        super().__init__(config, max_pixels)
        self.copies = Copies(device)
        self.settings = image_settings(config, max_pixels)
        backbone = build_backbone(config)
        self.dtype: torch.dtype = getattr(torch, config.precision)
        # a third to two thirds faster on a CPU than channels first, and the layout of tensor cores
        network = backbone.network.to(self.copies.device, self.dtype)
        # torch's stubs lack memory_format
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.width = backbone.width
        self.mean = torch.tensor(backbone.mean, device=self.copies.device).view(1, 3, 1, 1)
        self.std = torch.tensor(backbone.std, device=self.copies.device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def launch(self, batch: np.ndarray) -> Fetch:
        """Start encoding; the features are (B, F) float32.

        Raises:
            DataError: the network's output has an unexpected shape.
        """
        images = (
            self.copies.to_device(torch.from_numpy(batch))
            .permute(0, 3, 1, 2)
            .to(torch.float32)
            .contiguous(memory_format=torch.channels_last)
        )
        features = self.network(images.div_(255.0).sub_(self.mean).div_(self.std).to(self.dtype)).float()
        if features.shape != (len(batch), self.width):
            raise DataError(
                f"encoders.image: {self.config.model} gave shape {tuple(features.shape)}, expected "
                f"{(len(batch), self.width)}"
            )
        return self.copies.fetch(features)
