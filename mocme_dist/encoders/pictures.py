"""Picture files to arrays of pixels, strictly: known formats, a limit on pixels, no half-read files.

The one module that imports pillow. Limits are set per picture where pillow allows it; those it keeps as globals of
the process are set by `guard_pillow`, which every worker calls.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class PictureError(ValueError):
    """A picture that cannot be decoded; `cause` is what is counted."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def decode_picture(content: bytes, size: int, max_pixels: int) -> np.ndarray:
    """A picture file as (size, size, 3) uint8: first frame, RGB, transparent parts on white, resized bilinearly.

    Raises:
        PictureError: cause 'empty file', 'not an image', 'too large', 'truncated' or 'undecodable'.
    """
    if not content:
        raise PictureError("empty file", "0 bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # before a single pixel is decoded; pillow's own limit guards what this cannot see
            if image.width * image.height > max_pixels:
                raise PictureError("too large", f"{image.width} x {image.height} pixels, limit {max_pixels:,}")
            image.load()
            return np.asarray(_to_rgb(image).resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise PictureError("too large", str(error)) from None
    except UnidentifiedImageError:
        raise PictureError("not an image", f"{len(content)} bytes that are none of {', '.join(FORMATS)}: {content[:16]!r}") from None
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError) as error:
        cut = any(word in str(error).lower() for word in ("truncated", "not processed", "broken png"))
        raise PictureError("truncated" if cut else "undecodable", str(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # pillow would clip 16-bit greys to white; keep their upper byte
        grey = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, (255, 255, 255, 255)), above).convert("RGB")
    return image.convert("RGB")


def guard_pillow(max_pixels: int) -> None:
    """Set pillow's limits; they are globals of a process, so every worker calls this."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.simplefilter("error", Image.DecompressionBombWarning)
