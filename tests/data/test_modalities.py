"""Rows reach the shard of their entity in the order they came, whatever the buffer holds; huge files are refused."""

import pytest

from mocme_dist.data import modalities
from mocme_dist.data.modalities import Spill, collect
from mocme_dist.errors import DataError


@pytest.mark.parametrize("buffer_bytes", [0, 300, 1 << 20])
def test_spilled_rows_come_back_by_shard_in_order(tmp_path, buffer_bytes):
    spill = Spill(tmp_path / "spill", shard_rows=10, buffer_bytes=buffer_bytes)
    rows = [(entity, b"row %d\r\t\x0b" % number) for number, entity in enumerate([3, 25, 3, 11, 9, 29, 3] * 5)]
    for modality in ("text", "numeric"):
        for entity, row in rows:
            spill.add(modality, entity, row)
    spill.flush()
    for modality in ("text", "numeric"):
        for shard in range(4):
            assert list(spill.take(modality, shard)) == [(entity, row) for entity, row in rows if entity // 10 == shard]
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_file_too_large_to_be_read_whole_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "images.tsv").write_text("entity\tfile\na\tsmall.png\na\tlarge.png\n")
    for name, size in (("small.png", 10), ("large.png", 11)):
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(modalities, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"images.tsv:3: file 'large.png' has 11 bytes; expected at most 10"):
        collect(tmp_path, {b"a": 0}, Spill(tmp_path / "spill", shard_rows=10))
