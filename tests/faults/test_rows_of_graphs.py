"""Rows 18, 29 and 32 to 37 of the fault matrix: a raw folder that is not what it should be is named, counted, or
refused.
"""

from __future__ import annotations

import json

import pytest
from raw_edits import append, named, pack, rows, samples, tree

from mocme_dist.errors import ConfigError, DataError


def test_row_18_a_foreign_folder_is_refused_and_left_alone(tiny_raw, tmp_path):
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    (out / "shards" / "entities-000000.tar").write_text("mine")
    before = tree(out)
    with pytest.raises(ConfigError, match="holds files that are not a data set's"):
        pack(tiny_raw, out)
    assert tree(out) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        pack(tiny_raw, tmp_path / "file")
    (out / "manifest.json").write_text('{"name": "another tool"}')
    with pytest.raises(ConfigError, match="not a packed data set's"):
        pack(tiny_raw, out)


def test_row_29_texts_are_cleaned_merged_and_counted(raw_copy, tmp_path):
    long = "word " * 400_000
    lines = [
        b"item 00\tbad \xff bytes\t  \n",
        "item 01\t😀 שלום\tnul \0 inside\n".encode(),
        f"item 02\t{long}\t\n".encode(),
        b"item 00\tsecond label\tsecond description\n",
        b"item 10\t \t \n",
    ]
    (raw_copy / "text.tsv").write_bytes(b"entity\tlabel\tdescription\n" + b"".join(lines))
    dataset = pack(raw_copy, tmp_path / "out")
    texts = {
        name: json.loads(sample.members["text.json"])
        for name, sample in samples(dataset).items()
        if "text.json" in sample.members
    }
    assert texts == {
        "item 00": {"label": "bad � bytes", "description": "second description"},
        "item 01": {"label": "😀 שלום", "description": "nul \0 inside"},
        "item 02": {"label": long.strip()},
    }
    cleaned = dataset.manifest["report"]["cleaned"]
    assert (cleaned["replaced_text_cells"], cleaned["merged_text_rows"]) == (1, 1)


def test_row_32_rows_of_unknown_entities_are_counted_and_their_files_not_needed(raw_copy, tmp_path, caplog):
    append(raw_copy / "text.tsv", "item 05 \tx\ty\n")
    append(raw_copy / "images.tsv", "nobody\timages/none.png\tx\nnobody\t../none.png\tx\n")
    dataset = pack(raw_copy, tmp_path / "out")
    assert dataset.manifest["report"]["ignored_rows"] == {"text": 1, "numeric": 0, "image": 2}
    assert "images.tsv: 2 rows of entities that are not in the graph were ignored, the first of 'nobody'" in caplog.text
    # Quoted, so that a space at the end is seen.
    assert "text.tsv: 1 rows of entities that are not in the graph were ignored, the first of 'item 05 '" in caplog.text


def test_row_33_unseen_names_stop_are_skipped_or_kept(raw_copy, tmp_path):
    append(raw_copy / "test.txt", "newcomer\tnear\titem 01\nitem 01\tunheard\titem 02\n")
    append(raw_copy / "valid.txt", "item 03\tnear\tstranger\n")
    with pytest.raises(
        DataError,
        match=(
            r"1 of 37 valid triples and 2 of 38 test triples .*\(3 names: 'stranger', 'unheard', 'newcomer'\); set"
            r" data.unseen=skip"
        ),
    ):
        pack(raw_copy, tmp_path / "out")
    skipped, kept = pack(raw_copy, tmp_path / "skip", unseen="skip"), pack(raw_copy, tmp_path / "keep", unseen="keep")
    assert [len(d.triples("test")) for d in (skipped, kept)] == [36, 38]
    assert [len(d.triples("valid")) for d in (skipped, kept)] == [36, 37]
    assert skipped.num_entities == kept.num_entities == 62
    counts = {"triples": 2, "of": 38, "entities": 1, "relations": 1}
    assert skipped.manifest["report"]["unseen"]["test"] == kept.manifest["report"]["unseen"]["test"] == counts
    assert len(skipped.known("all").targets) == len(kept.known("all").targets)
    (raw_copy / "test.txt").write_text("newcomer\tnear\titem 01\n")
    with pytest.raises(DataError, match=r"test: data.unseen=skip leaves out all of its 1 triples"):
        pack(raw_copy, tmp_path / "out", unseen="skip")


def test_row_34_test_triples_in_train_stop_the_packing_unless_allowed(raw_copy, tmp_path):
    test = rows(raw_copy, "test.txt")
    append(raw_copy / "train.txt", "".join("\t".join(triple) + "\n" for triple in test[:12]))
    append(raw_copy / "valid.txt", "\t".join(test[20]) + "\n")
    append(raw_copy / "train.txt", "".join(f"{t}\t{r}\t{h}\n" for h, r, t in test[:20]))
    with pytest.raises(DataError, match=rf"12 of {len(test)} test triples occur in train; .* data.allow_leakage=true"):
        pack(raw_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    leaks = pack(raw_copy, tmp_path / "out", allow_leakage=True).manifest["report"]["leakage"]
    assert {name: found["triples"] for name, found in leaks.items()} == {
        "test_in_train": 12, "test_in_valid": 1, "valid_in_train": 0, "test_pairs_in_train": 12,
        "test_inverse_pairs_in_train": 20,
    }  # fmt: skip


def test_row_34_a_leaked_valid_file_warns_and_a_cut_set_replaces_it(raw_copy, tmp_path, caplog):
    train = rows(raw_copy, "train.txt")
    (raw_copy / "valid.txt").write_text(
        "".join("\t".join(triple) + "\n" for triple in train[:30] + rows(raw_copy, "valid.txt")[:5])
    )
    pack(raw_copy, tmp_path / "file")
    assert "30 of 35 valid triples occur in train (85.7 %); data.dev=cut:0.1" in caplog.text
    dataset = pack(raw_copy, tmp_path / "cut", dev="cut:0.1")
    held_out = len(dataset.triples("valid"))
    assert held_out == round(0.1 * len(train))
    assert sorted(named(dataset, "train") + named(dataset, "valid")) == sorted(train)
    assert {name for h, _, t in named(dataset, "train") for name in (h, t)} == set(dataset.entity_names())
    assert dataset.manifest["report"]["development_set"] == {"cut_from_train": held_out, "valid_file_set_aside": 35}
    # What the file says is true all the same.
    assert len(dataset.known("all").targets) == 2 * (len(train) + 5 + len(dataset.triples("test")))
    assert len(dataset.known("train").targets) == 2 * len(dataset.triples("train"))
    (raw_copy / "valid.txt").unlink()
    without = pack(raw_copy, tmp_path / "without", dev="cut:0.1")
    assert named(without, "valid") == named(dataset, "valid")
    assert without.manifest["report"]["development_set"]["valid_file_set_aside"] == 0


def test_row_35_duplicates_and_self_loops_are_counted(raw_copy, tmp_path):
    first = (raw_copy / "train.txt").read_text().splitlines()[0]
    append(raw_copy / "train.txt", f"{first}\n{first}\nitem 05\tkind\titem 05\n")
    report = pack(raw_copy, tmp_path / "out").manifest["report"]
    assert report["duplicates"] == {"train": 2, "valid": 0, "test": 0}
    assert report["self_loops"] == {"train": 1, "valid": 0, "test": 0}


@pytest.mark.parametrize(
    "name, line, message",
    [
        (
            "train.txt",
            b"item 01\tnear\n",
            r"train.txt:289: expected 3 tab-separated fields \(head, relation, tail\), got 2",
        ),
        ("train.txt", b"item 01 near item 02\n", r"train.txt:289: expected 3 tab-separated fields .*, got 1"),
        ("valid.txt", b"\n\na\tb\tc\td\n", r"valid.txt:39: expected 3 .*, got 4"),
        ("test.txt", b"item 01\t\titem 02\n", r"test.txt:37: the relation is empty"),
        ("test.txt", b"  \tnear\titem 02\n", r"test.txt:37: the entity is empty"),
        ("test.txt", b"# a comment\n", r"test.txt:37: expected 3"),
        ("test.txt", b"item 01\tnear\tb\xffd\n", r"test.txt:37: entity b'b\\xffd' is not UTF-8"),
        (
            "text.tsv",
            b"item 01\tlabel\n",
            r"text.tsv:\d+: expected 3 tab-separated fields \(entity, label, description\), got 2",
        ),
        (
            "numeric.tsv",
            b"item 01\tsize\tlarge\n",
            r"numeric.tsv:\d+: the value of 'size' is 'large'; expected a finite number",
        ),
        ("numeric.tsv", b"item 01\tsize\tnan\n", r"numeric.tsv:\d+: the value of 'size' is 'nan'; expected a finite"),
        ("numeric.tsv", b"item 01\tsize\t1e999\n", r"numeric.tsv:\d+: .* expected a finite"),
        ("numeric.tsv", b"item 01\tsize\t1_000\n", r"numeric.tsv:\d+: .* expected a finite"),
        ("numeric.tsv", b"item 01\t\t1\n", r"numeric.tsv:\d+: the field attribute is empty"),
        (
            "images.tsv",
            b"item 01\timages/none.png\tx\n",
            r"images.tsv:\d+: file 'images/none.png' not found in the raw folder",
        ),
        (
            "images.tsv",
            b"item 01\t../secret.png\tx\n",
            r"images.tsv:\d+: file '../secret.png' lies outside the raw folder",
        ),
        (
            "images.tsv",
            b"item 01\t/etc/passwd.png\tx\n",
            r"images.tsv:\d+: file '/etc/passwd.png' lies outside the raw folder",
        ),
        ("images.tsv", b"item 01\t\tx\n", r"images.tsv:\d+: the field file is empty"),
    ],
)
def test_row_36_wrong_lines_are_named_and_nothing_is_left(raw_copy, tmp_path, name, line, message):
    append(raw_copy / name, line)
    with pytest.raises(DataError, match=message):
        pack(raw_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_row_36_empty_and_missing_splits_are_named_with_their_path(raw_copy, tmp_path, split):
    path = raw_copy / f"{split}.txt"
    path.write_bytes(b"\n  \n\r\n")
    with pytest.raises(DataError, match=rf"{path}: holds no triple"):
        pack(raw_copy, tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: file not found"):
        pack(raw_copy, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere: raw folder not found"):
        pack(tmp_path / "nowhere", tmp_path / "out")
