"""A packed data set holds what the raw folder says, deterministically, or the packing names what is wrong."""

import fcntl
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mocme_dist.config.schema import DataConfig
from mocme_dist.data import modalities
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import ConfigError, DataError, LockedError, StorageError

LIMIT = 1 << 24


def pack(raw, out, **settings):
    return pack_folder(raw, out, DataConfig(**{"shard_rows": 16, **settings}))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def append(path, text):
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def rows(raw, name):
    return [tuple(line.split("\t")) for line in (raw / name).read_text(encoding="utf8").splitlines()]


def samples(dataset):
    names = dataset.entity_names()
    return {names[s.id]: s for shard in range(dataset.shards.num_shards) for s in dataset.read_samples(shard, LIMIT)}


def named(dataset, split):
    entities, relations = dataset.entity_names(), dataset.relation_names()
    return [(entities[h], relations[r], entities[t]) for h, r, t in dataset.triples(split).tolist()]


def test_packed_graph_and_shards_hold_the_raw_folder(tiny_raw, tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    for split in ("train", "valid", "test"):
        assert named(dataset, split) == rows(tiny_raw, f"{split}.txt")
    expected = {}
    columns, *text = rows(tiny_raw, "text.tsv")
    for row in text:
        expected.setdefault(row[0], {})["text.json"] = {c: v.strip() for c, v in zip(columns[1:], row[1:], strict=True) if v.strip()}
    for entity, attribute, value in rows(tiny_raw, "numeric.tsv")[1:]:
        expected.setdefault(entity, {}).setdefault("numeric.json", {})[attribute] = float(value)
    for entity, file, _ in rows(tiny_raw, "images.tsv")[1:]:
        members = expected.setdefault(entity, {})
        members[f"image.{sum(name.startswith('image') for name in members)}.png"] = (tiny_raw / file).read_bytes()
    found = {
        name: {member: json.loads(content) if member.endswith("json") else content for member, content in sample.members.items()}
        for name, sample in samples(dataset).items()
    }
    assert found == expected
    counts = dataset.modalities
    assert counts["text"] == {"entities": len(text), "columns": ["label", "description"]}
    assert counts["numeric"] == {"entities": sum("numeric.json" in m for m in expected.values()), "attributes": 2}
    assert counts["image"]["files"] == len(rows(tiny_raw, "images.tsv")) - 1
    assert dataset.manifest["report"]["missing"] == {"entities": 60 - len(expected), "of": 60, "share": round((60 - len(expected)) / 60, 6)}


def test_two_packings_are_equal_byte_for_byte_and_hold_no_path(tiny_raw, tiny_dataset, tmp_path):
    again = pack(tiny_raw, tmp_path / "elsewhere" / "packed").directory
    assert tree(again) == tree(tiny_dataset)
    assert str(tmp_path).encode() not in b"".join(tree(again).values())
    assert not [name for name in tree(again) if "tmp" in name]


def test_order_of_lines_line_ends_and_compression_do_not_change_entities(raw_copy, tiny_dataset, tmp_path):
    for name in ("text.tsv", "numeric.tsv", "train.txt"):
        content = b"\xef\xbb\xbf" + (raw_copy / name).read_bytes().replace(b"\n", b"\r\n")
        (raw_copy / name).unlink()
        (raw_copy / f"{name}.gz").write_bytes(gzip.compress(content))
    dataset, plain = pack(raw_copy, tmp_path / "out"), Dataset.open(tiny_dataset)
    assert dataset.fingerprint == plain.fingerprint
    assert dataset.manifest["source"] != plain.manifest["source"]


def test_seed_and_shard_size_change_ids_and_shards_not_content(tiny_raw, tiny_dataset, tmp_path):
    plain, other = Dataset.open(tiny_dataset), pack(tiny_raw, tmp_path / "out", seed=1, shard_rows=7)
    assert other.fingerprint != plain.fingerprint and other.entity_names() != plain.entity_names()
    assert [entry.name for entry in other.entries] == [f"entities-{n:06d}.tar" for n in range(9)]
    assert {name: s.members for name, s in samples(other).items()} == {name: s.members for name, s in samples(plain).items()}
    assert named(other, "train") == named(plain, "train")


def test_small_buffer_and_small_spool_change_nothing(tiny_raw, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(modalities.Spill.__init__, "__defaults__", (100,))
    monkeypatch.setattr("mocme_dist.data.triples._SPOOL", 9)
    monkeypatch.setattr("mocme_dist.data.layouts.CHUNK_BYTES", 50)
    assert tree(pack(tiny_raw, tmp_path / "out").directory) == tree(tiny_dataset)


def test_known_answers_of_all_hold_every_file(tiny_raw, tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    everything = np.concatenate([dataset.triples(split) for split in ("train", "valid", "test")])
    known = dataset.known("all")
    offsets, targets = known.lookup(everything[:, 0], everything[:, 1], np.zeros(len(everything), int))
    assert all(t in targets[a:b] for t, a, b in zip(everything[:, 2], offsets, offsets[1:], strict=False))
    only_train = dataset.known("train")
    assert len(only_train.targets) == 2 * len(dataset.triples("train")) < len(known.targets)


def test_duplicates_and_self_loops_are_counted(raw_copy, tmp_path):
    first = (raw_copy / "train.txt").read_text().splitlines()[0]
    append(raw_copy / "train.txt", f"{first}\n{first}\nitem 05\tkind\titem 05\n")
    report = pack(raw_copy, tmp_path / "out").manifest["report"]
    assert report["duplicates"] == {"train": 2, "valid": 0, "test": 0}
    assert report["self_loops"] == {"train": 1, "valid": 0, "test": 0}


def test_test_triples_in_train_stop_the_packing_unless_allowed(raw_copy, tmp_path):
    test = rows(raw_copy, "test.txt")
    append(raw_copy / "train.txt", "".join("\t".join(triple) + "\n" for triple in test[:12]))
    append(raw_copy / "valid.txt", "\t".join(test[20]) + "\n")
    append(raw_copy / "train.txt", "".join(f"{t}\t{r}\t{h}\n" for h, r, t in test[:20]))
    with pytest.raises(DataError, match=rf"12 of {len(test)} test triples occur in train; .* data.allow_leakage=true"):
        pack(raw_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    leaks = pack(raw_copy, tmp_path / "out", allow_leakage=True).manifest["report"]["leakage"]
    assert {name: found["triples"] for name, found in leaks.items()} == {
        "test_in_train": 12, "test_in_valid": 1, "valid_in_train": 0, "test_pairs_in_train": 12, "test_inverse_pairs_in_train": 20,
    }  # fmt: skip


def test_leaked_valid_file_warns_and_a_cut_set_replaces_it(raw_copy, tmp_path, caplog):
    train = rows(raw_copy, "train.txt")
    (raw_copy / "valid.txt").write_text("".join("\t".join(triple) + "\n" for triple in train[:30] + rows(raw_copy, "valid.txt")[:5]))
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


def test_unseen_names_stop_are_skipped_or_kept(raw_copy, tmp_path):
    append(raw_copy / "test.txt", "newcomer\tnear\titem 01\nitem 01\tunheard\titem 02\n")
    append(raw_copy / "valid.txt", "item 03\tnear\tstranger\n")
    with pytest.raises(
        DataError, match=r"1 of 37 valid triples and 2 of 38 test triples .*\(3 names: stranger, unheard, newcomer\); set data.unseen=skip"
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


def test_entities_without_any_modality_are_limited(raw_copy, tmp_path):
    (raw_copy / "text.tsv").unlink()
    (raw_copy / "images.tsv").unlink()
    with pytest.raises(
        DataError,
        match=r"\d+ of 60 entities \([\d.]+ %\) have no text, number, picture, sound or film; expected .* data.max_missing",
    ):
        pack(raw_copy, tmp_path / "out", max_missing=0.01)
    assert not (tmp_path / "out").exists()
    (raw_copy / "numeric.tsv").unlink()
    dataset = pack(raw_copy, tmp_path / "out")
    assert dataset.modalities == {} and dataset.manifest["report"]["missing"]["entities"] == 60
    assert samples(dataset) == {}


def test_rows_of_unknown_entities_are_counted_and_their_files_not_needed(raw_copy, tmp_path, caplog):
    append(raw_copy / "text.tsv", "nobody\tx\ty\n")
    append(raw_copy / "images.tsv", "nobody\timages/none.png\tx\nnobody\t../none.png\tx\n")
    dataset = pack(raw_copy, tmp_path / "out")
    assert dataset.manifest["report"]["ignored_rows"] == {"text": 1, "numeric": 0, "image": 2}
    assert "images.tsv: 2 rows of entities that are not in the graph were ignored" in caplog.text


def test_texts_are_cleaned_merged_and_counted(raw_copy, tmp_path):
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
    texts = {name: json.loads(sample.members["text.json"]) for name, sample in samples(dataset).items() if "text.json" in sample.members}
    assert texts == {
        "item 00": {"label": "bad � bytes", "description": "second description"},
        "item 01": {"label": "😀 שלום", "description": "nul \0 inside"},
        "item 02": {"label": long.strip()},
    }
    cleaned = dataset.manifest["report"]["cleaned"]
    assert (cleaned["replaced_text_cells"], cleaned["merged_text_rows"]) == (1, 1)


def test_numbers_of_one_attribute_are_averaged_and_repeated_files_count_once(raw_copy, tmp_path):
    append(
        raw_copy / "numeric.tsv",
        "item 00\theight\t1\nitem 00\theight\t2.5\nitem 00\theight\t1e0\nitem 00\thuge\t1.7e308\nitem 00\thuge\t1.7e308\n",
    )
    image = rows(raw_copy, "images.tsv")[1]
    append(raw_copy / "images.tsv", f"item 00\t{image[1]}\tx\nitem 00\t{image[1]}\ty\n")
    dataset = pack(raw_copy, tmp_path / "out")
    sample = samples(dataset)["item 00"]
    assert json.loads(sample.members["numeric.json"]) == {"height": 1.5, "huge": 1.7e308}
    assert sample.files("image") == [(raw_copy / image[1]).read_bytes()]
    cleaned = dataset.manifest["report"]["cleaned"]
    assert (cleaned["averaged_numbers"], cleaned["repeated_files"]) == (2, 1)


def test_entity_file_fixes_the_names(raw_copy, tmp_path):
    names = [f"item {n:02d}" for n in range(60)] + ["lonely"]
    (raw_copy / "entity2id.txt").write_text("61\n" + "".join(f"{name}\t{n}\n" for n, name in enumerate(names)))
    dataset = pack(raw_copy, tmp_path / "out")
    assert sorted(dataset.entity_names()) == sorted(names)
    append(raw_copy / "test.txt", "item 00\tnear\tnobody\n")
    with pytest.raises(DataError, match=r"test.txt:37: entity 'nobody' is not in entity2id.txt"):
        pack(raw_copy, tmp_path / "other")


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("train.txt", b"item 01\tnear\n", r"train.txt:289: expected 3 tab-separated fields \(head, relation, tail\), got 2"),
        ("train.txt", b"item 01 near item 02\n", r"train.txt:289: expected 3 tab-separated fields .*, got 1"),
        ("valid.txt", b"\n\na\tb\tc\td\n", r"valid.txt:39: expected 3 .*, got 4"),
        ("test.txt", b"item 01\t\titem 02\n", r"test.txt:37: the relation is empty"),
        ("test.txt", b"  \tnear\titem 02\n", r"test.txt:37: the entity is empty"),
        ("test.txt", b"# a comment\n", r"test.txt:37: expected 3"),
        ("test.txt", b"item 01\tnear\tb\xffd\n", r"test.txt:37: entity b'b\\xffd' is not UTF-8"),
        ("text.tsv", b"item 01\tlabel\n", r"text.tsv:\d+: expected 3 tab-separated fields \(entity, label, description\), got 2"),
        ("numeric.tsv", b"item 01\tsize\tlarge\n", r"numeric.tsv:\d+: the value of 'size' is 'large'; expected a finite number"),
        ("numeric.tsv", b"item 01\tsize\tnan\n", r"numeric.tsv:\d+: the value of 'size' is 'nan'; expected a finite"),
        ("numeric.tsv", b"item 01\tsize\t1e999\n", r"numeric.tsv:\d+: .* expected a finite"),
        ("numeric.tsv", b"item 01\tsize\t1_000\n", r"numeric.tsv:\d+: .* expected a finite"),
        ("numeric.tsv", b"item 01\t\t1\n", r"numeric.tsv:\d+: the field attribute is empty"),
        ("images.tsv", b"item 01\timages/none.png\tx\n", r"images.tsv:\d+: file 'images/none.png' not found in the raw folder"),
        ("images.tsv", b"item 01\t../secret.png\tx\n", r"images.tsv:\d+: file '../secret.png' lies outside the raw folder"),
        ("images.tsv", b"item 01\t/etc/passwd.png\tx\n", r"images.tsv:\d+: file '/etc/passwd.png' lies outside the raw folder"),
        ("images.tsv", b"item 01\timages/a.pkl\tx\n", r"images.tsv:\d+: file 'images/a.pkl' is of an unknown kind; expected one of png"),
        ("images.tsv", b"item 01\t\tx\n", r"images.tsv:\d+: the field file is empty"),
    ],
)
def test_wrong_lines_are_named_and_nothing_is_left(raw_copy, tmp_path, name, line, message):
    append(raw_copy / name, line)
    with pytest.raises(DataError, match=message):
        pack(raw_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_and_missing_splits_are_named_with_their_path(raw_copy, tmp_path, split):
    path = raw_copy / f"{split}.txt"
    path.write_bytes(b"\n  \n\r\n")
    with pytest.raises(DataError, match=rf"{path}: holds no triple"):
        pack(raw_copy, tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: file not found"):
        pack(raw_copy, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere: raw folder not found"):
        pack(tmp_path / "nowhere", tmp_path / "out")


def test_foreign_folder_is_refused_and_left_alone(tiny_raw, tmp_path):
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


def test_packing_again_is_nothing_for_the_same_source_and_refused_for_another(raw_copy, tmp_path):
    out = tmp_path / "out"
    pack(raw_copy, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    pack(raw_copy, out, text_columns=("label",))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(
        ConfigError, match=r"packed here before with data.seed=0 there, 1 now; data.unseen=error there, keep now; choose another folder"
    ):
        pack(raw_copy, out, seed=1, unseen="keep")
    content = (raw_copy / "text.tsv").read_text()
    (raw_copy / "text.tsv").write_text(content.replace("label of item", "LABEL of item"))
    with pytest.raises(ConfigError, match="packed here before with other raw files"):
        pack(raw_copy, out)
    (raw_copy / "text.tsv").write_text(content)
    append(raw_copy / rows(raw_copy, "images.tsv")[1][1], b"x")
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_interrupted_packing_is_done_anew(tiny_raw, tiny_dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    # As a kill leaves it: the work folder, some shards, half a file, no manifest.
    shutil.copytree(tiny_dataset, out)
    (out / "manifest.json").unlink()
    (out / ".tmp-pack").mkdir()
    (out / "shards" / "entities-000077.tar").write_bytes(b"old")
    (out / "shards" / ".tmp-123-entities-000001.tar").write_bytes(b"half")
    assert tree(pack(tiny_raw, out).directory) == tree(tiny_dataset)
    # Killed after the manifest: done, only tidied.
    (out / ".tmp-pack").mkdir()
    assert tree(pack(tiny_raw, out).directory) == tree(tiny_dataset)
    assert not (out / ".tmp-pack").exists()


def test_folder_that_another_packing_holds_is_locked(tiny_raw, tmp_path):
    work = tmp_path / "out" / ".tmp-pack"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another process is packing"):
            pack(tiny_raw, tmp_path / "out")
    pack(tiny_raw, tmp_path / "out")


def test_full_disk_is_a_storage_error_that_leaves_nothing(tiny_raw, tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modalities.Spill, "flush", full)
    with pytest.raises(StorageError, match=r"out: cannot be written: No space left on device"):
        pack(tiny_raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, settings, entities, relations, splits",
    [
        ("stampkg", {}, 1601, 5, (1736, 217, 217)),
        ("TIVA", {"allow_leakage": True, "unseen": "keep"}, 11858, 16, (11652, 1913, 1906)),
    ],
)
def test_real_folders_pack_with_the_published_counts(shared_data, tmp_path: Path, name, settings, entities, relations, splits):
    dataset = pack_folder(shared_data(name), tmp_path / "out", DataConfig(**settings))
    assert (dataset.num_entities, dataset.num_relations) == (entities, relations)
    assert tuple(dataset.manifest["splits"].values()) == splits


def test_sounds_and_films_are_packed_as_pictures_are(raw_copy, tmp_path):
    for name, content in (("a.ogg", b"sound one"), ("b.WAV", b"sound two"), ("c.mp4", b"film"), ("d.webp", b"moving")):
        (raw_copy / name).write_bytes(content)
    (raw_copy / "audio.tsv").write_text(
        "entity\tfile\tseconds\nitem 00\ta.ogg\t1\nitem 00\tb.WAV\t2\nitem 00\ta.ogg\t1\nnobody\tx.ogg\t1\n"
    )
    (raw_copy / "video.tsv").write_text("entity\tfile\nitem 01\tc.mp4\nitem 00\td.webp\n")
    dataset = pack(raw_copy, tmp_path / "out")
    found = samples(dataset)
    assert found["item 00"].members == {"audio.0.ogg": b"sound one", "audio.1.wav": b"sound two", "video.0.webp": b"moving"}
    assert found["item 01"].members == {"video.0.mp4": b"film"}
    assert dataset.modalities["audio"] == {"entities": 1, "files": 2} and dataset.modalities["video"] == {"entities": 2, "files": 2}
    report = dataset.manifest["report"]
    assert report["ignored_rows"]["audio"] == 1 and report["cleaned"]["repeated_files"] == 1
    assert pack(raw_copy, tmp_path / "again").fingerprint == dataset.fingerprint
    append(raw_copy / "a.ogg", b"!")
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, tmp_path / "out")
    append(raw_copy / "video.tsv", "item 01\ta.ogg\n")
    with pytest.raises(DataError, match=r"video.tsv:4: file 'a.ogg' is of an unknown kind; expected one of webp, gif, png, apng, mp4"):
        pack(raw_copy, tmp_path / "new")
