"""Draws a square matrix as a picture that can be read by itself: names, the value in each cell, and the scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_DARK = np.array([8.0, 48.0, 107.0])
_MISSING = (200, 200, 200)
_CELL, _GAP, _BAR = 56, 10, 16
_INK = (30, 30, 30)


def heat_map(value_nn: NDArray[np.float64], names: Sequence[str], peak: float, unit: str = "") -> NDArray[np.uint8]:
    """Return (height, width, 3) uint8, a picture of a matrix: 0 is white, `peak` and above dark blue, NaN grey.

    Args:
        value_nn: the numbers.
        names: of the rows, which are those of the columns.
        peak: end of the scale, which is drawn at the right.
        unit: of the numbers, written at the scale.
    """
    font = ImageFont.load_default(15)
    n = len(names)
    wide = max((int(font.getlength(name)) for name in names), default=0)
    scale = [f"{peak:.2g} {unit}".strip(), "0"]
    right = _GAP + _BAR + _GAP + max(int(font.getlength(text)) for text in scale)
    left, top = wide + 2 * _GAP, wide + 2 * _GAP
    picture = Image.new("RGB", (left + n * _CELL + right + _GAP, top + n * _CELL + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = top + row * _CELL + _CELL // 2
        draw.text((left - _GAP, middle), name, _INK, font, anchor="rm")
        upright = Image.new("RGB", (wide, _CELL), "white")
        ImageDraw.Draw(upright).text((0, _CELL // 2), name, _INK, font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (left + row * _CELL, top - _GAP - wide))
        for column in range(n):
            _cell(draw, font, (left + column * _CELL, top + row * _CELL), float(value_nn[row, column]), peak)
    height = n * _CELL - 1
    bar = left + n * _CELL + _GAP
    for at in range(height):
        draw.line([(bar, top + at), (bar + _BAR, top + at)], _colour(1 - at / max(height - 1, 1)))
    draw.rectangle([bar, top, bar + _BAR, top + height], outline=_INK)
    for text, at, anchor in ((scale[0], top, "lt"), (scale[1], top + height, "lb")):
        draw.text((bar + _BAR + _GAP, at), text, _INK, font, anchor=anchor)
    return np.asarray(picture)


def _cell(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    at: tuple[int, int],
    value: float,
    peak: float,
) -> None:
    share = min(max(value / max(peak, 1e-9), 0.0), 1.0) if np.isfinite(value) else 0.0
    box = [at[0], at[1], at[0] + _CELL - 1, at[1] + _CELL - 1]
    draw.rectangle(box, _colour(share) if np.isfinite(value) else _MISSING, outline="white")
    if np.isfinite(value):
        middle = (at[0] + _CELL // 2, at[1] + _CELL // 2)
        draw.text(middle, f"{value:.2f}", "white" if share > 0.5 else _INK, font, anchor="mm")


def _colour(share: float) -> tuple[int, int, int]:
    red, green, blue = ((1 - share) * 255.0 + share * _DARK).astype(int).tolist()
    return red, green, blue
