"""A packed data set holds what the raw folder says, deterministically, or the packing names what is wrong."""

import fcntl
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from raw_edits import append, named, pack, rows, samples, tree

from mocme_dist.config.schema import DataConfig
from mocme_dist.data import files, modalities, pack_workspace
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import sha256_file
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import ConfigError, DataError, LockedError, StorageError


def test_packed_graph_and_shards_hold_the_raw_folder(tiny_raw, tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    for split in ("train", "valid", "test"):
        assert named(dataset, split) == rows(tiny_raw, f"{split}.txt")
    expected = {}
    columns, *text = rows(tiny_raw, "text.tsv")
    for row in text:
        expected.setdefault(row[0], {})["text.json"] = {
            c: v.strip() for c, v in zip(columns[1:], row[1:], strict=True) if v.strip()
        }
    for entity, attribute, value in rows(tiny_raw, "numeric.tsv")[1:]:
        expected.setdefault(entity, {}).setdefault("numeric.json", {})[attribute] = float(value)
    for entity, file, _ in rows(tiny_raw, "images.tsv")[1:]:
        members = expected.setdefault(entity, {})
        members[f"image.{sum(name.startswith('image') for name in members)}.png"] = (tiny_raw / file).read_bytes()
    found = {
        name: {
            member: json.loads(content) if member.endswith("json") else content
            for member, content in sample.members.items()
        }
        for name, sample in samples(dataset).items()
    }
    assert found == expected
    counts = dataset.modalities
    assert counts["text"] == {"entities": len(text), "columns": ["label", "description"]}
    assert counts["numeric"] == {"entities": sum("numeric.json" in m for m in expected.values()), "attributes": 2}
    assert counts["image"]["files"] == len(rows(tiny_raw, "images.tsv")) - 1
    assert dataset.manifest["report"]["missing"] == {
        "entities": 60 - len(expected),
        "of": 60,
        "share": round((60 - len(expected)) / 60, 6),
    }


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
    assert {name: s.members for name, s in samples(other).items()} == {
        name: s.members for name, s in samples(plain).items()
    }
    assert named(other, "train") == named(plain, "train")


def test_small_buffer_and_small_spool_change_nothing(tiny_raw, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(modalities.Spill.__init__, "__defaults__", (100,))
    monkeypatch.setattr("mocme_dist.data.triples._SPOOL", 9)
    monkeypatch.setattr("mocme_dist.data.tsv.CHUNK_BYTES", 50)
    assert tree(pack(tiny_raw, tmp_path / "out").directory) == tree(tiny_dataset)


def test_known_answers_of_all_hold_every_file(tiny_raw, tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    everything = np.concatenate([dataset.triples(split) for split in ("train", "valid", "test")])
    known = dataset.known("all")
    offsets, targets = known.lookup(everything[:, 0], everything[:, 1], np.zeros(len(everything), int))
    assert all(t in targets[a:b] for t, a, b in zip(everything[:, 2], offsets, offsets[1:], strict=False))
    only_train = dataset.known("train")
    assert len(only_train.targets) == 2 * len(dataset.triples("train")) < len(known.targets)


def test_entities_without_any_modality_are_limited(raw_copy, tmp_path):
    (raw_copy / "text.tsv").unlink()
    (raw_copy / "images.tsv").unlink()
    with pytest.raises(
        DataError,
        match=(
            r"\d+ of 60 entities \([\d.]+ %\) have no text, number, image, audio or video file; expected .*"
            r" data.max_missing"
        ),
    ):
        pack(raw_copy, tmp_path / "out", max_missing=0.01)
    assert not (tmp_path / "out").exists()
    (raw_copy / "numeric.tsv").unlink()
    dataset = pack(raw_copy, tmp_path / "out")
    assert dataset.modalities == {} and dataset.manifest["report"]["missing"]["entities"] == 60
    assert samples(dataset) == {}


def test_numbers_of_one_attribute_are_averaged_and_repeated_files_count_once(raw_copy, tmp_path):
    append(
        raw_copy / "numeric.tsv",
        "item 00\theight\t1\nitem 00\theight\t2.5\nitem 00\theight\t1e0\nitem 00\thuge\t1.7e308\nitem"
        " 00\thuge\t1.7e308\n",
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


def test_packing_again_is_nothing_for_the_same_source_and_refused_for_another(raw_copy, tmp_path):
    out = tmp_path / "out"
    pack(raw_copy, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    pack(raw_copy, out, text_columns=("label",))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(
        ConfigError,
        match=(
            r"packed here before with data.seed=0 there, 1 now; data.unseen=error there, keep now; choose another"
            r" folder"
        ),
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


def test_a_picture_replaced_by_another_one_of_its_size_is_noticed(raw_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_YOUNG_S", 0.0)
    hashed: list[str] = []
    monkeypatch.setattr(pack_workspace, "sha256_file", lambda path: hashed.append(path.suffix) or sha256_file(path))
    pack(raw_copy, tmp_path / "out")
    for count in (1, 0):  # the second time the files are known to be those that were packed
        hashed.clear()
        pack(raw_copy, tmp_path / "out")
        assert hashed.count(".png") == count * len(rows(raw_copy, "images.tsv")[1:])
    picture = raw_copy / rows(raw_copy, "images.tsv")[1][1]
    content, status = bytearray(picture.read_bytes()), picture.stat()
    content[-20] ^= 1
    picture.write_bytes(content)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ConfigError, match="other raw files: an image, audio or video file has another content"):
        pack(raw_copy, tmp_path / "out")
    pack(raw_copy, tmp_path / "other")
    pack(raw_copy, tmp_path / "other")
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, tmp_path / "out")


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


def test_rows_that_a_killed_packing_spilled_are_not_packed(tiny_raw, tiny_dataset, tmp_path):
    spill = tmp_path / "out" / ".tmp-pack" / "spill"
    spill.mkdir(parents=True)
    for modality in ("text", "numeric", "image"):
        (spill / f"{modality}-000000").write_text("0\tSTALE\tx\n")
    (spill.parent / "train.numbers").write_bytes(b"x" * 24)
    assert tree(pack(tiny_raw, tmp_path / "out").directory) == tree(tiny_dataset)


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
def test_real_folders_pack_with_the_published_counts(
    shared_data, tmp_path: Path, name, settings, entities, relations, splits
):
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
    assert found["item 00"].members == {
        "audio.0.ogg": b"sound one",
        "audio.1.wav": b"sound two",
        "video.0.webp": b"moving",
    }
    assert found["item 01"].members == {"video.0.mp4": b"film"}
    assert dataset.modalities["audio"] == {"entities": 1, "files": 2} and dataset.modalities["video"] == {
        "entities": 2,
        "files": 2,
    }
    report = dataset.manifest["report"]
    assert report["ignored_rows"]["audio"] == 1 and report["cleaned"]["repeated_files"] == 1
    assert pack(raw_copy, tmp_path / "again").fingerprint == dataset.fingerprint
    append(raw_copy / "a.ogg", b"!")
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, tmp_path / "out")
    append(raw_copy / "video.tsv", "item 01\ta.ogg\n")
    assert pack(raw_copy, tmp_path / "new").manifest["report"]["undecodable"]["video"] == {
        "files": 1,
        "first": ["a.ogg"],
    }
