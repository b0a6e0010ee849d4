"""Operations on triples equal the same on sets of tuples."""

import numpy as np
import pytest

from mocme_dist.data.triples import KeySpace, Seen, cut_development_set, distinct, leakage, read_triples
from mocme_dist.data.tsv import RawFile
from mocme_dist.data.vocabulary import Names
from mocme_dist.errors import DataError

KEYS = KeySpace(num_entities=20, num_relations=3)


def random_triples(count, seed):
    gen = np.random.default_rng(seed)
    return np.stack([gen.integers(n, size=count) for n in (20, 3, 20)], axis=1)


def tuples(triples):
    return [tuple(row) for row in triples.tolist()]


def test_distinct_keeps_the_first_of_each_in_order():
    triples = random_triples(2000, 0)
    assert tuples(distinct(triples, KEYS)) == list(dict.fromkeys(tuples(triples)))
    assert distinct(triples[:0], KEYS).shape == (0, 3)


def test_leakage_equals_set_arithmetic():
    train, valid, test = (distinct(random_triples(n, seed), KEYS) for n, seed in ((300, 1), (60, 2), (80, 3)))
    found = leakage(train, valid, test, KEYS)
    in_train, in_valid = set(tuples(train)), set(tuples(valid))
    pairs = {(h, t) for h, _, t in in_train}
    expected = {
        "test_in_train": (sum(x in in_train for x in tuples(test)), len(test)),
        "test_in_valid": (sum(x in in_valid for x in tuples(test)), len(test)),
        "valid_in_train": (sum(x in in_train for x in tuples(valid)), len(valid)),
        "test_pairs_in_train": (sum((h, t) in pairs for h, _, t in tuples(test)), len(test)),
        "test_inverse_pairs_in_train": (sum((t, h) in pairs for h, _, t in tuples(test)), len(test)),
    }
    assert {name: (entry["triples"], entry["of"]) for name, entry in found.items()} == expected
    assert all(count > 0 for count, _ in expected.values())
    assert all(entry["share"] == round(entry["triples"] / entry["of"], 6) for entry in found.values())
    assert "valid_in_train" not in leakage(train, None, test, KEYS)


@pytest.mark.parametrize("seed", range(5))
def test_development_cut_keeps_every_entity_and_relation_in_train(seed):
    # Few triples per entity, so that a careless cut would lose some.
    triples = distinct(random_triples(45, seed), KEYS)
    train, dev = cut_development_set(triples, 0.2, seed, KEYS)
    assert len(dev) == round(0.2 * len(triples))
    assert sorted(tuples(train) + tuples(dev)) == sorted(tuples(triples))
    assert tuples(train) == [row for row in tuples(triples) if row in set(tuples(train))]
    assert Seen.of(train, KEYS).covers(triples).all()
    again = cut_development_set(triples, 0.2, seed, KEYS)
    assert np.array_equal(again[0], train) and np.array_equal(again[1], dev)
    assert not np.array_equal(cut_development_set(triples, 0.2, seed + 100, KEYS)[1], dev)


def test_cut_that_is_too_large_says_what_is_possible():
    ring = np.array([[n, 0, (n + 1) % 20] for n in range(20)])
    with pytest.raises(DataError, match=r"data.dev=cut:0.9: 18 of 20 train triples to hold out, only \d+ can go"):
        cut_development_set(ring, 0.9, 0, KEYS)


def test_unseen_names_are_those_outside_train():
    seen = Seen.of(np.array([[0, 0, 1], [1, 1, 2]]), KEYS)
    triples = np.array([[0, 1, 2], [0, 2, 1], [5, 0, 1], [0, 0, 7], [2, 0, 0]])
    assert seen.covers(triples).tolist() == [True, False, False, False, True]
    entities, relations = seen.unseen_in(triples)
    assert entities.tolist() == [5, 7] and relations.tolist() == [2]


def test_graph_whose_keys_would_wrap_is_refused():
    KeySpace(5_000_000, 300_000)
    with pytest.raises(DataError, match=r"must stay below 2\^63"):
        KeySpace(5_000_000, 400_000)


def test_reading_numbers_names_by_first_sight_and_leaves_no_spool(tmp_path, monkeypatch):
    monkeypatch.setattr("mocme_dist.data.triples._SPOOL", 6)
    rows = [("a", "r", "b"), ("b", "s", "a"), ("c", "r", "c"), ("a b", "r", "日本"), ("a", "r", "b")]
    (tmp_path / "train.txt").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf8")
    entities, relations = Names("entity"), Names("relation")
    triples = read_triples(RawFile(tmp_path / "train.txt"), entities, relations, tmp_path / "spool")
    assert triples.tolist() == [[0, 0, 1], [1, 1, 0], [2, 0, 2], [3, 0, 4], [0, 0, 1]]
    assert list(entities) == [name.encode() for name in ("a", "b", "c", "a b", "日本")]
    assert not (tmp_path / "spool").exists()
