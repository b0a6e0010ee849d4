"""Film features are mean and deviation of the picture features of their frames."""

from __future__ import annotations

import numpy as np
import pytest
from raw_media import animation, film

from mocme_dist.config.schema import ImageEncoderConfig, VideoEncoderConfig
from mocme_dist.encoders.image import ImageEncoder
from mocme_dist.encoders.video import VideoEncoder, video_settings
from mocme_dist.encoders.video_files import decode_video

LIMIT = 1_000_000
IMAGE = ImageEncoderConfig(model="torchvision:squeezenet1_1", random_weights=True, size=48, batch_size=3)
VIDEO = VideoEncoderConfig(frames=4, batch_size=3)


@pytest.fixture(scope="module")
def encoder() -> VideoEncoder:
    return VideoEncoder(VIDEO, IMAGE, LIMIT)


def test_features_are_mean_and_deviation_over_frames(encoder):
    contents = [film("mp4", [10 * i for i in range(20)]), animation("WEBP", [0, 200]), animation("GIF", [50])]
    pieces = [encoder.decode({"video.0.x": content}).pieces[0] for content in contents]
    assert [len(piece) for piece in pieces] == [4, 2, 1]
    found = encoder.encode(encoder.collate(pieces))
    assert found.shape == (3, encoder.width) and encoder.width == 2 * 512 and found.dtype == np.float32
    pictures = ImageEncoder(IMAGE, LIMIT)
    for row, content in zip(found, contents, strict=True):
        frames = [pictures.encode(pictures.collate([frame]))[0] for frame in decode_video(content, VIDEO, 48, LIMIT)]
        assert np.allclose(row, np.concatenate([np.mean(frames, axis=0), np.std(frames, axis=0)]), atol=1e-4)
    assert (found[2, 512:] == 0).all() and (found[0, 512:] > 0).any()


def test_bad_films_are_failures_and_good_ones_of_the_same_entity_stay(encoder):
    decoded = encoder.decode({"video.0.mp4": b"", "video.1.webp": animation("WEBP", [0, 9]), "video.2.mp4": b"<html>"})
    assert len(decoded.pieces) == 1 and [failure.cause for failure in decoded.failures] == ["empty file", "not a video"]


def test_settings_pin_frames_and_the_picture_encoder(encoder):
    plain = video_settings(VIDEO, IMAGE, LIMIT)
    assert encoder.settings == plain
    assert video_settings(VIDEO.model_copy(update={"frames": 5}), IMAGE, LIMIT) != plain
    assert video_settings(VIDEO, IMAGE.model_copy(update={"size": 32}), LIMIT) != plain
    assert video_settings(VIDEO, IMAGE, LIMIT + 1) != plain
    assert video_settings(VIDEO.model_copy(update={"batch_size": 1}), IMAGE, LIMIT) == plain
