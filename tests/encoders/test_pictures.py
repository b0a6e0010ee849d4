"""Pictures of every mode decode to what a plain reference says; bad ones fail with their cause."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_media import picture, png_header

from mocme_dist.config.schema import ImageEncoderConfig
from mocme_dist.encoders.image import ImageEncoder
from mocme_dist.encoders.pictures import BadFile, decode_picture

LIMIT = 1_000_000


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_picture_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode_picture(saved(Image.fromarray(pixels)), 16, LIMIT), pixels)


def test_resizing_halves_a_picture_to_block_means():
    # a constant 2 x 2 pattern: any symmetric filter gives each half's own mean away from the border
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 200
    small = decode_picture(saved(Image.fromarray(pixels)), 16, LIMIT)
    assert small.shape == (16, 16, 3)
    assert (small[:, :7] == 0).all() and (small[:, 9:] == 200).all()


def test_transparency_is_seen_on_white():
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 255  # red
    pixels[:4, :, 3] = 255  # opaque above, clear below
    decoded = decode_picture(saved(Image.fromarray(pixels)), 8, LIMIT)
    assert (decoded[:4] == (255, 0, 0)).all() and (decoded[4:] == 255).all()


def test_a_palette_with_a_clear_colour_is_seen_on_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode_picture(saved(image), 8, LIMIT) == (10, 20, 30)).all()
    assert (decode_picture(saved(image, transparency=1), 8, LIMIT) == 255).all()


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    decoded = decode_picture(saved(image, "JPEG", quality=100), 8, LIMIT)
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() < 12


def test_sixteen_bit_grey_keeps_its_upper_byte():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode_picture(saved(Image.fromarray(grey)), 8, LIMIT)
    assert np.array_equal(decoded, np.repeat(np.rint(grey / 257.0).astype(np.uint8)[..., None], 3, axis=2))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8, LIMIT)
    assert (decoded == (255, 0, 0)).all()


WHOLE = picture(0, (200, 200))
JPEG = picture(0, (200, 200), kind="JPEG")


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"", "empty file"),
        (b"<html><body>404 Not Found</body></html>", "not an image"),
        (bytes(1000), "not an image"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (png_header(20_000, 20_000), "too large"),
        (saved(Image.new("RGB", (8, 8)), "TIFF"), "not an image"),
    ],
    ids=["empty", "html", "zeros", "half a png", "half a jpeg", "400 megapixels", "another format"],
)
def test_a_bad_picture_fails_with_its_cause(content, cause):
    with pytest.raises(BadFile) as raised:
        decode_picture(content, 32, LIMIT)
    assert raised.value.cause == cause


def test_the_pixel_limit_is_exact():
    content = picture(0, (100, 10))
    assert decode_picture(content, 8, 1000).shape == (8, 8, 3)
    with pytest.raises(BadFile, match="100 x 10 pixels, limit 999"):
        decode_picture(content, 8, 999)


def test_a_damaged_webp_never_escapes():
    content = picture(0, (64, 64), kind="WEBP")
    for length in range(12, len(content), max(1, len(content) // 20)):
        with pytest.raises(BadFile):
            decode_picture(content[:length], 8, LIMIT)


def test_encoder_counts_bad_files_and_keeps_good_ones_in_order():
    encoder = ImageEncoder(ImageEncoderConfig(model="torchvision:squeezenet1_1", random_weights=True, size=32), LIMIT)
    members = {"image.10.png": picture(10), "image.2.png": b"", "image.0.png": picture(0), "image.1.gif": b"<html>"}
    decoded = encoder.decode(members)
    assert [(failure.cause, failure.message.split(":")[0]) for failure in decoded.failures] == [
        ("not an image", "image.1.gif"),
        ("empty file", "image.2.png"),
    ]
    assert [piece.tolist() for piece in decoded.pieces] == [decode_picture(picture(seed), 32, LIMIT).tolist() for seed in (0, 10)]


def test_half_clear_pixels_mix_with_white_before_and_after_resizing():
    gen = np.random.default_rng(1)
    pixels = gen.integers(0, 256, (64, 48, 4), dtype=np.uint8)
    mixed = pixels[..., :3] * (pixels[..., 3:] / 255.0) + 255.0 - pixels[..., 3:]
    expected = decode_picture(saved(Image.fromarray(np.rint(mixed).astype(np.uint8))), 16, LIMIT).astype(int)
    assert np.abs(decode_picture(saved(Image.fromarray(pixels)), 16, LIMIT) - expected).max() <= 1
    grey = np.stack([pixels[..., 0], pixels[..., 3]], axis=-1)
    mixed = grey[..., 0] * (grey[..., 1] / 255.0) + 255.0 - grey[..., 1]
    expected = decode_picture(saved(Image.fromarray(np.rint(mixed).astype(np.uint8))), 16, LIMIT).astype(int)
    assert np.abs(decode_picture(saved(Image.fromarray(grey, "LA")), 16, LIMIT) - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.parametrize("mode, bytes_per_pixel", [("RGB", 4), ("RGBA", 8), ("LA", 8), ("L", 1), ("I;16", 6), ("P", 5)])
def test_a_picture_at_the_limit_takes_no_more_than_two_copies_of_it(mode, bytes_per_pixel):
    # Pillow keeps four bytes for a pixel of most modes. VmHWM, as a child's ru_maxrss begins at what its parent holds.
    side = 7000
    code = (
        "import io, sys; from PIL import Image; from mocme_dist.encoders.pictures import decode_picture, guard_pillow\n"
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        f"guard_pillow(50_000_000); content = sys.stdin.buffer.read(); small = Image.new('{mode}', (8, 8)); held = io.BytesIO()\n"
        "small.save(held, 'PNG'); decode_picture(held.getvalue(), 224, 50_000_000)\n"
        "before = peak()\n"
        "decode_picture(content, 224, 50_000_000)\n"
        "print((peak() - before) * 1024)"
    )
    content = saved(Image.new(mode, (side, side)), compress_level=1)
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    assert int(done.stdout) < side * side * bytes_per_pixel + (48 << 20)
