"""Packing keeps labels and aliases: from the column that looks like labels or is named, and from relations.tsv."""

from __future__ import annotations

import pyarrow.parquet
import pytest

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.labels import alias_column, label_column, split_aliases
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import DataError


@pytest.mark.parametrize(
    "columns, wanted, found",
    [
        (("description", "label"), None, "label"),
        (("label_en", "comment", "name"), None, "name"),
        (("comment", "label_en"), None, "label_en"),
        (("comment", "nickname"), None, None),
        (("wordnet_gloss", "synset"), None, None),
        (("label", "comment"), "comment", "comment"),
        ((), None, None),
    ],
)
def test_labels_are_the_first_column_that_is_called_so_or_the_one_that_is_set(columns, wanted, found):
    assert label_column(columns, wanted) == found


def test_aliases_are_split_at_bars_without_repetitions():
    assert alias_column(("label", "Aliases")) == "Aliases" and alias_column(("label",)) is None
    assert split_aliases(" a|b||a | c", "c") == ["a", "b"]
    assert split_aliases("", None) is split_aliases(None, "x") is split_aliases("x", "x") is None


def table(dataset, name):
    return pyarrow.parquet.read_table(dataset.directory / "graph" / name).to_pylist()


def test_labels_lie_by_id_whatever_the_shards_and_do_not_change_the_fingerprint(raw_copy, tmp_path):
    lines = (raw_copy / "text.tsv").read_text().splitlines()
    (raw_copy / "text.tsv").write_text(
        "\n".join([f"{lines[0]}\taliases", *(f"{line}\tthe {line.split(chr(9))[0]}|x" for line in lines[1:])]) + "\n"
    )
    (raw_copy / "relations.tsv").write_text("id\tlabel\nnear\tlies near\nunheard\tnothing\n")
    small, large = (
        pack_folder(raw_copy, tmp_path / str(rows), DataConfig(shard_rows=rows, label_column="label"))
        for rows in (7, 64)
    )
    found = table(small, "entity_labels.parquet")
    assert found == table(large, "entity_labels.parquet") and len(found) == 60
    names = small.entity_names()
    labelled = {line.split("\t")[0]: line.split("\t")[1].strip() or None for line in lines[1:]}
    assert {name: row["label"] for name, row in zip(names, found, strict=True)} == dict.fromkeys(names) | labelled
    assert found[names.index("item 05")]["aliases"] == ["the item 05", "x"]
    assert [row["label"] for row in table(small, "relation_labels.parquet")] == [None, None, "lies near", None]
    report = small.manifest["labels"]
    assert report["column"] == "label" and report["aliases"] == "aliases" and report["relations"] == 1
    assert report["entities"] == sum(row["label"] is not None for row in found) > 40


def test_a_label_column_that_does_not_exist_is_named_with_those_that_do(raw_copy, tmp_path):
    with pytest.raises(
        DataError, match=r"data.label_column=titel: text.tsv has no such column; .*: label, description"
    ):
        pack_folder(raw_copy, tmp_path / "out", DataConfig(label_column="titel"))
    assert not (tmp_path / "out").exists()
    (raw_copy / "relations.tsv").write_text("name\tlabel\nnear\tlies near\n")
    with pytest.raises(DataError, match=r"relations.tsv:1: expected a header that begins with id, label, got 'name'"):
        pack_folder(raw_copy, tmp_path / "out", DataConfig())
