"""A feature store gives what a plain dense table gives, wherever the values lie, and refuses parts that do not fit."""

import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mocme_dist.data.feature_parts import part_is_complete, part_path, write_part
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.files import write_json
from mocme_dist.errors import DataError, ShapeError

NUM_ROWS, SHARD_ROWS, WIDTH = 23, 5, 7
RESIDENCIES = ("host", "device", "mmap")


def stats(shard):
    return {"failed": {"decode": 1}, "examples": [], "input_sha256": f"input-{shard}", "encoder_hash": "encoder"}


@pytest.fixture(params=["float16", "float32"])
def stored(tmp_path, request):
    """A data set folder with features of modality "text", the dense twin of its values, and who is present."""
    gen = np.random.default_rng(0)
    present = gen.random(NUM_ROWS) < 0.6
    present[5:10] = False  # a whole shard without the modality
    dense = np.where(present[:, None], gen.normal(size=(NUM_ROWS, WIDTH)), 0).astype(request.param)
    shards = range(-(-NUM_ROWS // SHARD_ROWS))
    write_json(
        tmp_path / "manifest.json",
        {"num_entities": NUM_ROWS, "shard_rows": SHARD_ROWS, "shards": [{"sha256": f"input-{s}"} for s in shards]},
    )
    folder = tmp_path / "features" / "text"
    for shard in shards:
        rows = slice(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, NUM_ROWS))
        write_part(folder, shard, dense[rows][present[rows]], present[rows], stats(shard))
    manifest = {
        "format": 1,
        "modality": "text",
        "width": WIDTH,
        "encoder_hash": "encoder",
        "num_rows": NUM_ROWS,
        "shard_rows": SHARD_ROWS,
    }
    write_json(folder / "manifest.json", manifest)
    return tmp_path, torch.from_numpy(dense).float(), torch.from_numpy(present)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("first, last", [(0, NUM_ROWS), (3, 17), (5, 10), (6, 8), (20, 23), (9, 9), (22, 23)])
def test_gather_equals_a_plain_dense_table(stored, residency, first, last):
    folder, dense, present = stored
    store = FeatureStore.open(folder, "text", first, last, residency)
    assert (store.width, store.num_rows) == (WIDTH, last - first)
    assert torch.equal(store.present(), present[first:last])
    gen = torch.Generator().manual_seed(1)
    for count in (0, 1, 40):
        rows = torch.randint(max(last - first, 1), (count if last > first else 0,), generator=gen)
        values, found = store.gather(rows)
        assert values.dtype == torch.float32 and values.shape == (len(rows), WIDTH)
        assert torch.equal(values, dense[first:last][rows]) and torch.equal(found, present[first:last][rows])


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_gathering_mapped_rows_in_another_thread_starts_no_second_team_of_threads(stored):
    store = FeatureStore.open(stored[0], "text", 0, NUM_ROWS, "mmap")
    rows = torch.arange(NUM_ROWS).repeat(1000)  # 161,000 numbers
    count = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731

    def threads(work):
        before = count()
        work()
        return count() - before

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            assert second.submit(threads, lambda: store.gather(rows)).result() == 0
            assert (
                first.submit(threads, lambda: torch.ones(1 << 18).exp()).result() == 1
            )  # what a team would have shown
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("rows", [[-1], [14], [0, 99]])
def test_rows_outside_the_range_are_refused(stored, residency, rows):
    store = FeatureStore.open(stored[0], "text", 3, 17, residency)
    with pytest.raises(ShapeError, match="gather: rows"):
        store.gather(torch.tensor(rows))


def test_only_the_parts_of_the_range_are_needed(stored):
    folder, dense, _ = stored
    for shard in (0, 3, 4):
        part_path(folder / "features" / "text", shard).unlink()
    store = FeatureStore.open(folder, "text", 5, 15)
    assert torch.equal(store.gather(torch.arange(10))[0], dense[5:15])
    with pytest.raises(
        DataError, match=r"part-000003.safetensors: part 3 is missing; run python -m mocme_dist.extract"
    ):
        FeatureStore.open(folder, "text", 5, 16)


def test_values_stay_as_they_are_stored(stored):
    folder, _, present = stored
    store = FeatureStore.open(folder, "text", 0, NUM_ROWS)
    part = json.loads(part_path(folder / "features" / "text", 0).read_bytes()[8:].split(b"}}")[0].decode() + "}}")
    expected = {"F16": 2, "F32": 4}[part["values"]["dtype"]] * WIDTH * int(present.sum())
    assert store._values.nbytes == expected


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_values_that_are_not_finite_stop_the_load_with_shard_entity_modality_and_count(stored, residency):
    folder, dense, present = stored
    values, mask = dense[10:15][present[10:15]].numpy().copy(), present[10:15].numpy()
    values[-1, 2:4] = [np.nan, np.inf]
    write_part(folder / "features" / "text", 2, values, mask, stats(2))
    entity = 10 + int(np.flatnonzero(mask)[-1])
    with pytest.raises(
        DataError,
        match=rf"part-000002.safetensors: 2 values of modality text are not finite, the first at entity {entity} ",
    ):
        FeatureStore.open(folder, "text", 0, NUM_ROWS, residency)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_values_that_are_not_finite_are_masked_counted_and_leave_the_others_alone(stored, residency, caplog):
    folder, dense, present = stored
    values, mask = dense[10:15][present[10:15]].numpy().copy(), present[10:15].numpy()
    values[0, 2:4] = [np.nan, np.inf]
    entity = 10 + int(np.flatnonzero(mask)[0])
    write_part(folder / "features" / "text", 2, values, mask, stats(2))
    with caplog.at_level(logging.WARNING):
        store = FeatureStore.open(folder, "text", 3, 20, residency, on_bad_feature="mask")
    assert f"2 values of modality text are not finite, the first at entity {entity}" in caplog.text
    assert "1 entities are absent" in caplog.text
    expected, kept = dense.clone(), present.clone()
    expected[entity], kept[entity] = 0, False
    found, there = store.gather(torch.arange(17))
    assert (
        torch.equal(found, expected[3:20])
        and torch.equal(there, kept[3:20])
        and torch.equal(store.present(), kept[3:20])
    )


def edit_json(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda d: (d / "features/text/manifest.json").unlink(),
            r"no finished features .* run python -m mocme_dist.extract",
        ),
        (lambda d: edit_json(d / "manifest.json", num_entities=24), r"\(23, 5\), the data set has \(24, 5\)"),
        (lambda d: edit_json(d / "manifest.json", shard_rows=6), r"\(23, 5\), the data set has \(23, 6\)"),
        (lambda d: edit_json(d / "features/text/manifest.json", format=2), r"format 2, expected 1"),
        (
            lambda d: edit_json(d / "features/text/manifest.json", encoder_hash="new"),
            r"encoder_hash encoder, expected new",
        ),
        (
            lambda d: edit_json(d / "manifest.json", shards=[{"sha256": "repacked"}] * 5),
            r"input_sha256 input-0, expected repacked",
        ),
        (lambda d: edit_json(d / "features/text/manifest.json", width=8), r"width 8"),
        (lambda d: (d / "features/text/part-000001.json").unlink(), r"part 1 is missing"),
        (lambda d: part_path(d / "features/text", 1).write_bytes(b"torn"), r"the part is torn"),
        (
            lambda d: shutil.copy(part_path(d / "features/text", 0), part_path(d / "features/text", 1)),
            r"the part is torn",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(stored, edit, message):
    edit(stored[0])
    with pytest.raises(DataError, match=message):
        FeatureStore.open(stored[0], "text", 0, NUM_ROWS)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\x80\x04pickle"]
)
def test_file_that_is_no_safetensors_is_refused_even_with_a_fitting_hash(stored, content):
    import hashlib

    path = part_path(stored[0] / "features/text", 0)
    path.write_bytes(content)
    edit_json(path.with_suffix(".json"), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="not a safetensors file"):
        FeatureStore.open(stored[0], "text", 0, NUM_ROWS)


def test_equal_input_gives_equal_bytes_and_a_finished_part_is_known(tmp_path):
    values, present = np.ones((2, 3), np.float16), np.array([1, 0, 1])
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_part(folder, 7, values, present, stats(7))
        assert part_is_complete(folder, 7, "input-7", "encoder")
        assert not part_is_complete(folder, 7, "other", "encoder")
        assert not part_is_complete(folder, 7, "input-7", "other")
        assert not part_is_complete(folder, 8, "input-7", "encoder")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["part-000007.json", "part-000007.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    record = json.loads((tmp_path / "a" / "part-000007.json").read_text())
    assert {key: record[key] for key in ("shard", "rows", "present", "absent", "failed")} == {
        "shard": 7, "rows": 3, "present": 2, "absent": 1, "failed": {"decode": 1},
    }  # fmt: skip
    with (tmp_path / "a" / "part-000007.safetensors").open("ab") as file:
        file.write(b"x")
    assert not part_is_complete(tmp_path / "a", 7, "input-7", "encoder")
    (tmp_path / "b" / "part-000007.json").write_text("{")
    assert not part_is_complete(tmp_path / "b", 7, "input-7", "encoder")


def test_transposed_values_are_written_by_rows(tmp_path):
    from safetensors.numpy import load_file

    values = np.arange(6, dtype=np.float32).reshape(3, 2).T
    write_part(tmp_path, 0, values, np.array([True, True]), stats(0))
    assert np.array_equal(load_file(part_path(tmp_path, 0))["values"], values)


@pytest.mark.parametrize(
    "values, present", [(np.ones((2, 3)), [1, 1]), (np.ones((2, 3), "f4"), [1, 0]), (np.ones(2, "f4"), [1, 1])]
)
def test_parts_that_contradict_themselves_are_not_written(tmp_path, values, present):
    with pytest.raises(ShapeError):
        write_part(tmp_path, 0, values, np.array(present), stats(0))
    assert list(tmp_path.iterdir()) == []
