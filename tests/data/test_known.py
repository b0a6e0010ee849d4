"""Known answers equal a dictionary of sets, however the queries come."""

import numpy as np
import pytest

from mocme_dist.data.known import KnownAnswers, _places
from mocme_dist.errors import DataError, ShapeError


def brute_force(triples):
    answers = {}
    for head, relation, tail in triples.tolist():
        answers.setdefault((head, relation, 0), set()).add(tail)
        answers.setdefault((tail, relation, 1), set()).add(head)
    return answers


def random_triples(num_entities, num_relations, count, seed=0):
    gen = np.random.default_rng(seed)
    return np.stack([gen.integers(n, size=count) for n in (num_entities, num_relations, num_entities)], axis=1)


@pytest.mark.parametrize("num_entities, num_relations, count", [(30, 4, 300), (1, 1, 3), (50, 7, 1), (12, 2, 0)])
def test_every_query_finds_what_a_dictionary_finds(num_entities, num_relations, count):
    triples = random_triples(num_entities, num_relations, count)
    known = KnownAnswers.build(triples, num_relations)
    queries = [(s, r, d) for s in range(num_entities) for r in range(num_relations) for d in (0, 1)]
    order = np.random.default_rng(1).permutation(len(queries))
    source, relation, direction = np.array(queries)[order].T
    offsets, targets = known.lookup(source, relation, direction)
    answers = brute_force(triples)
    for place, query in enumerate(order):
        assert targets[offsets[place] : offsets[place + 1]].tolist() == sorted(answers.get(queries[query], ()))
    assert offsets[-1] == len(targets)


def test_keys_and_targets_ascend_and_follow_the_formula():
    triples = random_triples(20, 3, 100)
    known = KnownAnswers.build(triples, 3)
    assert np.all(np.diff(known.keys) > 0)
    assert set(known.keys.tolist()) == {(s * 3 + r) * 2 + d for s, r, d in brute_force(triples)}
    assert all(np.all(np.diff(known.targets[a:b]) > 0) for a, b in zip(known.offsets, known.offsets[1:], strict=False))


def test_large_ids_do_not_wrap():
    # Too large for one fused 64-bit number: the sort by two columns takes over.
    big = 3_000_000_000
    triples = np.array([[big, 5, big - 1], [big, 5, 7], [big, 5, big - 1], [7, 0, big]])
    known = KnownAnswers.build(triples, 6)
    offsets, targets = known.lookup([big, big, 7], [5, 0, 0], [0, 1, 0])
    assert offsets.tolist() == [0, 2, 3, 4]
    assert targets.tolist() == [7, big - 1, 7, big]


def test_saved_table_answers_alike(tmp_path):
    triples = random_triples(40, 5, 200)
    known = KnownAnswers.build(triples, 5)
    known.save(tmp_path, "train")
    loaded = KnownAnswers.load(tmp_path, "train", 5)
    assert isinstance(loaded.targets.base, np.memmap)
    source, relation, direction = triples[:, 0], triples[:, 1], np.zeros(200, int)
    for one, other in zip(
        known.lookup(source, relation, direction), loaded.lookup(source, relation, direction), strict=True
    ):
        assert np.array_equal(one, other)


def test_no_queries_give_an_empty_range():
    offsets, targets = KnownAnswers.build(random_triples(5, 2, 9), 2).lookup([], [], [])
    assert offsets.tolist() == [0] and len(targets) == 0


def test_relation_out_of_range_is_refused_as_its_key_is_another_query():
    with pytest.raises(ShapeError, match="relations in"):
        KnownAnswers.build(random_triples(5, 2, 9), 2).lookup([0], [2], [0])


def test_damaged_tables_are_named(tmp_path):
    KnownAnswers.build(random_triples(5, 2, 9), 2).save(tmp_path, "all")
    keys = tmp_path / "known_all_keys.npy"
    whole = keys.read_bytes()
    keys.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"known_all_keys.npy: not a whole"):
        KnownAnswers.load(tmp_path, "all", 2)
    np.save(keys, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"known_all_keys.npy"):
        KnownAnswers.load(tmp_path, "all", 2)
    np.save(keys, np.arange(3))
    with pytest.raises(DataError, match="do not fit"):
        KnownAnswers.load(tmp_path, "all", 2)
    keys.unlink()
    with pytest.raises(DataError, match="file not found"):
        KnownAnswers.load(tmp_path, "all", 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_searching_all_at_once_finds_what_a_search_each_finds(size):
    ascending = np.sort(np.random.default_rng(size).choice(5 * size, size, replace=False)).astype(np.int64)
    wanted = np.concatenate([ascending, ascending + 1, [-5, 6 * size]])
    assert np.array_equal(_places(ascending, wanted), np.minimum(np.searchsorted(ascending, wanted), size - 1))


def test_an_entity_has_a_source_where_some_triple_names_it():
    triples, ids = random_triples(40, 3, 25), np.random.default_rng(2).permutation(50)
    expected = np.isin(ids, triples[:, [0, 2]])
    assert 5 < expected.sum() < 45
    assert np.array_equal(KnownAnswers.build(triples, 3).has_source(ids), expected)
    assert KnownAnswers.build(triples[:0], 3).has_source([0, 4]).tolist() == [False, False]
    assert KnownAnswers.build(triples, 3).has_source([]).tolist() == []
