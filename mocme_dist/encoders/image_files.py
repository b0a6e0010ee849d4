"""Decodes image files to arrays of pixels: known formats, a limit on pixels, no truncated files.

The only module that decodes with pillow. Limits are set per image where pillow allows it; `limit_pillow`, which workers
calls, sets those that are globals of the process.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from mocme_dist.encoders.encoder import BadFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Goes up when the same file gives other pixels; features made before are then computed again.
PIXELS = 3
_PNG = b"\x89PNG\r\n\x1a\n"
ANIMATED = ("WEBP", "GIF", "PNG")
MAX_ANIMATED_PIXELS = 10_000_000_000  # over all frames: minutes of decoding; a GIF of a few kB could take days


def decode_image(content: bytes, size: int, max_pixels: int) -> np.ndarray:
    """Return an image file as (size, size, 3) uint8: first frame, upright, RGB, on white, resized bilinearly.

    Raises:
        BadFile: cause 'empty file', 'not an image', 'too large', 'truncated' or 'undecodable'.
    """
    with _opened(content, FORMATS, max_pixels) as image:
        return _upright(_shrunk(image, size), image)


def thumbnail(content: bytes, side: int, max_pixels: int) -> bytes:
    """Return an image's first frame as a PNG file that fits into side x side pixels; transparent parts stay so.

    Raises:
        BadFile: as `decode_image`.
    """
    with _opened(content, FORMATS, max_pixels) as image:
        resized_image = image
        if image.mode.startswith(("I", "F")):
            resized_image = Image.fromarray(_shrunk(image, side))
        elif image.mode not in ("L", "LA", "RGB", "RGBA"):
            resized_image = image.convert("RGBA")
        resized_image.thumbnail((side, side), Image.Resampling.BILINEAR)
        out = io.BytesIO()
        ImageOps.exif_transpose(resized_image).save(out, "PNG")
        return out.getvalue()


def decode_frames(
    content: bytes, count: int, size: int, max_pixels: int, max_frames: int, max_seconds: float
) -> np.ndarray:
    """Return frames of an animated image: the middles of `count` equal parts, or all frames if there are fewer.

    Args:
        content: an animated WebP, GIF or PNG; a still image is a video of one frame.
        count: number of frames.
        size, max_pixels: as in `decode_image`.
        max_frames, max_seconds: longer animations are refused.

    Returns:
        (k, size, size, 3) uint8, 1 <= k <= count.

    Raises:
        BadFile: as `decode_image`; also 'too long'. 'too large' also if all frames together have over 10^10 pixels.
    """
    with _opened(content, ANIMATED, max_pixels) as image:
        frames = int(getattr(image, "n_frames", 1))
        if frames > max_frames:
            raise BadFile("too long", f"{frames:,} frames, limit {max_frames:,}")
        if frames > 1 and frames * image.width * image.height > MAX_ANIMATED_PIXELS:
            raise BadFile(
                "too large",
                f"{frames:,} frames of {image.width} x {image.height} pixels, limit {MAX_ANIMATED_PIXELS:,} in all",
            )
        wanted = set(middles(frames, count))
        seen = []
        length_ms = 0.0
        for place in range(frames):  # a frame depends on those before it, so all up to the last wanted one are decoded
            image.seek(place)
            image.load()
            length_ms += float(image.info.get("duration") or 0) if frames > 1 else 0.0
            if length_ms > 1000 * max_seconds:
                raise BadFile("too long", f"more than {max_seconds:,.0f} s")
            if place in wanted:
                seen.append(_shrunk(image, size))
        return np.stack(seen)


def middles(frames: int, count: int) -> list[int]:
    """Return the places of the frames in the middle of `count` equal parts of a video, or all if there are fewer."""
    count = min(frames, count)
    return [(2 * part + 1) * frames // (2 * count) for part in range(count)]


def shrink(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8 of an RGB image of any size, resized as in `decode_image`."""
    return _shrunk(Image.fromarray(pixels_HWC), size)


def _shrunk(image: Image.Image, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8; resizes before converting colours, because a conversion copies the whole image."""

    def resized(resized_image: Image.Image) -> np.ndarray:
        return np.asarray(resized_image.resize((size, size), Image.Resampling.BILINEAR))

    if image.mode.startswith(("I", "F")):
        # pillow would clip 16-bit greys to white; keep their upper byte
        grey = np.clip(np.rint(resized(image.convert("I")) / 257.0), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # on white, from colours multiplied by their opacity: c + (1 - a)
        if image.mode == "LA":
            image = image.convert("La")
        elif image.mode not in ("La", "RGBa"):
            # a conversion to the same mode would also copy the image
            image = (image if image.mode == "RGBA" else image.convert("RGBA")).convert("RGBa")
        pixels = resized(image).astype(np.int16)
        above = pixels[..., :-1]
        opacity = pixels[..., -1:]
        return np.broadcast_to(np.clip(above + 255 - opacity, 0, 255), (size, size, 3)).astype(np.uint8)
    if image.mode == "L":
        return np.repeat(resized(image)[..., None], 3, axis=2)
    return resized(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(pixels_SSC: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return the pixels turned as the EXIF orientation of the image says; a square is turned after it was resized."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block is ignored; pillow raises many kinds of error for it
        return pixels_SSC
    if orientation in (5, 6, 7, 8):  # rows and columns are exchanged
        pixels_SSC = pixels_SSC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_SSC = pixels_SSC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_SSC = pixels_SSC[:, ::-1]
    return np.ascontiguousarray(pixels_SSC)


@contextmanager
def _opened(content: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[Image.Image]:
    """Yield an image whose first frame is loaded; any error, also inside the block, becomes a `BadFile`."""
    if not content:
        raise BadFile("empty file", "0 bytes")
    content = _without_texts(content)
    if _is_cut(content):
        raise BadFile("truncated", f"the file ends after {len(content)} bytes, its header says it is longer")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            # checked before any pixel is decoded; pillow's own limit guards inner frames
            if image.width * image.height > max_pixels:
                raise BadFile("too large", f"{image.width} x {image.height} pixels, limit {max_pixels:,}")
            image.load()
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadFile("too large", str(error)) from None
    except UnidentifiedImageError:
        raise BadFile(
            "not an image", f"{len(content)} bytes that are none of {', '.join(formats)}: {content[:16]!r}"
        ) from None
    except BadFile:
        raise
    # Damaged files also end in struct.error, TypeError, KeyError, ...: pillow has many kinds of error.
    except Exception as error:
        cut = any(word in str(error).lower() for word in ("truncated", "not processed", "broken png"))
        raise BadFile(
            "truncated" if cut else "undecodable", str(error).partition("\n")[0] or type(error).__name__
        ) from None


def _without_texts(content: bytes) -> bytes:
    """Return a PNG file without its text chunks.

    Pillow refuses a file whose texts are long, whatever its pixels are.
    """
    if not content.startswith(_PNG):
        return content
    pieces = [_PNG]
    place = len(_PNG)
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            pieces.append(content[place:end])
        place = end
        if kind == b"IEND":
            break
    pieces.append(content[place:])
    return b"".join(pieces) if len(pieces) > 2 else content


def _is_cut(content: bytes) -> bool:
    """Return whether a WebP file is shorter than declared; its decoder would only report damage."""
    return (
        content[:4] == b"RIFF"
        and content[8:12] == b"WEBP"
        and int.from_bytes(content[4:8], "little") + 8 > len(content)
    )


def limit_pillow(max_pixels: int) -> None:
    """Set pillow's limits, which are globals of the process, so every worker calls this."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.simplefilter("error", Image.DecompressionBombWarning)
