"""Numbers: statistics and scaling against plain computations, limits, and what is none."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.encoders import numeric
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.numeric import NumericEncoder, NumericStatistics, collect_numbers, fit_numbers
from mocme_dist.errors import DataError


def member(**values: object) -> dict[str, bytes]:
    return {"numeric.json": json.dumps(values).encode()}


def fitted(samples: list[dict[str, bytes]], limit: int = 10, shards: int = 2) -> NumericStatistics:
    parts = [samples[i * len(samples) // shards : (i + 1) * len(samples) // shards] for i in range(shards)]
    return fit_numbers([collect_numbers(part) for part in parts], limit)


def test_values_are_scaled_by_median_and_quartiles_and_clipped():
    heights = [1.0, 2.0, 4.0, 8.0, 9.0, 11.0, 12.0]
    encoder = NumericEncoder(fitted([member(height=value) for value in heights]), 0)
    rows = [encoder.decode(member(height=value)).pieces[0] for value in [*heights, 1e6, -1e6]]
    first, median, third = statistics.quantiles(heights, n=4, method="inclusive")
    expected = [max(-5.0, min(5.0, (value - median) / (third - first))) for value in [*heights, 1e6, -1e6]]
    assert np.allclose(encoder.encode(encoder.collate(rows)), [[value, 1.0] for value in expected])


def test_heavy_tails_get_a_signed_log_and_even_spreads_do_not():
    rng = np.random.default_rng(0)
    people, year = np.exp(3 * rng.normal(size=400)), rng.uniform(1900, 2000, 400)
    encoder = NumericEncoder(fitted([member(people=p, year=y) for p, y in zip(people, year, strict=True)]), 0)
    kept = {a.name: a for a in encoder.statistics.attributes}
    assert kept["people"].log and not kept["year"].log
    logs = np.log1p(people)
    first, median, third = np.quantile(logs, (0.25, 0.5, 0.75))
    found = encoder.encode(encoder.collate([encoder.decode(member(people=p)).pieces[0] for p in people]))
    column = encoder.column["people"]
    assert np.allclose(found[:, 2 * column], np.clip((logs - median) / (third - first), -5, 5), atol=1e-6)
    assert numeric.signed_log(np.array([-np.e + 1.0]))[0] == pytest.approx(-1.0)


def test_a_tail_that_the_log_would_stretch_gets_none():
    rng = np.random.default_rng(1)
    year = np.concatenate([rng.normal(1970, 20, 380), rng.uniform(-500, 1500, 20)])
    latitude = np.concatenate([rng.normal(45, 5, 380), rng.uniform(-60, 0, 20)])
    debt = -np.exp(3 * rng.normal(size=400))  # as heavy as a population, below zero
    for values, log in ((year, False), (latitude, False), (debt, True), (np.array([0.0] * 390 + [1e9] * 10), False)):
        assert numeric.wants_log(values) == log
    assert numeric.tail(year) > 5 and numeric.tail(latitude) > 5


@pytest.mark.parametrize(
    "name, logs, plain",
    [
        (
            "DB15K",
            ("topic_server.population_number", "location.location.area"),
            ("location.geocode.latitude", "people.person.date_of_birth"),
        ),
        ("MKG-W", ("topic_server.population_number",), ("film.film.initial_release_date",)),
        ("worldfacts", ("population", "gdp_ppp_usd", "area_km2"), ("median_age", "independence_year")),
    ],
)
def test_relation_typed_attributes_of_real_graphs_are_told_apart(shared_data, name, logs, plain):
    values: dict[str, list[float]] = {}
    for line in (shared_data(name) / "numeric.tsv").read_text(encoding="utf8").splitlines()[1:]:
        _, attribute, value = line.split("\t")
        values.setdefault(attribute, []).append(float(value))
    found = {a.name: a for a in fit_numbers([{a: (len(v), v) for a, v in values.items()}], 256).attributes}
    assert [found[attribute].log for attribute in (*logs, *plain)] == [True] * len(logs) + [False] * len(plain)
    for attribute in (*logs, *plain):
        numbers = np.array(values[attribute])
        scaled = (numeric.signed_log(numbers) if found[attribute].log else numbers) - found[attribute].centre
        inside = np.abs(scaled / found[attribute].scale) < numeric.CLIP
        assert inside.mean() > 0.9, attribute


def test_absent_attributes_are_two_zeros_and_present_ones_carry_a_one():
    encoder = NumericEncoder(fitted([member(a=1, b=5), member(a=2, b=6), member(a=3)]), 0)
    found = encoder.encode(encoder.collate([encoder.decode(member(b=6)).pieces[0]]))
    assert [a.name for a in encoder.statistics.attributes] == ["a", "b"]
    assert encoder.width == 4 and found[0, :2].tolist() == [0, 0] and found[0, 3] == 1 and found[0, 2] != 0


def test_fourier_columns_are_the_powers_of_one_rotation():
    """exp(i pi 2^k u) by squaring exp(i pi u / 2), u between the 0.5 % and 99.5 % quantiles (of the logarithm if
    taken).
    """
    rng = np.random.default_rng(3)
    people, year = np.exp(3 * rng.normal(size=1001)), rng.uniform(1900, 2000, 1001)
    samples = [member(people=p, year=y) for p, y in zip(people, year, strict=True)]
    encoder, plain = NumericEncoder(fitted(samples), 5), NumericEncoder(fitted(samples), 0)
    rows = encoder.collate([encoder.decode(one).pieces[0] for one in [*samples, member(year=1950)]])
    found = encoder.encode(rows).reshape(len(rows), 2, 12)
    assert encoder.width == 24 and np.array_equal(found[..., :2], plain.encode(rows).reshape(-1, 2, 2))
    assert not found[-1, encoder.column["people"]].any()
    for name, values in (("people", np.log1p(people)), ("year", year)):
        ordered = np.sort(values)
        low, high = ordered[5], ordered[995]  # the quantiles of 1,001 values are values
        u = np.clip(2 * (values - low) / (high - low) - 1, -1, 1)
        wave = np.exp(0.5j * np.pi * u)
        for k in range(5):
            block = found[:-1, encoder.column[name], 2 + 2 * k : 4 + 2 * k]
            assert np.allclose(block, np.stack([wave.imag, wave.real], 1), atol=2e-6), (name, k)
            wave = wave**2


def test_equal_values_have_finite_waves_and_others_the_ends():
    encoder = NumericEncoder(fitted([member(a=3)] * 5), 2)
    found = encoder.encode(np.array([[3.0], [1e9], [-1e9]]))
    assert np.allclose(found[:, 2:4], [[0, 1], [1, 0], [-1, 0]], atol=1e-7)


def test_the_number_of_frequencies_pins_the_features():
    found = fitted([member(a=1), member(a=2)])
    hashes = {encoder_hash("numeric", NumericEncoder(found, n).settings, EncodersConfig()) for n in (0, 4, 5)}
    assert len(hashes) == 3


def test_the_most_frequent_attributes_are_kept_ties_by_name():
    found = fitted([member(z=1, b=1, a=1), member(z=2, b=2), member(z=3, a=3), member(c=1)], limit=2)
    assert [(a.name, a.count) for a in found.attributes] == [("z", 3), ("a", 2)] and found.left_out == 2
    assert NumericEncoder(found, 0).decode(member(c=1)).pieces == []


@pytest.mark.parametrize("values, scale", [([3, 3, 3], 1.0), ([3] * 9 + [13], 3.0)])
def test_equal_values_never_divide_by_zero(values, scale):
    assert fitted([member(a=value) for value in values]).attributes[0].scale == pytest.approx(scale)


def test_statistics_depend_neither_on_shards_nor_on_the_sample_limit_order(monkeypatch):
    samples = [member(a=i, b=i * i) for i in range(50)]
    assert fitted(samples, shards=1).sha256 == fitted(samples, shards=7).sha256
    monkeypatch.setattr(numeric, "SAMPLE", 20)
    limited = fitted(samples, shards=7)
    assert limited.sha256 == fitted(samples, shards=1).sha256
    assert limited.attributes[0].count == 50 and limited.attributes[0].centre == pytest.approx(9.5)


def test_statistics_survive_json_exactly():
    found = fitted([member(a=1 / 3, b=i) for i in range(5)])
    again = NumericStatistics.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and again.sha256 == found.sha256


def test_what_is_no_number_is_counted_and_the_rest_kept():
    encoder = NumericEncoder(fitted([member(a=1), member(a=2)]), 0)
    decoded = encoder.decode({"numeric.json": b'{"a": 2, "b": "x", "c": NaN, "d": true, "e": null}'})
    assert [failure.cause for failure in decoded.failures] == ["not a number"] * 4 and len(decoded.pieces) == 1
    assert [failure.cause for failure in encoder.decode({"numeric.json": b"{"}).failures] == ["not JSON"]
    assert encoder.decode({}).pieces == []


def test_numbers_beyond_floats_deep_nesting_and_lone_surrogates_never_raise():
    samples = [
        {"numeric.json": b'{"a": 1' + b"0" * 400 + b', "b": 3}'},
        {"numeric.json": b"[" * 100_000},
        {"numeric.json": b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"},
        {"numeric.json": b'{"\\ud800": 2}'},
    ]
    found = fitted(samples)
    assert [a.name for a in found.attributes] == ["\\ud800", "b"]
    json.dumps(found.to_json(), ensure_ascii=False).encode("utf8")
    decoded = [NumericEncoder(found, 0).decode(members) for members in samples]
    causes = [[failure.cause for failure in one.failures] for one in decoded]
    assert causes == [["not a number"], ["not JSON"], ["not a number"], []] and [
        len(one.pieces) for one in decoded
    ] == [1, 0, 0, 1]


def test_no_number_at_all_is_a_data_error():
    with pytest.raises(DataError, match="no shard holds a number"):
        NumericEncoder(fitted([{}]), 5)
