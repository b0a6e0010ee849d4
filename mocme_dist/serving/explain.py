"""Why an answer: which modalities made its vectors, and who is near by each modality alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.serving.bundle import Bundle

_CHUNK_ROWS = 1 << 14


def modality_weights(bundle: Bundle, entity: int) -> dict[str, float]:
    """Weight of each modality that an entity has in its vector; they sum to 1."""
    weight_M = bundle.rows(bundle.weights, np.array([entity]))[0]
    return {name: float(weight) for name, weight in zip(bundle.modalities, weight_M, strict=True) if weight > 0}


def neighbours(bundle: Bundle, entity: int, count: int = 3) -> dict[str, list[dict[str, Any]]]:
    """The entities that each modality alone says are most like `entity`, by cosine; modalities that it lacks are left out.

    Empty where the bundle has one modality only.
    """
    if not bundle.views:
        return {}
    part, row = divmod(entity, bundle.partition.shard_rows)
    own_MD = bundle.views[part][:, row].astype(np.float32)
    found = {}
    for m, name in enumerate(bundle.modalities):
        length = float(np.linalg.norm(own_MD[m]))
        if length == 0:
            continue
        cosine, ids = _nearest_by_angle([views[m] for views in bundle.views], own_MD[m] / length, entity, count)
        found[name] = [{"entity": other, "cosine": float(value)} for other, value in zip(bundle.entities.take(ids), cosine, strict=True)]
    return found


def _nearest_by_angle(
    parts: list[NDArray[np.int8]], unit_D: NDArray[np.float32], entity: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines and ids of the `count` vectors of smallest angle, `entity` itself and absent ones left out."""
    cosines, ids, first = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)], 0
    for part in parts:
        for start in range(0, len(part), _CHUNK_ROWS):
            rows = part[start : start + _CHUNK_ROWS].astype(np.float32)
            length = np.linalg.norm(rows, axis=1)
            cosine = np.where(length > 0, rows @ unit_D / np.maximum(length, 1), -np.inf)
            if 0 <= entity - first - start < len(rows):
                cosine[entity - first - start] = -np.inf
            best = np.argsort(-cosine, kind="stable")[:count]
            best = best[np.isfinite(cosine[best])]
            cosines.append(cosine[best].astype(np.float32))
            ids.append(first + start + best)
        first += len(part)
    cosine, at = np.concatenate(cosines), np.concatenate(ids)
    order = np.lexsort((at, -cosine))[:count]
    return cosine[order], at[order]
