"""Numbers of entities as features: for each attribute its scaled value and whether it is there.

Two passes. The first counts attributes and fits centre and scale of each over the whole data set; the second writes
(value, presence) pairs. Ids are a random permutation of the entities, so the first values of an attribute in id order
are a random sample of it: the fit uses up to `SAMPLE` of them and its memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mocme_dist.encoders.encoder import Decoded, Failure, printable
from mocme_dist.errors import DataError

SAMPLE = 100_000  # values of an attribute that its median and quartiles are taken from
CLIP = 5.0
RULE = 2  # goes up when the same numbers give other statistics
_TAIL = 5.0  # the normal distribution has 1.7, the exponential 3.6, a log-normal of sigma 2 has 29


@dataclass(frozen=True)
class Attribute:
    """How one attribute is scaled: clip((f(x) - centre) / scale), f the signed log for heavy tails."""

    name: str
    count: int
    log: bool
    centre: float
    scale: float


@dataclass(frozen=True)
class NumericStatistics:
    """The attributes kept, most frequent first (ties by name), and how many were left out."""

    attributes: tuple[Attribute, ...]
    left_out: int

    @property
    def sha256(self) -> str:
        """Pins the features made with these statistics."""
        return hashlib.sha256(json.dumps([asdict(a) for a in self.attributes], sort_keys=True).encode("utf8")).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As JSON values; floats survive the way to a file and back exactly."""
        return {"attributes": [asdict(a) for a in self.attributes], "left_out": self.left_out}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NumericStatistics:
        """What `to_json` gave."""
        return cls(tuple(Attribute(**a) for a in value["attributes"]), int(value["left_out"]))


def read_numbers(members: Mapping[str, bytes]) -> tuple[dict[str, float], list[Failure]]:
    """The finite numbers of an entity by attribute, and what was none."""
    content = members.get("numeric.json")
    if content is None:
        return {}, []
    try:
        values = json.loads(content.decode("utf8", "replace"))
        items = list(values.items())
    except (ValueError, AttributeError, RecursionError) as error:
        return {}, [Failure("not JSON", f"numeric.json: {error}")]
    numbers, failures = {}, []
    for name, value in items:
        number = _number(value)
        if math.isfinite(number):
            numbers[printable(name)] = number
        else:
            failures.append(Failure("not a number", f"numeric.json: {name}: {reprlib.repr(value)}"))
    return numbers, failures


def _number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else, and for integers beyond a float."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def collect_numbers(samples: Iterable[Mapping[str, bytes]]) -> dict[str, tuple[int, list[float]]]:
    """First pass over one shard: (count, first values) of each attribute, from the members of its samples in id order."""
    found: dict[str, tuple[int, list[float]]] = {}
    for members in samples:
        for name, value in read_numbers(members)[0].items():
            count, values = found.get(name, (0, []))
            if count < SAMPLE:
                values.append(value)
            found[name] = (count + 1, values)
    return found


def fit_numbers(shards: Iterable[Mapping[str, tuple[int, list[float]]]], max_attributes: int) -> NumericStatistics:
    """Statistics of the whole data set from those of its shards, in shard order."""
    merged: dict[str, tuple[int, list[float]]] = {}
    for shard in shards:
        for name, (more, values) in shard.items():
            count, kept = merged.setdefault(name, (0, []))
            kept.extend(values[: SAMPLE - len(kept)])
            merged[name] = (count + more, kept)
    by_frequency = sorted(merged, key=lambda name: (-merged[name][0], name))
    kept_names = by_frequency[:max_attributes]
    attributes = tuple(_fit(name, merged[name][0], np.asarray(merged[name][1], dtype=np.float64)) for name in kept_names)
    return NumericStatistics(attributes, len(by_frequency) - len(kept_names))


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) * log(1 + abs(x)), element by element."""
    return np.sign(values) * np.log1p(np.abs(values))


def tail(values: np.ndarray) -> float:
    """How far the 1st or 99th percentile lies from the median, in interquartile ranges; infinite where those are 0."""
    low, first, median, third, high = np.quantile(values, (0.01, 0.25, 0.5, 0.75, 0.99))
    return float(max(high - median, median - low) / (third - first)) if third > first else math.inf


def wants_log(values: np.ndarray) -> bool:
    """Whether the tail is heavy and the signed log makes it lighter.

    It does for populations and areas; for years and latitudes, whose tail lies towards zero, it would stretch the tail and
    press everything else together. Where most values are equal there is no spread to judge by, and no log.
    """
    heavy = tail(values)
    return _TAIL < heavy < math.inf and tail(signed_log(values)) < heavy


def _fit(name: str, count: int, values: np.ndarray) -> Attribute:
    log = wants_log(values)
    if log:
        values = signed_log(values)
    first, median, third = np.quantile(values, (0.25, 0.5, 0.75))
    # most values equal: the quartiles say nothing, so the deviation does; all equal: any scale gives 0
    scale = float(third - first) or float(values.std()) or 1.0
    return Attribute(name, count, log, float(median), scale)


class NumericEncoder:
    """Numbers to (value, presence) pairs; see `encoders.encoder.Encoder` for the contract."""

    modality = "numeric"
    chunk = 4096

    def __init__(self, statistics: NumericStatistics) -> None:
        attributes = statistics.attributes
        if not attributes:
            raise DataError("encoders.numeric: no shard holds a number; leave numeric out of the modalities")
        self.statistics = statistics
        self.settings = numeric_settings(statistics)
        self.width = 2 * len(attributes)
        self.column = {a.name: i for i, a in enumerate(attributes)}
        self.log = np.array([a.log for a in attributes])
        self.centre = np.array([a.centre for a in attributes])
        self.scale = np.array([a.scale for a in attributes])

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """(A,) float64 with NaN where an attribute is absent; none when the entity has no kept attribute."""
        numbers, failures = read_numbers(members)
        row = np.full(len(self.column), np.nan)
        for name, value in numbers.items():
            if (column := self.column.get(name)) is not None:
                row[column] = value
        return Decoded([] if np.isnan(row).all() else [row], failures)

    def collate(self, pieces: list[np.ndarray]) -> np.ndarray:
        """(n, A) float64."""
        return np.stack(pieces)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        """(n, 2 A) float32: value of attribute a at 2 a, in [-5, 5]; presence at 2 a + 1; both 0 where absent."""
        there = ~np.isnan(batch)
        values = np.where(there, batch, 0.0)
        values = np.where(self.log, signed_log(values), values)
        scaled = np.clip((values - self.centre) / self.scale, -CLIP, CLIP)
        return np.stack([np.where(there, scaled, 0.0), there], axis=2).reshape(len(batch), -1).astype(np.float32)


def numeric_settings(statistics: NumericStatistics) -> dict[str, Any]:
    """What pins the numeric features."""
    return {
        "model": "robust scaling",
        "clip": CLIP,
        "attributes": len(statistics.attributes),
        "left_out": statistics.left_out,
        "statistics": statistics.sha256,
    }
