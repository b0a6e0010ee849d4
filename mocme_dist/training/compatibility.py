"""Compatibility fields: settings that a checkpoint must share with the run that loads it.

Two things must not change during a run: the function whose parameters it trains, and the sequence of batches. Learning
rates, decay, dropout, weights of losses, clipping, epochs, evaluation, the type of the rows, and settings of where and
how the run computes (ranks, ZeRO stage, sharding, bf16, matmul precision, micro-batches) may change between two starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset

# The user's setting behind each compatibility field.
SETTINGS = {
    "num_entities": "data.dataset (entities)",
    "num_relations": "data.dataset (relations)",
    "dataset": "data.dataset (content)",
    "modalities": "modalities",
    "width": "experts.width",
    "num_experts": "experts.num_experts",
    "experts": "experts.kind",
    "residual": "experts.residual",
    "structure": "projection.structure",
    "projection_hidden": "projection.hidden",
    "gamma": "rotate.gamma",
    "form": "fusion.form",
    "estimator": "fusion.estimator",
    "scope": "fusion.scope",
    "temperature": "fusion.temperature",
    "normalize": "fusion.normalize",
    "mine_hidden": "mine.hidden",
    "mine_bounded": "mine.bounded",
    "optimizer": "entities.optimizer",
    "seed": "train.seed",
    "loss": "train.loss",
    "batch_size": "train.batch_size",
    "chunk_size": "negatives.chunk_size",
    "negatives": "negatives.count",
}

# Sections about where and how a run computes and ranks, which do not change what it trains.
HOW = ("run", "launch", "compile", "evaluation", "evidence", "blend", "features")
# Sections that may differ from those of a finished run: they change no figure of its report.
UNREPORTED = ("run", "launch", "compile", "evaluation", "features")


def changed_fields(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line per compatibility field that differs, as `train.seed 0 -> 5`; fields that `now` lacks are
    skipped."""
    return [
        f"{SETTINGS.get(key, key)} {_shown(then[key]) if key in then else 'nothing'} -> {_shown(value)}"
        for key, value in now.items()
        if then.get(key) != value
    ]


def changed_settings(then: Config, now: Config, but: tuple[str, ...] = ("run",)) -> list[str]:
    """Return one line per setting that differs, as `train.learning_rate 0.003 -> 0.03`.

    Paths inside the run's own directory are compared relative to it.

    Args:
        but: sections that are not compared.
    """
    before, after = (_flat(config.model_dump(mode="json"), config.run.dir) for config in (then, now))
    return [
        f"{key} {_shown(before[key])} -> {_shown(value)}"
        for key, value in after.items()
        if before[key] != value and key.split(".")[0] not in but
    ]


def nothing_to_do(place: str, step: int, changed: list[str]) -> str:
    """Return the message for a finished run that is started again with settings to which no step would apply."""
    lines = "".join(f"\n  {line}" for line in changed)
    return (
        f"{place}: this run finished at step {step}, and these changes would have no effect on it; use "
        "another run.dir, more "
        "train.epochs to continue where only rates change, --resume none to start anew, or `evaluate --set` for "
        "settings of "
        f"evidence and blend{lines}"
    )


def _flat(settings: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Return the values by full key, with paths inside the run's directory relative to it."""
    flat: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", settings)]
    while waiting:
        prefix, values = waiting.pop(0)
        for key, value in values.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
            elif isinstance(value, str) and value.startswith(f"{run_dir}/"):
                flat[f"{prefix}{key}"] = f"RUN_DIR{value.removeprefix(run_dir)}"
            else:
                flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def model_identity(config: Config, dataset: Dataset, modalities: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of the function from rows and features to scores; settings that the estimator ignores are
    None."""
    c = config
    informed, networks = c.fusion.estimator in ("mine", "cosine"), c.fusion.estimator == "mine"
    return {
        "num_entities": dataset.num_entities,
        "num_relations": dataset.num_relations,
        "dataset": dataset.fingerprint,
        "modalities": list(modalities),
        "width": c.experts.width,
        "num_experts": c.experts.count_for(len(modalities)),
        "experts": c.experts.kind,
        "residual": c.experts.residual,
        "structure": c.projection.structure,
        "projection_hidden": c.projection.hidden or c.experts.width,
        "gamma": c.rotate.gamma,
        # None for the form of checkpoints that were written before blocks existed
        "form": c.fusion.form if c.fusion.form != "sum" and len(modalities) > 1 else None,
        "estimator": c.fusion.estimator,
        "scope": c.fusion.scope if informed else None,
        "temperature": c.fusion.temperature if informed else None,
        "normalize": c.fusion.normalize if networks else None,
        "mine_hidden": c.mine.hidden if networks else None,
        "mine_bounded": c.mine.bounded if networks else None,
    }


def run_identity(config: Config, dataset: Dataset, modalities: tuple[str, ...], optimizer: str) -> dict[str, Any]:
    """Return the fields of the function, its optimizer and the sequence of batches, independent of the number of ranks.

    Args:
        optimizer: of the rows, with "auto" resolved.
    """
    c = config
    return {
        **model_identity(config, dataset, modalities),
        "optimizer": optimizer,
        "seed": c.train.seed,
        "loss": c.train.loss,
        "batch_size": c.train.batch_size,
        "chunk_size": c.negatives.chunk_size,
        "negatives": c.num_negatives,
    }
