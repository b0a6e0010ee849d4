"""Pictures of a country: its flag, and its outline drawn from longitudes and latitudes. Same input, same bytes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

FLAG_SCALE = 8
OUTLINE_SIZE = 160
_OVERSAMPLING = 4
_MARGIN = 8


def flag_png(path: Path) -> bytes:
    """The flag file enlarged 8 times (encoders look at squares of hundreds of pixels, the file has 16 x 11), as PNG."""
    with Image.open(path) as picture:
        flag = picture.convert("RGBA")
    white = Image.new("RGBA", flag.size, "white")
    flat = Image.alpha_composite(white, flag).convert("RGB")
    return _png(flat.resize((flat.width * FLAG_SCALE, flat.height * FLAG_SCALE), Image.Resampling.BICUBIC))


def outer_rings(collection: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """The outer rings of a GeoJSON collection's polygons, as (longitude, latitude) in degrees.

    A shape that crosses the date line is shifted into one piece: longitudes below 0 grow by 360.
    """
    rings: list[list[tuple[float, float]]] = []
    for feature in collection.get("features", []):
        geometry = feature.get("geometry") or {}
        polygons = geometry.get("coordinates", [])
        if geometry.get("type") == "Polygon":
            polygons = [polygons]
        rings.extend(
            [(float(x), float(y)) for x, y, *_ in polygon[0]] for polygon in polygons if polygon and len(polygon[0]) > 2
        )
    longitudes = [x for ring in rings for x, _ in ring]
    if longitudes and max(longitudes) - min(longitudes) > 180:
        rings = [[(x + 360 if x < 0 else x, y) for x, y in ring] for ring in rings]
    return rings


def outline_png(collection: dict[str, Any]) -> bytes | None:
    """The shape filled dark on white, north up, as a square PNG; None where the source has no shape.

    Longitudes shrink by the cosine of the middle latitude, so that shapes keep their proportions; the scale is the
    shape's own, so the picture tells form, not size.
    """
    rings = outer_rings(collection)
    if not rings:
        return None
    ys = [y for ring in rings for _, y in ring]
    squeeze = math.cos(math.radians((min(ys) + max(ys)) / 2))
    flat = [[(x * squeeze, -y) for x, y in ring] for ring in rings]
    xs, ys = [x for ring in flat for x, _ in ring], [y for ring in flat for _, y in ring]
    size = OUTLINE_SIZE * _OVERSAMPLING
    span = max(max(xs) - min(xs), max(ys) - min(ys), 1e-6)
    scale = (size - 2 * _MARGIN * _OVERSAMPLING) / span
    left, top = (min(xs) + max(xs) - span) / 2, (min(ys) + max(ys) - span) / 2
    canvas = Image.new("L", (size, size), 255)
    draw = ImageDraw.Draw(canvas)
    offset = _MARGIN * _OVERSAMPLING
    for ring in flat:
        draw.polygon([(offset + (x - left) * scale, offset + (y - top) * scale) for x, y in ring], fill=40)
    return _png(canvas.resize((OUTLINE_SIZE, OUTLINE_SIZE), Image.Resampling.BOX).convert("RGB"))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
