"""Entities without one of their modalities: their fused vectors, and rotations of vectors in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
# Entities whose scores are taken apart; their ids are a random permutation, so the first ones are a sample.
CANDIDATES = 8192


def rotate(vector_nD: Floats, phase_nC: Floats, direction_n: Integers) -> Floats:
    """(n, D) vectors rotated by their phases, against them for heads."""
    phase_nC = phase_nC * (1 - 2 * np.asarray(direction_n)[:, None]).astype(np.float32)
    real, imaginary = np.split(vector_nD, 2, axis=1)
    cos, sin = np.cos(phase_nC), np.sin(phase_nC)
    return np.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=1).astype(np.float32)


def fused_without(bundle: Bundle, ids: Integers, m: int) -> tuple[Floats, NDArray[np.bool_]]:
    """(n, d) fused vectors of entities with modality m taken from them, and which of them have another one.

    The other weights keep their proportions.
    """
    length_n = _lengths(bundle, ids)[:, m]
    weight_nM = bundle.rows(bundle.weight_parts, ids)
    rest_n = weight_nM.sum(1) - weight_nM[:, m]
    there_n = rest_n > 1e-6
    without_nd = _fused(bundle, ids)
    without_nd -= length_n[:, None] * view_rows(bundle, ids, m)
    without_nd /= np.where(there_n, rest_n, 1.0)[:, None]
    return without_nd, there_n


def _fused(bundle: Bundle, ids: Integers) -> Floats:
    """(n, d) fused vectors: of a model of blocks the last block."""
    C = bundle.view_width // 2
    rows_nD = bundle.rows(bundle.vector_parts, ids)
    D = rows_nD.shape[1] // 2
    return rows_nD if C == D else np.concatenate([rows_nD[:, D - C : D], rows_nD[:, 2 * D - C :]], axis=1)


# Lengths of the first entities of a bundle, which every question needs.
_KEPT: WeakKeyDictionary[Bundle, Floats] = WeakKeyDictionary()


def _lengths(bundle: Bundle, ids: Integers) -> Floats:
    """(n, M) factors of the modalities' directions in the fused vectors of entities.

    The fused vector is a weighted sum of the modalities' vectors, of which a bundle keeps the directions. The factors
    are those that make the sum the vector, by least squares.
    """
    if bundle not in _KEPT:
        _KEPT[bundle] = _solve(bundle, np.arange(min(bundle.num_entities, CANDIDATES)))
    kept_nM = _KEPT[bundle]
    inside = ids < len(kept_nM)
    out_nM = np.empty((len(ids), kept_nM.shape[1]), np.float32)
    out_nM[inside] = kept_nM[ids[inside]]
    if not inside.all():
        out_nM[~inside] = _solve(bundle, ids[~inside])
    return out_nM


def _solve(bundle: Bundle, ids: Integers) -> Floats:
    view_Mnd = np.stack([view_rows(bundle, ids, m) for m in range(len(bundle.modalities))])
    gram_nMM = np.einsum("mnd,knd->nmk", view_Mnd, view_Mnd)
    size_n = np.maximum(np.trace(gram_nMM, axis1=1, axis2=2), 1.0)
    gram_nMM += np.eye(len(view_Mnd), dtype=np.float32) * (1e-6 * size_n)[:, None, None]
    product_nM = np.einsum("mnd,nd->nm", view_Mnd, _fused(bundle, ids))
    return np.linalg.solve(gram_nMM, product_nM[..., None])[..., 0].astype(np.float32)


def view_rows(bundle: Bundle, ids: Integers, m: int) -> Floats:
    """(n, d) directions of modality m's own vectors of some entities."""
    return bundle.rows([views[m] for views in bundle.view_parts], ids)
