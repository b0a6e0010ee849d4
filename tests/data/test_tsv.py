"""Raw files are read as they are meant, and a wrong line is named."""

import gzip
import os

import pytest

from mocme_dist.data import tsv
from mocme_dist.data.tsv import MediaFolder, RawFile, Table, find_file, require_file
from mocme_dist.errors import DataError


def lines_of(tmp_path, content, name="file.txt"):
    (tmp_path / name).write_bytes(content)
    return list(RawFile(tmp_path / name).lines())


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", []),
        (b"\n \n\r\n", []),
        (b"a\tb\n\nc\td\n", [(1, b"a\tb"), (3, b"c\td")]),
        (b"a\tb\r\nc\td\r\n", [(1, b"a\tb"), (2, b"c\td")]),
        (b"a\tb\nc\td", [(1, b"a\tb"), (2, b"c\td")]),
        (b"a\tb\nc\td\r", [(1, b"a\tb"), (2, b"c\td")]),
        (b"\xef\xbb\xbfa\tb\n", [(1, b"a\tb")]),
        (b"\t\t\n\t", [(1, b"\t\t"), (2, b"\t")]),
        ("a\x0b\x1c\u2028b\t'\"c\n".encode(), [(1, "a\x0b\x1c\u2028b\t'\"c".encode())]),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1 << 22, 3])
def test_lines_end_at_line_feeds_only(tmp_path, monkeypatch, content, expected, chunk_bytes):
    # A mark at the start is taken off whole chunks, which are never smaller than the mark.
    monkeypatch.setattr(tsv, "CHUNK_BYTES", chunk_bytes)
    assert lines_of(tmp_path, content) == expected


def test_gzip_reads_alike_and_a_cut_one_is_an_error(tmp_path):
    content = b"".join(b"%d\tx\n" % n for n in range(5000))
    packed = gzip.compress(content)
    assert lines_of(tmp_path, packed, "a.txt.gz") == lines_of(tmp_path, content, "a.txt")
    for wrong in (packed[: len(packed) // 2], b"plain text", packed[:100] + b"\0" * 50 + packed[150:]):
        with pytest.raises(DataError, match=r"b.txt.gz: not a whole gzip file"):
            lines_of(tmp_path, wrong, "b.txt.gz")


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "CHUNK_BYTES", 100)
    monkeypatch.setattr(tsv, "MAX_LINE_BYTES", 300)
    with pytest.raises(DataError, match=r"file.txt:2: a line of more than"):
        lines_of(tmp_path, b"a\tb\n" + b"x" * 1000)


def test_missing_and_doubled_files_are_named(tmp_path):
    assert find_file(tmp_path, "text.tsv") is None
    with pytest.raises(DataError, match=rf"{tmp_path}/train.txt: file not found"):
        require_file(tmp_path, "train.txt")
    with pytest.raises(DataError, match=rf"{tmp_path}/nowhere: raw folder not found"):
        require_file(tmp_path / "nowhere", "train.txt")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"x"))
    assert require_file(tmp_path, "train.txt").label == "train.txt.gz"
    (tmp_path / "train.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds both train.txt and train.txt.gz"):
        require_file(tmp_path, "train.txt")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"t.tsv:1: expected a header that begins with entity, got nothing"),
        ("name\tlabel\n", r"t.tsv:1: expected a header that begins with entity, got 'name', 'label'"),
        ("entity\tlabel\tlabel\n", r"t.tsv:1: the header names label more than once"),
        ("entity\tlabel\t\n", r"t.tsv:1: the header names \(empty\)"),
        ("entity\tlabel\na\tb\n\na\tb\tc\n", r"t.tsv:4: expected 2 tab-separated fields \(entity, label\), got 3"),
        ("entity\tlabel\na\n", r"t.tsv:2: expected 2 tab-separated fields \(entity, label\), got 1"),
        ("entity\tlabel\n \tb\n", r"t.tsv:2: the field entity is empty"),
    ],
)
def test_malformed_tables_are_named_by_line(tmp_path, content, message):
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        list(Table(RawFile(tmp_path / "t.tsv"), ("entity",)).rows())


def test_media_must_be_plain_files_inside_the_folder(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    (raw / "images" / "a.png").write_bytes(b"123")
    (raw / "inner.png").symlink_to(raw / "images" / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (raw / "outer.png").symlink_to(tmp_path / "secret.png")
    (raw / "away").symlink_to(tmp_path)
    os.mkfifo(raw / "pipe.png")
    media = MediaFolder(raw)
    assert {media.find(name)[1] for name in ("images/a.png", "inner.png", "images/../images/a.png")} == {3}
    for name, message in {
        "../secret.png": "outside the raw folder",
        "images/../../secret.png": "outside the raw folder",
        str(tmp_path / "secret.png"): "outside the raw folder",
        str(raw / "images" / "a.png"): "outside the raw folder; expected a path relative",
        "away/secret.png": "outside the raw folder",
        "outer.png": "a link that leads outside",
        "images/b.png": "not found",
        "images": "not a plain file",
        "pipe.png": "not a plain file",
        "a\0b.png": "null",
    }.items():
        with pytest.raises(ValueError, match=message):
            media.find(name)
