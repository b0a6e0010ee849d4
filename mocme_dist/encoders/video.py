"""Frozen video encoder: evenly sampled frames pass the image encoder; features are their mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mocme_dist.config.schema import ImageEncoderConfig, VideoEncoderConfig
from mocme_dist.encoders.device import Fetch, Overlapped
from mocme_dist.encoders.encoder import Decoded, decode_files
from mocme_dist.encoders.image import ImageDecoder, ImageEncoder, image_settings
from mocme_dist.encoders.video_files import decode_video, require_av


@dataclass
class VideoBatch:
    """Concatenated frames of several videos, in batches for the image encoder, and the number of frames per video."""

    images: list[np.ndarray]
    frames: list[int]


def video_settings(config: VideoEncoderConfig, image: ImageEncoderConfig, max_pixels: int) -> dict[str, Any]:
    """Return the settings that determine video features: the sampling of frames, and the image encoder."""
    require_av()
    images = image_settings(image, max_pixels)
    return {
        "model": images.pop("model"),
        "frames": config.frames,
        "max_seconds": config.max_seconds,
        "max_frames": config.max_frames,
        "image": images,
    }


class VideoDecoder:
    """Decodes and resizes frames of videos; see `encoders.encoder.Decoder` for the contract."""

    modality = "video"

    def __init__(self, config: VideoEncoderConfig, image: ImageEncoderConfig, max_pixels: int) -> None:
        self.config = config
        self.max_pixels = max_pixels
        self.frames = ImageDecoder(image, max_pixels)
        self.chunk = config.batch_size

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return (k, size, size, 3) uint8 frames of each decodable video of an entity."""
        size = self.frames.config.size
        return decode_files(members, lambda content: decode_video(content, self.config, size, self.max_pixels))

    def collate(self, pieces: list[np.ndarray]) -> VideoBatch:
        """Return the frames of all videos in batches of the image encoder's size."""
        frames = np.concatenate(pieces)
        step = self.frames.chunk
        batches = [self.frames.collate(list(frames[start : start + step])) for start in range(0, len(frames), step)]
        return VideoBatch(batches, [len(piece) for piece in pieces])


class VideoEncoder(VideoDecoder, Overlapped):
    """Encodes videos as F means and F standard deviations of image features; the contract is `Encoder`'s."""

    def __init__(
        self, config: VideoEncoderConfig, image: ImageEncoderConfig, max_pixels: int, device: str = "cpu"
    ) -> None:
        super().__init__(config, image, max_pixels)
        self.settings = video_settings(config, image, max_pixels)
        self.image = ImageEncoder(image, max_pixels, device)
        self.width = 2 * self.image.width

    def launch(self, batch: VideoBatch) -> Fetch:
        """Start encoding; the features are (n, 2 F) float32, and a video of one frame has deviation 0."""
        launched = [self.image.launch(images) for images in batch.images]

        def statistics() -> np.ndarray:
            features = np.concatenate([fetch() for fetch in launched])
            videos = np.split(features, np.cumsum(batch.frames)[:-1])
            return np.stack([np.concatenate([video.mean(axis=0), video.std(axis=0)]) for video in videos])

        return statistics
