"""The spaces of a run's evidence, and its memory and time, known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class EvidencePlan:
    """The evidence that a run will use, known from its configuration and packed data set.

    Attributes:
        world_size: number of ranks.
    """

    config: Config
    dataset: Dataset
    world_size: int

    @cached_property
    def spaces(self) -> tuple[str, ...]:
        """Return the spaces that are asked for and that the data set has, in order; none without triples to fit on.

        auto takes those of the modalities that the model fuses; all and names, any modality of the data set.

        Raises:
            ConfigError: a space is asked for whose modality the data set does not have.
        """
        config, dataset = self.config, self.dataset
        chosen = config.evidence.spaces
        if self._is_off:
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
        rows = dataset.num_entities / self.world_size
        fits = 4 * rows * self._width <= config.evaluation.vectors_mb << 20
        return tuple(there) if fits and self.seconds <= 60 * config.evidence.max_minutes else ()

    @cached_property
    def seconds(self) -> float:
        """Return the estimated seconds to find the evidence of valid and test, also if none is used."""
        config, dataset = self.config, self.dataset
        facts = Facts(dataset.known("train"), dataset.num_entities)
        held = feature_modalities(config.modalities, config.evidence.spaces, dataset)
        width = self._width + sum(feature_width(dataset, name) for name in held)
        costs = [cost_of(facts, dataset.triples(split)) for split in ("valid", "test") if len(dataset.triples(split))]
        return sum(cost.seconds(width, self.world_size) for cost in costs)

    @property
    def num_bytes(self) -> int:
        """Return the bytes that a rank's evidence takes at most while it ranks and fits; 0 without evidence."""
        config, dataset, spaces = self.config, self.dataset, self.spaces
        if not spaces:
            return 0
        rows = -(-dataset.num_entities // self.world_size)
        of_space = {MODEL: self._width, "coordinates": 3, FACTS: 4}
        width = sum(of_space[name] if name in of_space else feature_width(dataset, name) for name in spaces)
        terms, queries = 2 * len(spaces) + 2, min(2 * len(dataset.triples("valid")), config.blend.queries)
        held = 2 * rows * width + 24 * len(dataset.known("train").keys)
        # Units of sources and answers and their sums; biases of a block; then the sample and the values that it is
        # picked from.
        ranking = PASS_QUERIES * width * 16 + 8 * config.evaluation.query_block * min(rows, ROWS)
        fitting = 2 * 4 * queries * CANDIDATES * terms + 8 * VALUES  # the sample, and its halves
        return held + max(ranking, fitting)

    def notes(self) -> list[str]:
        """Return a note if auto leaves evidence out for lack of time or memory."""
        if self._is_off or self.spaces:
            return []
        return [
            f"evidence.spaces=auto leaves evidence out: finding it exactly takes about {self.seconds / 60:,.0f} minutes"
            f" (evidence.max_minutes is {self.config.evidence.max_minutes:g}), or a rank's vectors need more than"
            " evaluation.vectors_mb; more workers shorten both"
        ]

    @property
    def _is_off(self) -> bool:
        return self.config.evidence.spaces == () or not len(self.dataset.triples("valid"))

    @property
    def _width(self) -> int:
        """Return D of the model's vectors."""
        config = self.config
        return model_blocks(config.fusion, config.experts, resolve_modalities(config.modalities, self.dataset)).total


def numeric_statistics(dataset: Dataset, modality: str) -> dict[str, Any] | None:
    """Statistics of the numeric encoder; None for other modalities and for numeric features that were imported."""
    path = dataset.directory / "features" / modality / "statistics.json"
    return dict(read_json(path)) if modality == "numeric" and path.is_file() else None


def feature_width(dataset: Dataset, modality: str) -> int:
    """Numbers per entity of a modality's features; 1,024 where they are not extracted yet."""
    features = features_manifest(dataset.directory, modality)
    return 1024 if features is None else features.width
