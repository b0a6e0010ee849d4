"""What a folder of somebody's own looks like at first: headers, swapped columns, file names that are nearly right."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import DataError
from mocme_dist.split import split_facts

SPLITS = ("train", "valid", "test")


def pack(raw: Path, out: Path) -> Dataset:
    return pack_folder(raw, out, DataConfig(shard_rows=16))


def edit(path: Path, change) -> None:
    """Replace the lines of a file."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf8").splitlines()]
    path.write_text("".join("\t".join(line) + "\n" for line in change(lines)), encoding="utf8")


@pytest.mark.parametrize("headed", [("train",), SPLITS])
def test_a_header_is_left_out_and_said(raw_copy, tiny_dataset, tmp_path, caplog, headed):
    for split in headed:
        edit(raw_copy / f"{split}.txt", lambda lines: [["head", "relation", "tail"], *lines])
    with caplog.at_level(logging.WARNING):
        found = pack(raw_copy, tmp_path / "out")
    files = ", ".join(f"{split}.txt" for split in headed)
    assert f"{files}: the first line is taken for a header and left out" in caplog.text
    assert found.fingerprint == Dataset.open(tiny_dataset).fingerprint


def test_a_first_fact_whose_names_occur_elsewhere_is_kept(raw_copy, tmp_path, caplog):
    edit(raw_copy / "train.txt", lambda lines: [["item 00", "once", "item 99"], *lines])
    with caplog.at_level(logging.WARNING):
        found = pack(raw_copy, tmp_path / "out")
    assert "header" not in caplog.text and (found.num_entities, found.num_relations) == (61, 5)


def test_a_header_beside_a_fixed_list_of_entities_is_suspected(raw_copy, tmp_path):
    (raw_copy / "entity2id.txt").write_text("".join(f"item {i:02d}\t{i}\n" for i in range(60)))
    edit(raw_copy / "train.txt", lambda lines: [["head", "relation", "tail"], *lines])
    with pytest.raises(
        DataError, match=r"train.txt:1: entity 'head' is not in entity2id.txt.*if this line is a header, delete"
    ):
        pack(raw_copy, tmp_path / "out")


def test_split_leaves_a_header_out_as_well(raw_copy, tmp_path):
    edit(raw_copy / "train.txt", lambda lines: [["subject", "predicate", "object"], *lines])
    split_facts(raw_copy / "train.txt", tmp_path / "out")
    assert not any("predicate" in (tmp_path / "out" / f"{split}.txt").read_text() for split in SPLITS)


def test_the_order_head_tail_relation_is_recognised(raw_copy, tmp_path):
    for split in SPLITS:
        edit(raw_copy / f"{split}.txt", lambda lines: [[head, tail, relation] for head, relation, tail in lines])
    with pytest.raises(DataError, match=r"train.txt: 60 relations, 60 of them also entities, and 64 entities; .*swap"):
        pack(raw_copy, tmp_path / "out")


def test_more_relations_than_entities_are_a_wrong_order(tmp_path):
    # No tail is a head, as between people and films.
    for split, count in (("train", 40), ("valid", 3), ("test", 3)):
        lines = [f"person {i % 5}\tfilm {i}\tlikes\n" for i in range(count)]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    with pytest.raises(
        DataError, match=r"train.txt: 40 relations, 0 of them also entities, and 6 entities; .*awk -F'\\t'"
    ):
        pack(tmp_path, tmp_path / "out")


def test_numbers_that_count_entities_and_relations_from_0_are_no_wrong_order(tmp_path):
    for split, shift in (("train", 1), ("valid", 2), ("test", 3)):
        (tmp_path / f"{split}.txt").write_text("".join(f"{i}\t{i % 3}\t{(i + shift) % 20}\n" for i in range(20)))
    assert pack(tmp_path, tmp_path / "out").num_relations == 3


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("text.tsv", "texts.tsv", "texts.tsv is not read; did you mean text.tsv?"),
        ("images.tsv", "image.tsv", "image.tsv is not read; did you mean images.tsv?"),
        ("numeric.tsv", "numerics.tsv.gz", "numerics.tsv is not read; did you mean numeric.tsv?"),
    ],
)
def test_a_file_that_is_nearly_right_is_asked_about(raw_copy, tmp_path, caplog, name, wrong, message):
    (raw_copy / "notes.txt").write_text("test.txt is there, so this is none")
    (raw_copy / name).rename(raw_copy / wrong)
    with caplog.at_level(logging.WARNING):
        pack(raw_copy, tmp_path / "out")
    assert [line for line in caplog.messages if "did you mean" in line] == [message]


def test_pictures_of_an_unknown_kind_are_counted_and_the_first_are_named(raw_copy, tiny_dataset, tmp_path, caplog):
    names = [f"images/p{i:02d}.svg" for i in range(23)]
    for name in names:
        (raw_copy / name).write_text("<svg/>")
    edit(raw_copy / "images.tsv", lambda lines: [*lines[:3], *(["item 05", name, "x"] for name in names), *lines[3:]])
    with caplog.at_level(logging.WARNING):
        found = pack(raw_copy, tmp_path / "out")
    assert found.manifest["report"]["undecodable"] == {"image": {"files": 23, "first": names[:20]}}
    assert "images.tsv: 23 files of an unknown format are left out" in caplog.text and "'images/p19.svg'" in caplog.text
    assert found.modalities["image"] == Dataset.open(tiny_dataset).modalities["image"]


def test_names_are_quoted_so_that_a_trailing_space_is_seen(raw_copy, tmp_path):
    edit(raw_copy / "test.txt", lambda lines: [["item 00 ", "near", "item 01"], *lines])
    with pytest.raises(DataError, match=r"train never shows \(1 names: 'item 00 '\)"):
        pack(raw_copy, tmp_path / "out")


def test_a_folder_with_train_alone_is_told_how_to_go_on(raw_copy, tmp_path):
    (raw_copy / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"valid.txt: file not found .*data\.dev=cut:0\.1 holds out a tenth of train"):
        pack(raw_copy, tmp_path / "out")
    (raw_copy / "test.txt").unlink()
    with pytest.raises(DataError, match=r"file not found .*data\.dev=cut:0\.1") as caught:
        pack(raw_copy, tmp_path / "out")
    assert "mocme split train.txt NEW_DIR" in str(caught.value)
