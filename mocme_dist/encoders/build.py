"""Which encoder a modality has, from the configuration: its settings without building it, and the encoder itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.encoders.audio import AudioEncoder, audio_settings
from mocme_dist.encoders.encoder import Encoder
from mocme_dist.encoders.image import ImageEncoder, image_settings
from mocme_dist.encoders.numeric import NumericEncoder, NumericStatistics, numeric_settings
from mocme_dist.encoders.text import TextEncoder, text_settings
from mocme_dist.encoders.vectors import VectorEncoder, vector_settings
from mocme_dist.encoders.video import VideoEncoder, video_settings
from mocme_dist.errors import ConfigError

ENCODED = ("text", "image", "numeric", "audio", "video")  # in this order; structure needs no encoder


def build_encoder(
    modality: str,
    encoders: EncodersConfig,
    text_columns: Sequence[str],
    statistics: NumericStatistics | None,
    device: str | None = None,
    vectors: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder of a modality; on a GPU when the configuration gives actors one.

    Args:
        modality: one of `ENCODED`.
        encoders: the configuration.
        text_columns: columns that make an entity's text.
        statistics: of the numbers; for "numeric" only.
        device: where it runs; None reads it from the configuration.
        vectors: what the data set's manifest says of vectors computed elsewhere, which take the encoder's place.

    Raises:
        ConfigError: its model, weights or package cannot be had.
    """
    if vectors is not None:
        return VectorEncoder(modality, vectors)
    if device is None:
        device = "cuda" if encoders.gpus_per_actor > 0 else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"encoders.gpus_per_actor={encoders.gpus_per_actor:g}: torch sees no GPU here; set it to 0")
    if modality == "text":
        return TextEncoder(encoders.text, text_columns, device)
    if modality == "image":
        return ImageEncoder(encoders.image, encoders.max_pixels, device)
    if modality == "audio":
        return AudioEncoder(encoders.audio, device)
    if modality == "video":
        return VideoEncoder(encoders.video, encoders.image, encoders.max_pixels, device)
    assert statistics is not None
    return NumericEncoder(statistics)


def encoder_settings(
    modality: str,
    encoders: EncodersConfig,
    text_columns: Sequence[str],
    statistics: NumericStatistics | None,
    vectors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What pins the features of a modality: equal to the `settings` of its encoder, and cheaper to have."""
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
    return numeric_settings(statistics)


def with_absolute_paths(encoders: EncodersConfig) -> EncodersConfig:
    """The same configuration with local paths made absolute: actors start in another folder."""
    text, image, audio = encoders.text, encoders.image, encoders.audio
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
