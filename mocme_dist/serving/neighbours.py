"""Modality weights of an entity, and its nearest entities by each modality's own vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.serving.bundle import Bundle

_CHUNK_ROWS = 1 << 14


def modality_weights(bundle: Bundle, entity: int) -> dict[str, float]:
    """Return the weight of each modality that an entity has in its vector; they sum to 1."""
    weight_M = bundle.rows(bundle.weight_parts, np.array([entity]))[0]
    return {name: float(weight) for name, weight in zip(bundle.modalities, weight_M, strict=True) if weight > 0}


def neighbours(
    bundle: Bundle, entity: int, count: int = 3, modality: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the entities most like `entity` by each modality, or by one, by cosine; see `Bundle.neighbours`."""
    if not bundle.view_parts:
        return {}
    part, row = divmod(entity, bundle.partition.shard_rows)
    own_MD = bundle.view_parts[part][:, row].astype(np.float32)
    found = {}
    for m, name in enumerate(bundle.modalities):
        length = float(np.linalg.norm(own_MD[m]))
        if length == 0 or modality not in (None, name):
            continue
        views = [parts[m] for parts in bundle.view_parts]
        cosine, rows = _nearest_by_angle(views, own_MD[m] / length, entity, count)
        columns = (rows.tolist(), bundle.entities.take(rows), bundle.entities.take_labels(rows), cosine.tolist())
        found[name] = [
            dict(zip(("row", "id", "label", "cosine"), values, strict=True)) for values in zip(*columns, strict=True)
        ]
    return found


def _nearest_by_angle(
    parts: list[NDArray[np.int8]], unit_D: NDArray[np.float32], entity: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return cosines and rows of the `count` vectors of smallest angle, without `entity` itself and absent ones."""
    cosines = [np.zeros(0, np.float32)]
    ids = [np.zeros(0, np.int64)]
    first = 0
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
