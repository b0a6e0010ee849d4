"""Picture files to arrays of pixels, strictly: known formats, a limit on pixels, no half-read files.

The one module that imports pillow. Limits are set per picture where pillow allows it; those it keeps as globals of
the process are set by `guard_pillow`, which every worker calls.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mocme_dist.encoders.encoder import BadFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PIXELS = 2  # raise it when the same file gives other pixels: features made before are then made again
ANIMATED = ("WEBP", "GIF", "PNG")
MAX_ANIMATED_PIXELS = 10_000_000_000  # over all frames: minutes of decoding, where a GIF of a few kB could ask for days


def decode_picture(content: bytes, size: int, max_pixels: int) -> np.ndarray:
    """A picture file as (size, size, 3) uint8: first frame, RGB, transparent parts on white, resized bilinearly.

    Raises:
        BadFile: cause 'empty file', 'not an image', 'too large', 'truncated' or 'undecodable'.
    """
    with _opened(content, FORMATS, max_pixels) as image:
        return _shrunk(image, size)


def decode_frames(content: bytes, count: int, size: int, max_pixels: int, max_frames: int, max_seconds: float) -> np.ndarray:
    """Frames of an animated picture, the middles of `count` equal parts of it, or all where it has fewer.

    Args:
        content: an animated WebP, GIF or PNG; a still picture is a film of one frame.
        count: frames wanted.
        size, max_pixels: as in `decode_picture`.
        max_frames, max_seconds: a film of more is refused.

    Returns:
        (k, size, size, 3) uint8, 1 <= k <= count.

    Raises:
        BadFile: as `decode_picture`; also 'too long'. 'too large' as well where all frames together have over 10^10 pixels.
    """
    with _opened(content, ANIMATED, max_pixels) as image:
        frames = int(getattr(image, "n_frames", 1))
        if frames > max_frames:
            raise BadFile("too long", f"{frames:,} frames, limit {max_frames:,}")
        if frames > 1 and frames * image.width * image.height > MAX_ANIMATED_PIXELS:
            raise BadFile("too large", f"{frames:,} frames of {image.width} x {image.height} pixels, limit {MAX_ANIMATED_PIXELS:,} in all")
        wanted, seen, length_ms = set(middles(frames, count)), [], 0.0
        for place in range(frames):  # a frame is made from those before it, so none is decoded in vain but the last few
            image.seek(place)
            image.load()
            length_ms += float(image.info.get("duration") or 0) if frames > 1 else 0.0
            if length_ms > 1000 * max_seconds:
                raise BadFile("too long", f"more than {max_seconds:,.0f} s")
            if place in wanted:
                seen.append(_shrunk(image, size))
        return np.stack(seen)


def middles(frames: int, count: int) -> list[int]:
    """Places of the frames in the middle of `count` equal parts of a film, all places where it has fewer."""
    count = min(frames, count)
    return [(2 * part + 1) * frames // (2 * count) for part in range(count)]


def shrink(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) uint8 from an RGB picture of any size, as `decode_picture` makes it."""
    return _shrunk(Image.fromarray(pixels_HWC), size)


def _shrunk(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8; resized before its colours are converted, as a conversion copies the whole picture."""

    def resized(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))

    if image.mode.startswith(("I", "F")):
        # pillow would clip 16-bit greys to white; keep their upper byte
        grey = np.clip(np.rint(resized(image.convert("I")) / 257.0), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # on white, from colours multiplied by their opacity: c + (1 - a)
        if image.mode == "LA":
            image = image.convert("La")
        elif image.mode not in ("La", "RGBa"):
            # a conversion to the mode that it has would copy it as well
            image = (image if image.mode == "RGBA" else image.convert("RGBA")).convert("RGBa")
        pixels = resized(image).astype(np.int16)
        above, opacity = pixels[..., :-1], pixels[..., -1:]
        return np.broadcast_to(np.clip(above + 255 - opacity, 0, 255), (size, size, 3)).astype(np.uint8)
    if image.mode == "L":
        return np.repeat(resized(image)[..., None], 3, axis=2)
    return resized(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _opened(content: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[Image.Image]:
    """A picture whose first frame is loaded; what goes wrong with it, also later, becomes a `BadFile`."""
    if not content:
        raise BadFile("empty file", "0 bytes")
    if _is_cut(content):
        raise BadFile("truncated", f"the file ends after {len(content)} bytes, its header says it is longer")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            # before a single pixel is decoded; pillow's own limit guards what this cannot see
            if image.width * image.height > max_pixels:
                raise BadFile("too large", f"{image.width} x {image.height} pixels, limit {max_pixels:,}")
            image.load()
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadFile("too large", str(error)) from None
    except UnidentifiedImageError:
        raise BadFile("not an image", f"{len(content)} bytes that are none of {', '.join(formats)}: {content[:16]!r}") from None
    except BadFile:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError) as error:
        cut = any(word in str(error).lower() for word in ("truncated", "not processed", "broken png"))
        raise BadFile("truncated" if cut else "undecodable", str(error)) from None


def _is_cut(content: bytes) -> bool:
    """Whether a WebP file is shorter than it says: its decoder would only call it damaged."""
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP" and int.from_bytes(content[4:8], "little") + 8 > len(content)


def guard_pillow(max_pixels: int) -> None:
    """Set pillow's limits; they are globals of a process, so every worker calls this."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.simplefilter("error", Image.DecompressionBombWarning)
