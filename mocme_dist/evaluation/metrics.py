"""From ranks to the figures that are reported."""

from __future__ import annotations

from typing import Any

import numpy as np

HITS = (1, 3, 10)


def rank_metrics(rank_Q: np.ndarray) -> dict[str, float]:
    """MRR, Hits@k and mean rank of filtered ranks (1 is best; ties count with their mean, so ranks may be halves)."""
    if not len(rank_Q):
        return {"mrr": 0.0, **{f"hits@{k}": 0.0 for k in HITS}, "mr": 0.0}
    metrics = {"mrr": float((1 / rank_Q).mean())}
    metrics |= {f"hits@{k}": float((rank_Q <= k).mean()) for k in HITS}
    return {**metrics, "mr": float(rank_Q.mean())}


def report(split: str, rank_Q: np.ndarray, direction_Q: np.ndarray, **extra: Any) -> dict[str, Any]:
    """The metrics of both directions together and apart, as train and evaluate print them."""
    return {
        "split": split,
        **rank_metrics(rank_Q),
        "head": rank_metrics(rank_Q[direction_Q == 1]),
        "tail": rank_metrics(rank_Q[direction_Q == 0]),
        "num_queries": len(rank_Q),
        **extra,
    }
