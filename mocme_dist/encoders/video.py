"""Frozen film encoder: frames sampled evenly, each through the picture encoder, mean and deviation over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mocme_dist.config.schema import ImageEncoderConfig, VideoEncoderConfig
from mocme_dist.encoders.encoder import Decoded, decode_files
from mocme_dist.encoders.films import decode_film, require_av
from mocme_dist.encoders.image import ImageEncoder, image_settings


@dataclass
class FilmBatch:
    """Frames of several films one after another, in batches for the picture encoder, and how many each film has."""

    pictures: list[Tensor]
    frames: list[int]


def video_settings(config: VideoEncoderConfig, image: ImageEncoderConfig, max_pixels: int) -> dict[str, Any]:
    """What pins the film features: how frames are taken, and the picture encoder."""
    require_av()
    pictures = image_settings(image, max_pixels)
    return {
        "model": pictures.pop("model"),
        "frames": config.frames,
        "max_seconds": config.max_seconds,
        "max_frames": config.max_frames,
        "image": pictures,
    }


class VideoEncoder:
    """Films to features, (F picture features' mean over frames, their F standard deviations); the contract is `Encoder`'s."""

    modality = "video"

    def __init__(self, config: VideoEncoderConfig, image: ImageEncoderConfig, max_pixels: int, device: str = "cpu") -> None:
        self.config, self.max_pixels = config, max_pixels
        self.settings = video_settings(config, image, max_pixels)
        self.image = ImageEncoder(image, max_pixels, device)
        self.width, self.chunk = 2 * self.image.width, config.batch_size

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """(k, size, size, 3) uint8 frames of each film of an entity that can be decoded."""
        size = self.image.config.size
        return decode_files(members, lambda content: decode_film(content, self.config, size, self.max_pixels))

    def collate(self, pieces: list[np.ndarray]) -> FilmBatch:
        """The frames of all films in batches of the picture encoder's size."""
        frames = np.concatenate(pieces)
        step = self.image.chunk
        batches = [self.image.collate(list(frames[start : start + step])) for start in range(0, len(frames), step)]
        return FilmBatch(batches, [len(piece) for piece in pieces])

    def encode(self, batch: FilmBatch) -> np.ndarray:
        """(n, 2 F) float32; a film of one frame has deviation 0."""
        features = np.concatenate([self.image.encode(pictures) for pictures in batch.pictures])
        films = np.split(features, np.cumsum(batch.frames)[:-1])
        return np.stack([np.concatenate([film.mean(axis=0), film.std(axis=0)]) for film in films])
