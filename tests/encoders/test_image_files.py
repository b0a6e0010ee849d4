"""Pictures of every mode decode to what a plain reference says; bad ones fail with their cause."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_media import picture, png_header

from mocme_dist.config.schema import ImageEncoderConfig
from mocme_dist.encoders.image import ImageEncoder
from mocme_dist.encoders.image_files import BadFile, decode_frames, decode_image

LIMIT = 1_000_000


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_picture_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(saved(Image.fromarray(pixels)), 16, LIMIT), pixels)


def test_resizing_halves_a_picture_to_block_means():
    # a constant 2 x 2 pattern: any symmetric filter gives each half's own mean away from the border
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 200
    small = decode_image(saved(Image.fromarray(pixels)), 16, LIMIT)
    assert small.shape == (16, 16, 3)
    assert (small[:, :7] == 0).all() and (small[:, 9:] == 200).all()


def test_transparency_is_seen_on_white():
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 255  # red
    pixels[:4, :, 3] = 255  # opaque above, clear below
    decoded = decode_image(saved(Image.fromarray(pixels)), 8, LIMIT)
    assert (decoded[:4] == (255, 0, 0)).all() and (decoded[4:] == 255).all()


def test_a_palette_with_a_clear_colour_is_seen_on_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode_image(saved(image), 8, LIMIT) == (10, 20, 30)).all()
    assert (decode_image(saved(image, transparency=1), 8, LIMIT) == 255).all()


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    decoded = decode_image(saved(image, "JPEG", quality=100), 8, LIMIT)
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() < 12


def test_sixteen_bit_grey_keeps_its_upper_byte():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode_image(saved(Image.fromarray(grey)), 8, LIMIT)
    assert np.array_equal(decoded, np.repeat(np.rint(grey / 257.0).astype(np.uint8)[..., None], 3, axis=2))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8, LIMIT)
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
        decode_image(content, 32, LIMIT)
    assert raised.value.cause == cause


def test_the_pixel_limit_is_exact():
    content = picture(0, (100, 10))
    assert decode_image(content, 8, 1000).shape == (8, 8, 3)
    with pytest.raises(BadFile, match="100 x 10 pixels, limit 999"):
        decode_image(content, 8, 999)


def test_a_damaged_webp_never_escapes():
    content = picture(0, (64, 64), kind="WEBP")
    for length in range(12, len(content), max(1, len(content) // 20)):
        with pytest.raises(BadFile):
            decode_image(content[:length], 8, LIMIT)


def test_encoder_counts_bad_files_and_keeps_good_ones_in_order():
    encoder = ImageEncoder(ImageEncoderConfig(model="torchvision:squeezenet1_1", random_weights=True, size=32), LIMIT)
    members = {"image.10.png": picture(10), "image.2.png": b"", "image.0.png": picture(0), "image.1.gif": b"<html>"}
    decoded = encoder.decode(members)
    assert [(failure.cause, failure.message.split(":")[0]) for failure in decoded.failures] == [
        ("not an image", "image.1.gif"),
        ("empty file", "image.2.png"),
    ]
    assert [piece.tolist() for piece in decoded.pieces] == [
        decode_image(picture(seed), 32, LIMIT).tolist() for seed in (0, 10)
    ]


def test_half_clear_pixels_mix_with_white_before_and_after_resizing():
    gen = np.random.default_rng(1)
    pixels = gen.integers(0, 256, (64, 48, 4), dtype=np.uint8)
    mixed = pixels[..., :3] * (pixels[..., 3:] / 255.0) + 255.0 - pixels[..., 3:]
    expected = decode_image(saved(Image.fromarray(np.rint(mixed).astype(np.uint8))), 16, LIMIT).astype(int)
    assert np.abs(decode_image(saved(Image.fromarray(pixels)), 16, LIMIT) - expected).max() <= 1
    grey = np.stack([pixels[..., 0], pixels[..., 3]], axis=-1)
    mixed = grey[..., 0] * (grey[..., 1] / 255.0) + 255.0 - grey[..., 1]
    expected = decode_image(saved(Image.fromarray(np.rint(mixed).astype(np.uint8))), 16, LIMIT).astype(int)
    assert np.abs(decode_image(saved(Image.fromarray(grey, "LA")), 16, LIMIT) - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.parametrize("mode, bytes_per_pixel", [("RGB", 4), ("RGBA", 8), ("LA", 8), ("L", 1), ("I;16", 6), ("P", 5)])
def test_a_picture_at_the_limit_takes_no_more_than_two_copies_of_it(mode, bytes_per_pixel):
    # Pillow keeps four bytes for a pixel of most modes. VmHWM, as a child's ru_maxrss begins at what its parent holds.
    side = 7000
    code = (
        "import io, sys; from PIL import Image; from mocme_dist.encoders.image_files import decode_image,"
        " limit_pillow\npeak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if"
        " line.startswith('VmHWM'))\nlimit_pillow(50_000_000); content = sys.stdin.buffer.read(); small ="
        f" Image.new('{mode}', (8, 8)); held = io.BytesIO()\nsmall.save(held, 'PNG'); decode_image(held.getvalue(),"
        " 224, 50_000_000)\nbefore = peak()\ndecode_image(content, 224, 50_000_000)\nprint((peak() - before) * 1024)"
    )
    content = saved(Image.new(mode, (side, side)), compress_level=1)
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    assert int(done.stdout) < side * side * bytes_per_pixel + (48 << 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_applied(orientation):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = (255, 0, 0)
    pixels[:16, 16:] = (0, 255, 0)
    upright = Image.fromarray(pixels)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    assert np.array_equal(decode_image(saved(stored, exif=exif), 32, LIMIT), pixels)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_long_texts_in_a_png_do_not_hide_its_pixels(kind):
    plain = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    text = b"Comment\0" + (b"\0\0\0\0" if kind == b"iTXt" else b"\0" if kind == b"zTXt" else b"")
    text += zlib.compress(b"x" * 3_000_000) if kind == b"zTXt" else b"x" * 3_000_000
    chunk = len(text).to_bytes(4, "big") + kind + text + zlib.crc32(kind + text).to_bytes(4, "big")
    assert np.array_equal(decode_image(plain[:33] + chunk + plain[33:], 8, LIMIT), decode_image(plain, 8, LIMIT))
    with pytest.raises(BadFile, match=r"truncated|broken|not processed"):
        decode_image((plain[:33] + chunk + plain[33:])[:-500], 8, LIMIT)


def test_an_animation_cut_inside_a_block_is_a_bad_file():
    content = (
        b"GIF87a\t\x00\t\x00\x81\x00\x00\xff\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00,\x00\x00\x00\x00\t\x00\t\x00\x00\x08\x00"
        b"\x11\x00\x01\x08\x1cH\xb0\xa0\xc1\x83\x08\x13*\\\xc8p`@\x00!\xf9\x04\x01\x00\x00\x01\x00,\xd7D\x0e\x10p"
    )
    with pytest.raises(BadFile):  # pillow raises a struct.error
        decode_frames(content, 2, 16, LIMIT, 20, 60.0)
