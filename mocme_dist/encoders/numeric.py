"""Numbers of entities as features: the scaled value of each attribute, its presence, and its Fourier features.

Two passes: the first counts attributes and fits the scale of each over the whole data set, the second writes features.
Ids are a random permutation of the entities, so the first values of an attribute in id order are a random sample of it:
the fit uses up to `SAMPLE` of them, and its memory does not grow with the data set.

Layout: the attributes in the order of the statistics, each with 2 + 2 n columns for n frequencies: value, presence,
sin(pi 2^-1 u), cos(pi 2^-1 u), sin(pi u), cos(pi u), ..., sin(pi 2^(n-2) u), cos(pi 2^(n-2) u), where u is the value
scaled to [-1, 1]. An absent attribute is all zeros. With several frequencies a small projection can distinguish near
values without losing the order of distant ones.
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

SAMPLE = 100_000  # values per attribute from which quantiles are computed
CLIP = 5.0
RULE = 3  # increased whenever the same numbers give other statistics
_TAIL = 5.0  # the normal distribution has 1.7, the exponential 3.6, a log-normal of sigma 2 has 29


@dataclass(frozen=True)
class Attribute:
    """Scale of one attribute: value clip((f(x) - centre) / scale), where f is the signed log for heavy tails.

    u rises from -1 to 1 between `low` and `high`, the 0.5 % and 99.5 % quantiles of f(x).
    """

    name: str
    count: int
    log: bool
    centre: float
    scale: float
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class NumericStatistics:
    """The attributes kept, most frequent first (ties by name), and the number left out."""

    attributes: tuple[Attribute, ...]
    left_out: int

    @property
    def sha256(self) -> str:
        """Return a hash that identifies features made with these statistics."""
        return hashlib.sha256(
            json.dumps([asdict(a) for a in self.attributes], sort_keys=True).encode("utf8")
        ).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, from which `from_json` restores floats exactly."""
        return {"attributes": [asdict(a) for a in self.attributes], "left_out": self.left_out}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NumericStatistics:
        """Return the statistics that `to_json` wrote."""
        return cls(tuple(Attribute(**a) for a in value["attributes"]), int(value["left_out"]))


def read_numbers(members: Mapping[str, bytes]) -> tuple[dict[str, float], list[Failure]]:
    """Return the finite numbers of an entity by attribute, and failures for all other values."""
    content = members.get("numeric.json")
    if content is None:
        return {}, []
    try:
        values = json.loads(content.decode("utf8", "replace"))
        items = list(values.items())
    except (ValueError, AttributeError, RecursionError) as error:
        return {}, [Failure("not JSON", f"numeric.json: {error}")]
    numbers = {}
    failures = []
    for name, value in items:
        number = _number(value)
        if math.isfinite(number):
            numbers[printable(name)] = number
        else:
            failures.append(Failure("not a number", f"numeric.json: {name}: {reprlib.repr(value)}"))
    return numbers, failures


def _number(value: Any) -> float:
    """Return a JSON number as a float; NaN for anything else, and for integers beyond the range of floats."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def collect_numbers(samples: Iterable[Mapping[str, bytes]]) -> dict[str, tuple[int, list[float]]]:
    """Return (count, first values) per attribute of one shard, from the members of its samples in id order."""
    found: dict[str, tuple[int, list[float]]] = {}
    for members in samples:
        for name, value in read_numbers(members)[0].items():
            count, values = found.get(name, (0, []))
            if count < SAMPLE:
                values.append(value)
            found[name] = (count + 1, values)
    return found


def fit_numbers(shards: Iterable[Mapping[str, tuple[int, list[float]]]], max_attributes: int) -> NumericStatistics:
    """Return statistics of the whole data set from those of its shards, in shard order."""
    merged: dict[str, tuple[int, list[float]]] = {}
    for shard in shards:
        for name, (more, values) in shard.items():
            count, kept = merged.setdefault(name, (0, []))
            kept.extend(values[: SAMPLE - len(kept)])
            merged[name] = (count + more, kept)
    by_frequency = sorted(merged, key=lambda name: (-merged[name][0], name))
    kept_names = by_frequency[:max_attributes]
    attributes = tuple(
        _fit(name, merged[name][0], np.asarray(merged[name][1], dtype=np.float64)) for name in kept_names
    )
    return NumericStatistics(attributes, len(by_frequency) - len(kept_names))


def signed_log(values: np.ndarray) -> np.ndarray:
    """Return sign(x) * log(1 + abs(x)), elementwise."""
    return np.sign(values) * np.log1p(np.abs(values))


def tail(values: np.ndarray) -> float:
    """Return the distance of the 1st or 99th percentile from the median, in interquartile ranges.

    Infinite if that is 0.
    """
    low, first, median, third, high = np.quantile(values, (0.01, 0.25, 0.5, 0.75, 0.99))
    return float(max(high - median, median - low) / (third - first)) if third > first else math.inf


def wants_log(values: np.ndarray) -> bool:
    """Return whether the tail is heavy and the signed log makes it lighter.

    It does for populations and areas. For years and latitudes, whose tail is towards zero, it would stretch the tail
    and compress everything else. If most values are equal there is no spread to judge by, and no log is taken.
    """
    heavy = tail(values)
    return _TAIL < heavy < math.inf and tail(signed_log(values)) < heavy


def _fit(name: str, count: int, values: np.ndarray) -> Attribute:
    log = wants_log(values)
    if log:
        values = signed_log(values)
    low, first, median, third, high = (float(q) for q in np.quantile(values, (0.005, 0.25, 0.5, 0.75, 0.995)))
    # if most values are equal the deviation replaces the quartiles; if all are equal any scale gives 0
    scale = third - first or float(values.std()) or 1.0
    return Attribute(name, count, log, median, scale, low, high)


class NumericEncoder:
    """Encodes numbers as the columns described above; see `encoders.encoder.Encoder` for the contract.

    Args:
        statistics: of the data set.
        fourier: n, frequencies per attribute.

    Raises:
        DataError: the data set has no numbers.
    """

    modality = "numeric"
    chunk = 1024  # 256 attributes of 12 columns then take 25 MB in float64, temporaries a few times as much

    def __init__(self, statistics: NumericStatistics, fourier: int) -> None:
        attributes = statistics.attributes
        if not attributes:
            raise DataError("encoders.numeric: no shard holds a number; leave numeric out of the modalities")
        self.statistics = statistics
        self.settings = numeric_settings(statistics, fourier)
        self.width = (2 + 2 * fourier) * len(attributes)
        self.column = {a.name: i for i, a in enumerate(attributes)}
        self.log = np.array([a.log for a in attributes])
        self.centre = np.array([a.centre for a in attributes])
        self.scale = np.array([a.scale for a in attributes])
        self.middle = np.array([(a.low + a.high) / 2 for a in attributes])
        self.reach = np.array([(a.high - a.low) / 2 or 1.0 for a in attributes])
        self.frequencies = np.pi * 2.0 ** np.arange(-1, fourier - 1)

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return (A,) float64 with NaN for absent attributes; nothing if the entity has no kept attribute."""
        numbers, failures = read_numbers(members)
        row = np.full(len(self.column), np.nan)
        for name, value in numbers.items():
            if (column := self.column.get(name)) is not None:
                row[column] = value
        return Decoded([] if np.isnan(row).all() else [row], failures)

    def collate(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Return (n, A) float64."""
        return np.stack(pieces)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        """Return (n, width) float32: values in [-5, 5], all else in [-1, 1], zeros for absent attributes."""
        there = ~np.isnan(batch)
        values = np.where(there, batch, 0.0)
        values = np.where(self.log, signed_log(values), values)
        scaled = np.clip((values - self.centre) / self.scale, -CLIP, CLIP)
        angles = np.clip((values - self.middle) / self.reach, -1, 1)[..., None] * self.frequencies
        waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*batch.shape, -1)
        columns = np.concatenate([scaled[..., None], np.ones_like(scaled)[..., None], waves], axis=-1)
        return np.where(there[..., None], columns, 0.0).reshape(len(batch), -1).astype(np.float32)


def numeric_settings(statistics: NumericStatistics, fourier: int) -> dict[str, Any]:
    """Return the settings that determine numeric features."""
    return {
        "model": "robust scaling",
        "clip": CLIP,
        "fourier": fourier,
        "attributes": len(statistics.attributes),
        "left_out": statistics.left_out,
        "statistics": statistics.sha256,
    }
