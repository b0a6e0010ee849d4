"""What a checkpoint must share with the run that loads it.

Two things must not change under a run: the function that its numbers are the parameters of, and the sequence of batches
that it stands in. Rates, decay, dropout, losses' weights, clipping, epochs, evaluation, the type of the rows and all that
says where and how things run (ranks, ZeRO stage, sharding, bf16, the precision of products, parts of a step) may change from
one start to the next.
"""

from __future__ import annotations

from typing import Any

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset


def model_identity(config: Config, dataset: Dataset, modalities: tuple[str, ...]) -> dict[str, Any]:
    """The function: from rows and features to scores. A setting that its estimator does not read is None."""
    c = config
    informed, networks = c.fusion.estimator in ("mine", "cosine"), c.fusion.estimator == "mine"
    return {
        "num_entities": dataset.num_entities,
        "num_relations": dataset.num_relations,
        "dataset": dataset.fingerprint,
        "modalities": list(modalities),
        "width": c.experts.width,
        "num_experts": c.experts.num_experts,
        "experts": c.experts.kind,
        "residual": c.experts.residual,
        "structure": c.projection.structure,
        "projection_hidden": c.projection.hidden or c.experts.width,
        "gamma": c.rotate.gamma,
        "estimator": c.fusion.estimator,
        "scope": c.fusion.scope if informed else None,
        "temperature": c.fusion.temperature if informed else None,
        "normalize": c.fusion.normalize if networks else None,
        "mine_hidden": c.mine.hidden if networks else None,
        "mine_bounded": c.mine.bounded if networks else None,
    }


def run_identity(config: Config, dataset: Dataset, modalities: tuple[str, ...], optimizer: str) -> dict[str, Any]:
    """The function, the state that moves it, and the sequence of batches; nothing here depends on the number of ranks.

    Args:
        optimizer: of the rows, "auto" resolved.
    """
    c = config
    return {
        **model_identity(config, dataset, modalities),
        "optimizer": optimizer,
        "seed": c.train.seed,
        "loss": c.train.loss,
        "batch_size": c.train.batch_size,
        "chunk_size": c.negatives.chunk_size,
        "negatives": 0 if c.train.loss == "one_vs_all" else c.negatives.count,
    }
