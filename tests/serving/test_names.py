"""Names are found without becoming objects, and a misspelt one finds what it may have meant, also among millions."""

from __future__ import annotations

import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.names import Names


def names_of(path, values, group: int = 1000) -> Names:
    pyarrow.parquet.write_table(pyarrow.table({"name": values}), path, row_group_size=group)
    return Names(path, len(values), "entity")


def test_names_and_ids_belong_together_over_several_pieces(tmp_path):
    names = names_of(tmp_path / "n.parquet", [f"city {number}" for number in range(2500)], group=700)
    assert names.id_of("city 0") == 0 and names.id_of("city 2499") == 2499
    assert names.find(["city 1800", "nowhere", "city 3"]) == {"city 3": 3, "city 1800": 1800}
    assert names.take(np.array([5, 2000, 5])) == ["city 5", "city 2000", "city 5"]


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("Norwey", "Norway"),
        ("norway", "Norway"),
        ("Zürch", "Zürich"),
        ("New Yrok City", "New York City"),
        ("Untied States", "United States"),
        ("東京郡", "東京都"),
    ],
)
def test_a_misspelt_name_finds_the_one_that_was_meant(tmp_path, wrong, right):
    others = ["", "a", "Sweden", "Noray", "Zurzach", "York", "States", "United Kingdom", "京都府"]
    names = names_of(tmp_path / "n.parquet", [*others, right, *(f"thing {number}" for number in range(300))])
    assert names.suggest(wrong)[0] == right


def test_what_is_like_nothing_has_no_suggestion(tmp_path):
    names = names_of(tmp_path / "n.parquet", ["alpha", "beta"])
    assert names.suggest("") == [] and names.suggest("x") == [] and names.suggest("qqqq") == []
    with pytest.raises(ConfigError, match="known are alpha, beta"):
        names.id_of("qqqq")
    upper = names_of(tmp_path / "u.parquet", ["Abba", "ABBA"])
    with pytest.raises(ConfigError, match="2 entities are called abba: 'Abba', 'ABBA'; use one of these ids"):
        upper.id_of("abba")


def test_half_a_million_names_are_searched_in_a_moment(tmp_path):
    gen = np.random.default_rng(0)
    syllables = np.array(["ka", "lo", "mi", "ne", "ru", "sta", "vor", "wen", "xi", "zu"])
    values = ["".join(row) for row in syllables[gen.integers(10, size=(500_000, 6))]]
    names = names_of(tmp_path / "n.parquet", [*values, "Reykjavikur"], group=100_000)
    assert names.column.num_chunks >= 1
    before = time.process_time()
    assert names.suggest("Reykjavigur")[0] == "Reykjavikur"
    assert time.process_time() - before < 2


def test_a_column_of_another_length_is_refused(tmp_path):
    names_of(tmp_path / "n.parquet", ["a", "b"])
    with pytest.raises(DataError, match="2 names, the manifest says 3"):
        Names(tmp_path / "n.parquet", 3, "entity").id_of("a")
