"""The spaces of a run's evidence, and its memory and time, known before anything is computed."""

from __future__ import annotations

from typing import Any

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import features_manifest
from mocme_dist.data.files import read_json
from mocme_dist.errors import ConfigError
from mocme_dist.evaluation.blended import PASS_QUERIES, ROWS
from mocme_dist.evidence.facts import Facts, cost_of
from mocme_dist.evidence.fit import VALUES
from mocme_dist.evidence.terms import FACTS
from mocme_dist.training.build import feature_modalities, model_blocks, resolve_modalities

MODEL = "model"
# Candidates of a held-out query, about.
CANDIDATES = 500


def wanted_spaces(config: Config, dataset: Dataset, ranks: int) -> tuple[str, ...]:
    """The spaces that a configuration asks for and the data set may have, in order.

    None where there is nothing to fit on.

    auto takes those of the modalities that the model fuses; all and names, any modality of the data set.

    Raises:
        ConfigError: a space is asked for whose modality the data set does not have.
    """
    chosen = config.evidence.spaces
    if chosen == () or not len(dataset.triples("valid")):
        return ()
    modalities = [name for name in resolve_modalities(config.modalities, dataset) if name != "structure"]
    if chosen != "auto":
        modalities = list(dict.fromkeys([*modalities, *dataset.modalities]))
    there = [*modalities, *(["coordinates"] if "numeric" in modalities else []), MODEL, FACTS]
    if chosen == "all":
        return tuple(there)
    if chosen != "auto":
        if missing := [name for name in chosen if name not in there]:
            raise ConfigError(
                f"evidence.spaces: no {', '.join(missing)} here; expected some of {', '.join(there)}, auto or []"
            )
        return tuple(name for name in there if name in chosen)
    rows = dataset.num_entities / ranks
    fits = 4 * rows * _width(config, dataset) <= config.evaluation.vectors_mb << 20
    return tuple(there) if fits and evidence_seconds(config, dataset, ranks) <= 60 * config.evidence.max_minutes else ()


def evidence_seconds(config: Config, dataset: Dataset, ranks: int) -> float:
    """Estimated seconds to find the evidence of valid and test."""
    facts = Facts(dataset.known("train"), dataset.num_entities)
    held = feature_modalities(config.modalities, config.evidence.spaces, dataset)
    width = _width(config, dataset) + sum(feature_width(dataset, name) for name in held)
    costs = [cost_of(facts, dataset.triples(split)) for split in ("valid", "test") if len(dataset.triples(split))]
    return sum(cost.seconds(width, ranks) for cost in costs)


def evidence_bytes(config: Config, dataset: Dataset, ranks: int) -> int:
    """Memory that a rank's evidence takes while it ranks and fits, at most: nothing without evidence."""
    spaces = wanted_spaces(config, dataset, ranks)
    if not spaces:
        return 0
    rows = -(-dataset.num_entities // ranks)
    of_space = {MODEL: _width(config, dataset), "coordinates": 3, FACTS: 4}
    width = sum(of_space[name] if name in of_space else feature_width(dataset, name) for name in spaces)
    terms, queries = 2 * len(spaces) + 2, min(2 * len(dataset.triples("valid")), config.blend.queries)
    held = 2 * rows * width + 24 * len(dataset.known("train").keys)
    # Units of sources and answers and their sums; biases of a block; then the sample and the values that it is picked
    # from.
    ranking = PASS_QUERIES * width * 16 + 8 * config.evaluation.query_block * min(rows, ROWS)
    fitting = 2 * 4 * queries * CANDIDATES * terms + 8 * VALUES  # the sample, and its halves
    return held + max(ranking, fitting)


def _width(config: Config, dataset: Dataset) -> int:
    """D of the model's vectors."""
    return model_blocks(config.fusion, config.experts, resolve_modalities(config.modalities, dataset)).total


def numeric_statistics(dataset: Dataset, modality: str) -> dict[str, Any] | None:
    """Statistics of the numeric encoder; None for other modalities and for numeric features that were imported."""
    path = dataset.directory / "features" / modality / "statistics.json"
    return dict(read_json(path)) if modality == "numeric" and path.is_file() else None


def feature_width(dataset: Dataset, modality: str) -> int:
    """Numbers per entity of a modality's features; 1,024 where they are not extracted yet."""
    features = features_manifest(dataset.directory, modality)
    return 1024 if features is None else features.width


def evidence_time(config: Config, dataset: Dataset, world_size: int) -> tuple[float, list[str]]:
    """Seconds to find the evidence of valid and test, and a note if auto leaves it out for lack of time or memory."""
    if config.evidence.spaces == () or not len(dataset.triples("valid")):
        return 0.0, []
    seconds = evidence_seconds(config, dataset, world_size)
    if wanted_spaces(config, dataset, world_size):
        return seconds, []
    return 0.0, [
        f"evidence.spaces=auto leaves evidence out: finding it exactly takes about {seconds / 60:,.0f} minutes"
        f" (evidence.max_minutes is {config.evidence.max_minutes:g}), or a rank's vectors need more than"
        " evaluation.vectors_mb; more workers shorten both"
    ]
