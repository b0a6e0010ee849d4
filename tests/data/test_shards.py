"""Shards come back as they were written, and nothing else comes back."""

import re
from dataclasses import replace

import pytest
from tars import LIMIT, read

from mocme_dist.data.shards import Sample, read_members, read_shard, write_shard
from mocme_dist.errors import DataError, ShardError


def samples():
    return [
        Sample(3, {"text.json": b'{"label": "x"}'}),
        Sample(4, {f"image.{n}.png": b"p" * (n + 500) for n in range(12)}),
        Sample(900, {"numeric.json": b"{}", "image.0.webp": b""}),
    ]


def test_round_trip_keeps_ids_members_and_their_order(tmp_path):
    path = tmp_path / "entities-000000.tar"
    entry = write_shard(path, samples())
    found = read(path, entry)
    assert [(s.id, s.members) for s in found] == [(s.id, s.members) for s in samples()]
    assert [len(content) for content in found[1].files("image")] == list(range(500, 512))
    assert (entry.name, entry.samples, entry.bytes) == (path.name, 3, path.stat().st_size)


def test_equal_samples_give_equal_bytes(tmp_path):
    one, other = write_shard(tmp_path / "a.tar", samples()), write_shard(tmp_path / "b.tar", samples())
    assert one.sha256 == other.sha256 and (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_webdataset_itself_reads_the_shard(tmp_path):
    import webdataset

    write_shard(tmp_path / "a.tar", samples())
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [s["__key__"] for s in found] == ["000000000003", "000000000004", "000000000900"]
    assert found[0]["text.json"] == b'{"label": "x"}'


def test_shard_without_samples_is_good_only_if_the_manifest_says_so(tmp_path):
    entry = write_shard(tmp_path / "a.tar", [])
    assert read(tmp_path / "a.tar", entry) == []
    with pytest.raises(DataError, match=r"a.tar: 0 samples, expected at least one"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("kept", [0, 1, 511, 512, 600, 1024, 1124, 5120, "data", "data + 512"])
def test_cut_shards_are_found_with_and_without_a_manifest(tmp_path, kept):
    path = tmp_path / "entities-000000.tar"
    entry = write_shard(path, samples())
    content = path.read_bytes()
    # Three samples of 1, 12 and 2 members: headers of 512 bytes, contents padded to 512 (the twelve hold 500 to 511
    # bytes).
    data = 512 * (2 + 24 + 2 + 1)
    path.write_bytes(content[: {"data": data, "data + 512": data + 512}.get(kept, kept)])
    with pytest.raises(ShardError) as caught:
        read(path, entry)
    found = re.search(
        r"entities-000000.tar: .*; ([\d,]+) bytes, the manifest says 20,480; (\d+) whole samples, the .* says 3;"
        r" sha256",
        str(caught.value),
    )
    assert found and int(found[1].replace(",", "")) == path.stat().st_size
    assert (
        0 <= int(found[2]) <= 3
        and entry.sha256[:12] in str(caught.value)
        and "--on-bad-shard=skip" in str(caught.value)
    )
    with pytest.raises(ShardError, match=r"entities-000000.tar: (byte \d+: .*the shard is cut|the shard is empty)"):
        read(path)


def test_flipped_byte_and_wrong_count_are_found(tmp_path):
    path = tmp_path / "a.tar"
    entry = write_shard(path, samples())
    with pytest.raises(DataError, match=r"another count; .* 3 whole samples, the manifest says 4"):
        read(path, replace(entry, samples=4))
    content = bytearray(path.read_bytes())
    content[520] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        read(path, entry)


@pytest.mark.parametrize("content", [b"\0" * 10240, b"garbage" * 1000, b"\x1f\x8b" + b"z" * 2000])
def test_garbage_is_not_a_shard(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: "):
        read(path)


def test_one_modality_is_read_and_the_rest_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("mocme_dist.data.shards._PIECE", 100)
    entry = write_shard(tmp_path / "a.tar", samples())
    for known in (entry, None):
        found = list(read_members(tmp_path / "a.tar", known, LIMIT, "image"))
        by_name = sorted(range(12), key=str)  # webdataset writes them so
        assert [(m.id, m.name) for m in found] == [*((4, f"image.{n}.png") for n in by_name), (900, "image.0.webp")]
        assert [m.content for m in found] == [*(b"p" * (n + 500) for n in by_name), b""]
    assert [s.id for s in read_shard(tmp_path / "a.tar", entry, LIMIT, "text")] == [3]
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[4000] ^= 1  # in a picture
    (tmp_path / "a.tar").write_bytes(content)
    members = read_members(tmp_path / "a.tar", entry, LIMIT, "text")
    assert next(members).id == 3
    with pytest.raises(ShardError, match=r"another content; .* 3 whole samples, the manifest says 3; sha256"):
        next(members)


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(ShardError, match=r"a.tar: shard not found"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "wrong", [[Sample(2), Sample(1)], [Sample(1), Sample(1)], [Sample(1, {"text.pkl": b""})], [Sample(1, {"a/b": b""})]]
)
def test_writer_refuses_what_the_reader_would(tmp_path, wrong):
    with pytest.raises(DataError):
        write_shard(tmp_path / "a.tar", wrong)
    assert list(tmp_path.iterdir()) == []
