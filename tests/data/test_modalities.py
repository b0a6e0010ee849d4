"""Rows reach the shard of their entity in the order they came, whatever the buffer holds."""

import pytest

from mocme_dist.data.modalities import Spill


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
