"""Builds the encoder of a modality from the configuration, or returns its settings without building it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.encoders.audio import AudioDecoder, AudioEncoder, audio_settings
from mocme_dist.encoders.encoder import Decoded, Decoder, Encoder, Failure
from mocme_dist.encoders.image import ImageDecoder, ImageEncoder, image_settings
from mocme_dist.encoders.numeric import NumericEncoder, NumericStatistics, numeric_settings
from mocme_dist.encoders.text import TextDecoder, TextEncoder, text_settings
from mocme_dist.encoders.video import VideoDecoder, VideoEncoder, video_settings
from mocme_dist.errors import ConfigError

ENCODED = ("text", "image", "numeric", "audio", "video")  # order of extraction; structure needs no encoder
NETWORKS = ("text", "image", "audio", "video")  # those that a network encodes


def build_encoder(
    modality: str,
    encoders: EncodersConfig,
    text_columns: Sequence[str],
    statistics: NumericStatistics | None,
    device: str | None = None,
    vectors: Mapping[str, Any] | None = None,
) -> Encoder:
    """Return the encoder of a modality; on a GPU if the configuration gives actors one.

    Args:
        modality: one of `ENCODED`.
        encoders: the configuration.
        text_columns: columns of an entity's text.
        statistics: of numeric attributes, for "numeric" only.
        device: device of the network; None takes it from the configuration.
        vectors: the manifest's record of vectors computed elsewhere, which replace the encoder.

    Raises:
        ConfigError: its model, weights or package are not available.
    """
    if vectors is not None:
        return VectorEncoder(modality, vectors)
    if modality == "numeric":
        assert statistics is not None
        return NumericEncoder(statistics, encoders.numeric.fourier)
    if device is None:
        device = "cuda" if encoders.gpus_per_actor > 0 else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"encoders.gpus_per_actor={encoders.gpus_per_actor:g}: torch sees no GPU here; set it to 0"
            )
    if modality == "text":
        return TextEncoder(encoders.text, text_columns, device)
    if modality == "image":
        return ImageEncoder(encoders.image, encoders.max_pixels, device)
    if modality == "audio":
        return AudioEncoder(encoders.audio, device)
    return VideoEncoder(encoders.video, encoders.image, encoders.max_pixels, device)


def build_decoder(modality: str, encoders: EncodersConfig, text_columns: Sequence[str]) -> Decoder:
    """Return the half of a modality's encoder that needs no network, for one of `NETWORKS`.

    Raises:
        ConfigError: its tokenizer, feature extractor or package is not available.
    """
    if modality == "text":
        return TextDecoder(encoders.text, text_columns)
    if modality == "image":
        return ImageDecoder(encoders.image, encoders.max_pixels)
    if modality == "audio":
        return AudioDecoder(encoders.audio)
    return VideoDecoder(encoders.video, encoders.image, encoders.max_pixels)


def encoder_settings(
    modality: str,
    encoders: EncodersConfig,
    text_columns: Sequence[str],
    statistics: NumericStatistics | None,
    vectors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings that determine a modality's features: the encoder's `settings`, without building it."""
    if vectors is not None:
        return vector_settings(vectors)
    if modality == "text":
        return text_settings(encoders.text, text_columns)
    if modality == "image":
        return image_settings(encoders.image, encoders.max_pixels)
    if modality == "audio":
        return audio_settings(encoders.audio)
    if modality == "video":
        return video_settings(encoders.video, encoders.image, encoders.max_pixels)
    assert statistics is not None
    return numeric_settings(statistics, encoders.numeric.fourier)


def with_absolute_paths(encoders: EncodersConfig) -> EncodersConfig:
    """Return the configuration with absolute local paths, because actors start in another folder."""
    text = encoders.text
    image = encoders.image
    audio = encoders.audio
    if Path(text.model).exists():
        text = text.model_copy(update={"model": str(Path(text.model).absolute())})
    if image.weights is not None:
        image = image.model_copy(update={"weights": str(Path(image.weights).absolute())})
    image = image.model_copy(update={"model": _absolute_model(image.model)})
    audio = audio.model_copy(update={"model": _absolute_model(audio.model)})
    return encoders.model_copy(update={"text": text, "image": image, "audio": audio})


def _absolute_model(model: str) -> str:
    kind, _, name = model.partition(":")
    return f"transformers:{Path(name).absolute()}" if kind == "transformers" and Path(name).exists() else model


def vector_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine imported features: the content of their file."""
    return {"model": f"imported from {facts['file']}", "imported": facts["sha256"], "width": facts["width"]}


class VectorEncoder:
    """Stores packed vectors unchanged as features; see `encoders.encoder.Encoder` for the contract."""

    chunk = 4096

    def __init__(self, modality: str, facts: Mapping[str, Any]) -> None:
        self.modality = modality
        self.settings = vector_settings(facts)
        self.width = int(facts["width"])

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return (F,) float32 of an entity; a failure if its numbers are not finite."""
        content = members.get(f"{self.modality}.f32")
        if content is None:
            return Decoded()
        if len(content) != 4 * self.width:
            return Decoded(failures=[Failure("wrong length", f"{len(content)} bytes, expected {4 * self.width}")])
        vector = np.frombuffer(content, dtype="<f4")
        wrong = self.width - int(np.isfinite(vector).sum())
        if wrong:
            return Decoded(failures=[Failure("not finite", f"{wrong} of {self.width} numbers are NaN or infinite")])
        return Decoded([vector])

    def collate(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Return (n, F) float32."""
        return np.stack(pieces)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        """Return the vectors unchanged."""
        return batch
