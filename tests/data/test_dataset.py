"""A packed folder opens whole or not at all."""

import json
import shutil

import numpy as np
import pytest

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import file_entry, write_json
from mocme_dist.errors import DataError


def test_opened_data_set_fits_its_manifest(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    assert (dataset.num_entities, dataset.num_relations, dataset.shards.num_shards) == (60, 4, 4)
    assert len(dataset.entity_names()) == len(set(dataset.entity_names())) == 60
    assert dataset.relation_names() == ["after", "kind", "near", "part_of"]
    for split in ("train", "valid", "test"):
        triples = dataset.triples(split)
        assert (
            isinstance(triples.base, np.memmap)
            and triples.dtype == np.int64
            and triples.shape == (dataset.manifest["splits"][split], 3)
        )
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
        (lambda d: edit(d, shards=[{"name": 1}]), r"lacks shards.0.bytes, shards.0.sha256, shards.0.samples"),
        (lambda d: edit(d, shards=[]), r"lists 0 shards, expected 4"),
        (lambda d: (d / "shards/entities-000002.tar").unlink(), r"entities-000002.tar: shard not found"),
        (
            lambda d: (d / "shards/entities-000002.tar").write_bytes(b"x"),
            (
                r"entities-000002.tar: byte 0: ends after 1 of 512 .*; 1 bytes, the manifest says .*; 0 whole samples,"
                r" the manifest says"
            ),
        ),
    ],
)
def test_damaged_folder_is_refused(dataset_copy, damage, message):
    damage(dataset_copy)
    with pytest.raises(DataError, match=message):
        Dataset.open(dataset_copy)


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


GRAPH = [
    *("entities.parquet", "entity_labels.parquet", "relations.parquet", "train.npy", "valid.npy", "test.npy"),
    *(f"known_{name}_{part}.npy" for name in ("train", "all") for part in ("keys", "offsets", "targets")),
]


@pytest.mark.parametrize("name", GRAPH)
def test_a_flipped_bit_of_the_graph_is_found_when_a_data_set_is_opened(dataset_copy, name):
    assert sorted(path.name for path in (dataset_copy / "graph").iterdir()) == sorted(GRAPH)
    Dataset.open(dataset_copy)
    flip(dataset_copy / "graph" / name, -1 if name.endswith("npy") else 40)
    with pytest.raises(DataError, match=rf"{name}: sha256 differs from the manifest's.*pack the data set again"):
        Dataset.open(dataset_copy)


def test_damage_is_found_in_data_sets_of_versions_without_hashes_of_single_files(dataset_copy):
    manifest = json.loads((dataset_copy / "manifest.json").read_text())
    del manifest["graph"]
    write_json(dataset_copy / "manifest.json", manifest)
    Dataset.open(dataset_copy)
    flip(dataset_copy / "graph" / "test.npy")
    with pytest.raises(DataError, match=r"graph: fingerprint \w{12}, the manifest says \w{12}: a file is damaged"):
        Dataset.open(dataset_copy)


@pytest.mark.parametrize("column, wrong", [(0, 60), (1, 4), (2, -1)])
def test_an_id_out_of_range_is_refused_whatever_the_hashes_say(dataset_copy, column, wrong):
    path = dataset_copy / "graph" / "test.npy"
    triples = np.load(path)
    triples[3, column] = wrong
    np.save(path, triples)
    graph = json.loads((dataset_copy / "manifest.json").read_text())["graph"]
    edit(dataset_copy, graph={**graph, "test.npy": file_entry(path)})
    with pytest.raises(DataError, match=rf"test.npy: \w+ of a triple: {wrong} found, expected numbers from 0 to"):
        Dataset.open(dataset_copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_entities": "60"}, r"num_entities: Input should be a valid integer, found '60'; pack"),
        ({"num_relations": True}, r"num_relations: Input should be a valid integer, found True"),
        ({"splits": {"train": -1, "valid": 1, "test": 1}}, r"splits.train: .*greater than or equal to 0, found -1"),
        ({"modalities": {"../../x": {"entities": 1}}}, r"modalities.*: String should match pattern"),
        ({"graph": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}, r"graph.*: String should match pattern"),
        ({"graph": {}}, r"graph: lacks entities.parquet, "),
        ({"fingerprint": "../x"}, r"fingerprint: String should match pattern"),
        ({"shards": 3}, r"shards: Input should be a valid list"),
    ],
)
def test_a_manifest_that_says_something_impossible_is_one_line(dataset_copy, changes, message):
    edit(dataset_copy, **changes)
    with pytest.raises(DataError, match=message) as error:
        Dataset.open(dataset_copy)
    assert "\n" not in str(error.value)


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
