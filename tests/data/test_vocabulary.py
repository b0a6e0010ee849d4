"""Ids depend on names and seed alone."""

import numpy as np
import pytest

from mocme_dist.data.tsv import RawFile
from mocme_dist.data.vocabulary import Names, entity_order, read_entity_file, relation_order
from mocme_dist.errors import DataError


def names_of(words):
    names = Names("entity")
    for word in words:
        names[word.encode()]
    return names


def test_order_of_sight_does_not_matter():
    words = ["b", "ä", "Z", "日本", "a b", "😀", "a"]
    first, _ = entity_order(names_of(words), seed=3)
    second, _ = entity_order(names_of(reversed(words)), seed=3)
    assert first == second and sorted(first) == sorted(word.encode() for word in words)
    assert entity_order(names_of(words), seed=4)[0] != first


def test_ids_are_the_seeded_permutation_of_the_sorted_names():
    words = [f"name {n}" for n in range(50)]
    by_id, ids = entity_order(names_of(words), seed=7)
    expected = np.random.Generator(np.random.PCG64(7)).permutation(50)
    for place, word in enumerate(sorted(words)):
        assert by_id[expected[place]] == word.encode()
    assert [by_id[ids[number]] for number in range(50)] == [word.encode() for word in words]


def test_relations_are_sorted_by_name():
    by_id, ids = relation_order(names_of(["c", "a", "B"]))
    assert by_id == [b"B", b"a", b"c"] and ids.tolist() == [2, 1, 0]


def read(tmp_path, content):
    path = tmp_path / "entity2id.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_entity_file(RawFile(path))


@pytest.mark.parametrize("content", ["a\t1\nb\t0\n", "2\na\t1\nb\t0\n", "a\t1\r\n\r\nb\t0"])
def test_entity_file_closes_the_set_of_names(tmp_path, content):
    names = read(tmp_path, content)
    assert sorted(names) == [b"a", b"b"]
    with pytest.raises(ValueError, match=r"entity 'c' is not in entity2id.txt"):
        names[b"c"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\t0\nb\n", r"entity2id.txt:2: expected 2 tab-separated fields \(name, id\), got 1"),
        ("a\t0\nb\t2147483648\n", r"entity2id.txt:2: id 2147483648 is outside 0 ... 1"),
        ("a\t1099511627776\nb\t0\n", r"entity2id.txt:1: id 1099511627776 is outside"),
        ("a\t" + "9" * 30 + "\n", r"entity2id.txt:1: the id is '9+'; expected a whole number"),
        ("a\t-1\n", r"entity2id.txt:1: id -1 is outside"),
        ("a\t0.0\n", r"entity2id.txt:1: the id is '0.0'; expected a whole number"),
        ("a\t0\n\nb\t0\n", r"entity2id.txt:3: id 0 occurs twice, first on line 1"),
        ("a\t0\na\t1\n", r"entity2id.txt:2: entity 'a' occurs twice, first on line 1"),
        ("3\na\t0\nb\t1\n", r"entity2id.txt:1: says 3 names, the file holds 2"),
        ("a\t0\n \t1\n", r"entity2id.txt:2: the entity is empty"),
        (b"a\t0\n\xff\t1\n", r"entity2id.txt:2: entity b'\\xff' is not UTF-8"),
    ],
)
def test_malformed_entity_files_are_named_by_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)
