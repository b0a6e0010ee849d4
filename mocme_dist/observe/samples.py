"""A sample of a rank's entities for the projector: roles in the graph, labels and pictures.

Ids are a random permutation of the entities, so the first ids of a range are a random sample, and lie in few shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.dataset import Dataset
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.encoders.image_files import decode_image

NO_ROLE = "no fact"
OTHERS = "others"
TILE = 32
# One colour per role, distinguishable with colour blindness.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (120, 120, 120))
_SCAN = 1 << 20


def entity_roles(triples_T3: NDArray[np.int64], relation_names: Sequence[str], first: int, count: int) -> list[str]:
    """Return the most frequent role of each entity in [first, first + count): "head of RELATION" or "tail of RELATION".

    Args:
        triples_T3: (T, 3) training triples, memory-mapped or not; read once, block by block.

    Returns:
        One role per entity: of equally frequent ones the lower relation, heads before tails; NO_ROLE without a triple.
    """
    num_roles = 2 * len(relation_names)
    found = []
    for start in range(0, len(triples_T3), _SCAN):
        block = np.asarray(triples_T3[start : start + _SCAN])
        for side, column in ((0, 0), (1, 2)):
            place = block[:, column] - first
            inside = (place >= 0) & (place < count)
            found.append(place[inside] * num_roles + 2 * block[inside, 1] + side)
    key, times = (
        np.unique(np.concatenate(found), return_counts=True)
        if found
        else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    )
    best = np.full(count, -1, dtype=np.int64)
    # Ascending frequency, then descending role: the last assignment stays.
    order = np.lexsort((-key, times))
    best[key[order] // num_roles] = key[order] % num_roles
    return [
        NO_ROLE if role < 0 else f"{('head', 'tail')[role % 2]} of {relation_names[role // 2]}"
        for role in best.tolist()
    ]


def frequent(roles: Sequence[str], limit: int) -> list[str]:
    """Return the roles with all but the `limit` most frequent replaced by OTHERS."""
    names, times = np.unique(np.asarray(roles, dtype=str), return_counts=True)
    kept = set(names[np.argsort(-times, kind="stable")][:limit].tolist())
    return [role if role in kept else OTHERS for role in roles]


def thumbnails(
    dataset: Dataset, first: int, roles: Sequence[str], max_member_bytes: int, max_pixels: int
) -> NDArray[np.uint8]:
    """Return (n, TILE, TILE, 3) first pictures of n entities from `first` on; a dot in the colour of its role if there
    is none.

    Raises:
        DataError: a shard is damaged.
    """
    count = len(roles)
    shown = frequent(roles, len(_COLOURS) - 1)
    colour = {role: _COLOURS[min(place, len(_COLOURS) - 1)] for place, role in enumerate(sorted(set(shown) - {OTHERS}))}
    tiles = {role: _dot(colour.get(role, _COLOURS[-1])) for role in set(shown)}
    out = np.stack([tiles[role] for role in shown])
    for shard in range(dataset.shards.num_shards):
        low, high = dataset.shards.bounds(shard)
        if high <= first or low >= first + count:
            continue
        for sample in dataset.read_samples(shard, max_member_bytes):
            files = sample.files("image")
            if first <= sample.id < first + count and files:
                try:
                    out[sample.id - first] = decode_image(files[0], TILE, max_pixels)
                except BadFile:
                    continue  # extraction has counted and reported it
    return out


def _dot(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return (TILE, TILE, 3), a disc on white."""
    away = np.hypot(*(np.indices((TILE, TILE)) - (TILE - 1) / 2))[..., None]
    return np.where(away < TILE / 5, np.array(colour), 255).astype(np.uint8)
