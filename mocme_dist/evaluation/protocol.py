"""Which queries are evaluated: both directions of a split's triples, or a fixed sample of them while training."""

from __future__ import annotations

import numpy as np

from mocme_dist.evaluation.ranking import Queries

_SAMPLE_SEED = 20240607


def split_queries(triples_T3: np.ndarray, limit: int = 0) -> Queries:
    """Both queries of every triple, or of a fixed sample when there are more than `limit` queries.

    The sample is the same at every call, so a curve over epochs compares like with like; both directions of a
    drawn triple are in it.
    """
    if limit and 2 * len(triples_T3) > limit:
        chosen = np.random.default_rng(_SAMPLE_SEED).choice(len(triples_T3), max(1, limit // 2), replace=False)
        triples_T3 = np.asarray(triples_T3)[np.sort(chosen)]
    return Queries.both_directions(triples_T3)
