"""A packed folder opens whole or not at all."""

import json
import shutil

import numpy as np
import pytest

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import write_json
from mocme_dist.errors import DataError


def test_opened_data_set_fits_its_manifest(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    assert (dataset.num_entities, dataset.num_relations, dataset.shards.num_shards) == (60, 4, 4)
    assert len(dataset.entity_names()) == len(set(dataset.entity_names())) == 60
    assert dataset.relation_names() == ["after", "kind", "near", "part_of"]
    for split in ("train", "valid", "test"):
        triples = dataset.triples(split)
        assert isinstance(triples.base, np.memmap) and triples.dtype == np.int64 and triples.shape == (dataset.manifest["splits"][split], 3)
    assert len(dataset.known("train").targets) == 2 * len(dataset.triples("train"))
    assert len(dataset.known("all").targets) == 2 * sum(dataset.manifest["splits"].values())
    ids = [sample.id for shard in range(4) for sample in dataset.read_samples(shard, 1 << 20)]
    assert ids == sorted(set(ids)) and len(ids) == 60 - dataset.manifest["report"]["missing"]["entities"]


def edit(folder, **changes):
    path = folder / "manifest.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "manifest.json").unlink(), r"no manifest.json; .* run python -m mocme_dist.pack"),
        (lambda d: (d / "manifest.json").write_text('{"format": 1, "num_ent'), r"manifest.json: not JSON"),
        (lambda d: (d / "manifest.json").write_text("[]"), r"expected a data set of format 1"),
        (lambda d: edit(d, format=2), r"expected a data set of format 1"),
        (lambda d: (d / "manifest.json").write_text('{"format": 1}'), r"lacks num_entities, "),
        (lambda d: edit(d, shards=[{"name": 1}]), r"damaged"),
        (lambda d: edit(d, shards=[]), r"lists 0 shards, expected 4"),
        (lambda d: (d / "shards/entities-000002.tar").unlink(), r"entities-000002.tar: shard not found"),
        (
            lambda d: (d / "shards/entities-000002.tar").write_bytes(b"x"),
            r"entities-000002.tar: byte 0: ends after 1 of 512 .*; 1 bytes, the manifest says .*; 0 whole samples, the manifest says",
        ),
    ],
)
def test_damaged_folder_is_refused(dataset_copy, damage, message):
    damage(dataset_copy)
    with pytest.raises(DataError, match=message):
        Dataset.open(dataset_copy)


def test_shard_names_in_a_manifest_cannot_lead_elsewhere(dataset_copy):
    entries = json.loads((dataset_copy / "manifest.json").read_text())["shards"]
    for name in ("../../secret.tar", "pipe:touch x", "entities-000009.tar"):
        edit(dataset_copy, shards=[{**entries[0], "name": name}, *entries[1:]])
        with pytest.raises(DataError, match="shards"):
            Dataset.open(dataset_copy)


def test_samples_of_another_shard_are_refused(dataset_copy):
    shards = dataset_copy / "shards"
    entries = json.loads((dataset_copy / "manifest.json").read_text())["shards"]
    (shards / "entities-000001.tar").write_bytes((shards / "entities-000000.tar").read_bytes())
    edit(dataset_copy, shards=[entries[0], {**entries[0], "name": "entities-000001.tar"}, *entries[2:]])
    with pytest.raises(DataError, match=r"entities-000001.tar: key \d{12} lies outside the shard's ids \[16, 32\)"):
        list(Dataset.open(dataset_copy).read_samples(1, 1 << 20))


def test_torn_graph_files_are_named(dataset_copy):
    dataset = Dataset.open(dataset_copy)
    path = dataset_copy / "graph" / "train.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train.npy: not a whole .npy file"):
        dataset.triples("train")
    np.save(path, np.zeros((3, 3), np.int64))
    with pytest.raises(DataError, match=r"shape \(3, 3\), the manifest says"):
        dataset.triples("train")
    with pytest.raises(DataError, match="no split 'dev'"):
        dataset.triples("dev")
    (dataset_copy / "graph" / "entities.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"entities.parquet: cannot be read"):
        dataset.entity_names()


def test_some_names_are_those_of_all_whatever_the_row_groups(tiny_dataset, tmp_path):
    import pyarrow.parquet

    folder = tmp_path / "copy"
    shutil.copytree(tiny_dataset, folder)
    dataset = Dataset.open(folder)
    names, path = dataset.entity_names(), folder / "graph" / "entities.parquet"
    for size in (60, 7):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path), path, row_group_size=size)
        for first, count in ((0, 5), (3, 20), (14, 7), (0, 60), (59, 1)):
            assert dataset.entity_names_of(first, count) == names[first : first + count]
    with pytest.raises(DataError, match=r"60 names, expected 61 or more"):
        dataset.entity_names_of(59, 2)
