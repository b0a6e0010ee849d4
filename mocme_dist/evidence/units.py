"""Unit vectors as whole numbers, so that a product of two is exact in float32, whatever adds it up in whatever order.

A vector of length 1 is scaled by `SCALE` and rounded. A sum of any terms of a product stays below 2^24 by
Cauchy-Schwarz, up to `MAX_WIDTH` coordinates, so every partial sum is a whole number that float32 holds: matrix
products of numpy, of torch and of a GPU agree bit for bit, in any blocks and on any number of ranks. Rounding moves a
point by a few parts in 10,000.

Closeness of two vectors is 2 a.b - |a|^2 - |b|^2, also a whole number: minus the squared distance. For unit vectors
that is 2 SCALE^2 (cosine - 1), but rounding blurs it in proportion to the distance, and the order of near points stays
right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ShapeError

SCALE = 2000
MAX_WIDTH = 8192
# A key holds a closeness above an id: keys in descending order are closest first, ties by ascending id.
_ID_BITS = 37
_ID_MASK = (1 << _ID_BITS) - 1
NOBODY = int(np.iinfo(np.int64).min)

Integers = NDArray[np.int64]


def to_units(values_nF: NDArray[Any]) -> NDArray[np.int16]:
    """(n, F) rows scaled to length `SCALE` and rounded; rows of length 0 stay 0.

    Raises:
        ShapeError: rows are wider than `MAX_WIDTH`.
    """
    if values_nF.shape[1] > MAX_WIDTH:
        raise ShapeError(f"evidence: vectors of width {values_nF.shape[1]:,}, expected at most {MAX_WIDTH:,}")
    # float64: its rounding does not reach the rounded values, whatever shape the sum of squares is taken in.
    values_nF = np.asarray(values_nF, np.float64)
    length_n1 = np.sqrt(np.square(values_nF).sum(1, keepdims=True))
    return np.rint(values_nF * (SCALE / np.where(length_n1 > 0, length_n1, 1.0))).astype(np.int16)


def cosine_of(closeness: NDArray[Any]) -> NDArray[np.float64]:
    """Cosines of closenesses."""
    return np.asarray(1.0 + np.asarray(closeness, np.float64) / (2 * SCALE**2))


def closeness_of(cosine: NDArray[np.float64]) -> Integers:
    """Closenesses, rounded to whole numbers, of cosines."""
    return np.rint((cosine - 1.0) * (2 * SCALE**2)).astype(np.int64)


def to_keys(closeness: Any, ids: Any) -> Any:
    """int64 keys of closenesses and ids, arrays or tensors."""
    return (closeness << _ID_BITS) + (_ID_MASK - ids)


def from_keys(keys: Integers) -> tuple[Integers, Integers]:
    """Closenesses and ids of keys; where a key is `NOBODY` both mean nothing."""
    return keys >> _ID_BITS, _ID_MASK - (keys & _ID_MASK)
