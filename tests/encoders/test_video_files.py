"""Films of every kind give the frames in the middle of equal parts; bad ones fail with their cause."""

from __future__ import annotations

import numpy as np
import pytest
from raw_media import FILMS, animation, film, picture, png_header, sound

from mocme_dist.config.schema import VideoEncoderConfig
from mocme_dist.encoders import image_files, video_files
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.encoders.image_files import decode_image, middles
from mocme_dist.encoders.video_files import decode_video
from mocme_dist.errors import ConfigError

LIMIT = 1_000_000
GREYS = [8 * i for i in range(30)]


def frames_of(content: bytes, limit: int = LIMIT, **settings: object) -> np.ndarray:
    return decode_video(content, VideoEncoderConfig.model_validate({"frames": 5, **settings}), 16, limit)


def cause_of(content: bytes, limit: int = LIMIT, **settings: object) -> str:
    with pytest.raises(BadFile) as caught:
        frames_of(content, limit, **settings)
    assert "0x" not in str(caught.value), "an address in memory would make reports differ"
    return caught.value.cause


def test_the_middles_of_equal_parts_are_taken_and_all_of_a_short_film():
    assert middles(30, 5) == [3, 9, 15, 21, 27]
    assert middles(8, 8) == list(range(8)) and middles(3, 8) == [0, 1, 2] and middles(1, 8) == [0]
    for frames in range(1, 40):
        for count in range(1, 12):
            places = middles(frames, count)
            assert len(places) == min(frames, count) == len(set(places)) and min(places) >= 0 and max(places) < frames


@pytest.mark.parametrize("kind", FILMS)
@pytest.mark.parametrize("seek_s", [10.0, 0.05], ids=["decoded up to", "sought"])
def test_films_give_the_frames_asked_for(kind, seek_s, monkeypatch):
    monkeypatch.setattr(video_files, "_SEEK_S", seek_s)
    found = frames_of(film(kind, GREYS))
    assert found.shape == (5, 16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(float).mean(axis=(1, 2, 3)) - [GREYS[place] for place in middles(30, 5)]).max() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_give_the_frames_asked_for(kind, monkeypatch):
    greys = [0, 40, 80, 120, 160, 200]
    assert (frames_of(animation(kind, greys), frames=3)[:, 0, 0, 0] == [40, 120, 200]).all()
    assert (frames_of(animation(kind, greys), frames=9)[:, 0, 0, 0] == greys).all()
    assert cause_of(animation(kind, greys), max_frames=5) == "too long"
    assert cause_of(animation(kind, greys), max_seconds=0.55) == "too long"
    assert len(frames_of(animation(kind, greys), max_seconds=0.65)) == 5
    monkeypatch.setattr(image_files, "MAX_ANIMATED_PIXELS", 6 * 20 * 20 - 1)
    assert cause_of(animation(kind, greys)) == "too large"


def test_a_still_picture_is_a_film_of_one_frame():
    assert np.array_equal(frames_of(picture(3))[0], decode_image(picture(3), 16, LIMIT))


@pytest.mark.parametrize(
    "content", [*(film(kind, GREYS[:9]) for kind in FILMS), *(animation(k, [0, 9, 99]) for k in ("GIF", "WEBP", "PNG"))]
)
def test_a_cut_film_is_refused_whatever_its_kind(content):
    assert cause_of(content[: len(content) // 2]) == "truncated"


def test_bad_films_fail_with_their_cause():
    assert cause_of(b"") == "empty file"
    assert cause_of(b"<html>404</html>") == "not a video"
    assert cause_of(bytes(500)) == "not a video"
    assert cause_of(sound("wav")) == "not a video"
    assert cause_of(picture(0, kind="JPEG")) == "not a video"
    assert cause_of(b"#EXTM3U\n/etc/passwd\n") == "not a video"  # a playlist would open other files
    assert cause_of(b"\0\0\0\x08ftyp" * 4) == "undecodable"
    assert cause_of(b"\0\0\0\x03ftyp" + bytes(40)) == "undecodable"
    assert cause_of(b"\x1a\x45\xdf\xa3" + bytes(60)) == "undecodable"
    assert cause_of(png_header(40_000, 40_000)) == "too large"
    whole = film("mp4", GREYS)
    assert cause_of(whole, max_seconds=1.0) == "too long" and cause_of(whole, max_frames=20) == "too long"
    assert cause_of(whole, limit=40 * 40) == "too large"


def test_damaged_films_fail_or_give_frames_but_nothing_else():
    gen = np.random.default_rng(0)
    outcomes = set()
    for kind in FILMS:
        for _ in range(12):
            content = bytearray(film(kind, GREYS[:12]))
            start = int(gen.integers(8, len(content) - 60))
            content[start : start + 50] = gen.bytes(50)
            try:
                outcomes.add(frames_of(bytes(content)).shape[1:])
            except BadFile as error:
                outcomes.add(error.cause)
    assert (
        outcomes <= {(16, 16, 3), "undecodable", "truncated", "damaged", "not a video", "too long", "too large"}
        and len(outcomes) > 1
    )


def test_a_missing_package_names_the_pip_line(monkeypatch):
    content = film("mp4", GREYS[:3])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"modality video: package av .*pip install 'mocme-dist\[media\]'"):
        frames_of(content)
