"""Each importer on a small release of the same form.

What it writes, that pack takes it, and what it says of a damaged one.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import ConfigError, DataError, StorageError
from mocme_dist.importers.libkge import import_libkge
from mocme_dist.importers.mmkb import import_mmkb, split_triples
from mocme_dist.importers.mmkg import import_mmkg
from mocme_dist.importers.pykeen import import_pykeen
from mocme_dist.importers.raw_folder import RawWriter
from mocme_dist.importers.wikidata5m import import_wikidata5m
from mocme_dist.importers.wikikg90m import import_wikikg90m

NAMES = [f"Q{number}" for number in range(12)]
RELATIONS = ["near", "part of"]
# A ring and its chords: train shows every entity and both relations.
TRAIN = [(h, h % 2, (h + 1) % 12) for h in range(12)] + [(h, 1, (h + 3) % 12) for h in range(0, 12, 2)]
VALID, TEST = [(1, 0, 4), (2, 0, 7)], [(3, 1, 8), (5, 0, 9)]
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8")


def by_name(triples, relations=RELATIONS):
    return [(NAMES[h], relations[r], NAMES[t]) for h, r, t in triples]


def read(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in path.read_text(encoding="utf8").splitlines()]


def check_graph(raw: Path, relations=RELATIONS) -> None:
    """The raw folder holds the graph, and pack takes it."""
    for split, triples in SPLITS.items():
        assert read(raw / f"{split}.txt") == by_name(triples, relations)
    dataset = pack_folder(raw, raw.with_name("dataset"), DataConfig())
    assert (dataset.num_entities, dataset.num_relations) == (12, 2)


def openke(folder: Path) -> Path:
    write(folder / "entity2id.txt", "12", *(f"{name}\t{number}" for number, name in enumerate(NAMES)))
    write(folder / "relation2id.txt", "2", *(f"{name}\t{number}" for number, name in enumerate(RELATIONS)))
    for split, triples in SPLITS.items():
        write(folder / f"{split}2id.txt", str(len(triples)), *(f"{h} {t} {r}" for h, r, t in triples))
    return folder


def test_the_openke_form_with_its_features(tmp_path):
    source = openke(tmp_path / "DB15K")
    vectors = torch.randn(12, 5)
    torch.save(vectors, source / "DB15K-visual.pth")
    counts = import_mmkg(source, tmp_path / "raw")
    assert counts["train.txt"] == len(TRAIN)
    assert read(tmp_path / "raw" / "features" / "image.ids") == [(name,) for name in NAMES]
    assert torch.equal(torch.load(tmp_path / "raw" / "features" / "image.pt", weights_only=True), vectors)
    check_graph(tmp_path / "raw")


@pytest.mark.parametrize("separator", ["\t", " "])
def test_the_named_form_with_tabs_or_spaces(tmp_path, separator):
    relations = ["near", "part_of"]
    source = tmp_path / "MKG-W"
    write(source / "entity2id.txt", *(f"{name}{separator}{number}" for number, name in enumerate(NAMES)))
    for split, triples in SPLITS.items():
        write(source / f"{split}.txt", *(separator.join(triple) for triple in by_name(triples, relations)))
    torch.save(torch.zeros(12, 3), source / "img_features.pth")
    import_mmkg(source, tmp_path / "raw")
    assert (tmp_path / "raw" / "features" / "image.pt").is_file()
    check_graph(tmp_path / "raw", relations)


def test_features_of_several_graphs_lie_in_one_folder(tmp_path):
    source = openke(tmp_path / "MKG-Y")
    for name in ("MKG-Y-textual.pth", "MKG-W-textual.pth"):
        write(tmp_path / "embeddings" / name, name)
    import_mmkg(source, tmp_path / "raw", tmp_path / "embeddings")
    assert (tmp_path / "raw" / "features" / "text.pt").read_text() == "MKG-Y-textual.pth\n"


def test_libkge_with_its_strings(tmp_path):
    source = tmp_path / "kge"
    write(source / "entity_ids.del", *(f"{number}\t{name}" for number, name in enumerate(NAMES)))
    write(source / "relation_ids.del", *(f"{number}\t{name}" for number, name in enumerate(RELATIONS)))
    for split, triples in SPLITS.items():
        write(source / f"{split}.del", *(f"{h}\t{r}\t{t}" for h, r, t in triples))
    write(source / "entity_strings.del", "Q0\tthe first  one", "Q3\tthe fourth")
    import_libkge(source, tmp_path / "raw")
    assert read(tmp_path / "raw" / "text.tsv") == [("entity", "label"), ("Q0", "the first one"), ("Q3", "the fourth")]
    check_graph(tmp_path / "raw")


def test_a_folder_that_pykeen_itself_wrote(tmp_path):
    from pykeen.datasets.base import EagerDataset
    from pykeen.triples import TriplesFactory

    ids = {
        "entity_to_id": {name: n for n, name in enumerate(NAMES)},
        "relation_to_id": {name: n for n, name in enumerate(RELATIONS)},
    }
    parts = [TriplesFactory(np.array(triples), **ids) for triples in (TRAIN, TEST, VALID)]
    EagerDataset(training=parts[0], testing=parts[1], validation=parts[2]).to_directory_binary(tmp_path / "pykeen")
    import_pykeen(tmp_path / "pykeen", tmp_path / "raw")
    check_graph(tmp_path / "raw")


def test_wikidata5m_leaves_out_who_has_no_fact(tmp_path):
    source = tmp_path / "wikidata5m"
    for split, triples in SPLITS.items():
        write(source / f"wikidata5m_transductive_{split}.txt", *("\t".join(triple) for triple in by_name(triples)))
    source.joinpath("wikidata5m_text.txt.gz").write_bytes(gzip.compress(b"Q1\tA  place.\nQ99\tno fact\n"))
    write(source / "wikidata5m_entity.txt", "Q1\tOne\tUno\tEins", "Q2\tTwo", "Q99\tNobody")
    import_wikidata5m(source, tmp_path / "raw")
    header = ("entity", "label", "description", "aliases")
    assert read(tmp_path / "raw" / "text.tsv") == [
        header,
        ("Q1", "One", "A place.", "Uno, Eins"),
        ("Q2", "Two", "", ""),
    ]
    check_graph(tmp_path / "raw")


def wikikg(folder: Path) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "train_hrt.npy", np.array(TRAIN))
    both = np.array(VALID + TEST)
    np.save(folder / "val_hr.npy", both[:, :2])
    np.save(folder / "val_t.npy", both[:, 2].astype(np.int32))
    return folder


def test_wikikg90m_with_its_mapping_and_features(tmp_path):
    source = wikikg(tmp_path / "wikikg90m-v2" / "processed")
    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float16)
    np.save(source / "entity_feat.npy", vectors)
    write(
        tmp_path / "map" / "entity.csv",
        "idx,entity,title,desc",
        *(f'{n},{name},"t, {n}",d' for n, name in enumerate(NAMES)),
    )
    write(
        tmp_path / "map" / "relation.csv",
        "idx,relation,title,desc",
        *(f"{n},{name},," for n, name in enumerate(RELATIONS)),
    )
    import_wikikg90m(source.parent, tmp_path / "raw", tmp_path / "map")
    assert read(tmp_path / "raw" / "text.tsv")[1] == ("Q0", "t, 0", "d")
    assert np.array_equal(np.load(tmp_path / "raw" / "features" / "text.npy"), vectors)
    check_graph(tmp_path / "raw")


def test_wikikg90m_without_a_mapping_names_by_number(tmp_path):
    import_wikikg90m(wikikg(tmp_path / "arrays"), tmp_path / "raw")
    assert read(tmp_path / "raw" / "test.txt") == [("e3", "r1", "e8"), ("e5", "r0", "e9")]


def mmkb(folder: Path) -> Path:
    triples = by_name(TRAIN + VALID + TEST, ["near", "part_of"])
    write(
        folder / "DB15K_EntityTriples.txt", *(f"<http://x/{h}> <http://y/{r}> <http://x/{t}> ." for h, r, t in triples)
    )
    write(
        folder / "DB15K_NumericalTriples.txt",
        '<http://x/Q1>\t<http://y/height>\t"1.5"^^<http://z#double> .',
        "<http://x/Q2> <http://y/age> 7",
    )
    return folder


def test_mmkb_is_split_so_that_train_shows_everything(tmp_path):
    import h5py

    source = mmkb(tmp_path / "DB15K")
    write(source / "DB15K_ImageIndex.txt", "<http://x/Q3>\tDBP001", "<http://x/Q77>\tDBP002")
    with h5py.File(source / "DB15K_ImageData.h5", "w") as file:
        for number in (1, 2):
            file.create_dataset(f"DBP00{number}", data=np.full((1, 6), number, dtype=np.float32))
    import_mmkb(source, tmp_path / "raw", split="0.7,0.15,0.15", seed=1)
    raw = tmp_path / "raw"
    parts = {split: read(raw / f"{split}.txt") for split in SPLITS}
    assert sorted(triple for part in parts.values() for triple in part) == sorted(
        (f"http://x/{h}", f"http://y/{r}", f"http://x/{t}")
        for h, r, t in by_name(TRAIN + VALID + TEST, ["near", "part_of"])
    )
    assert len(parts["valid"]) == len(parts["test"]) == 3
    assert {name for h, _, t in parts["train"] for name in (h, t)} == {f"http://x/{name}" for name in NAMES}
    assert read(raw / "numeric.tsv")[1:] == [
        ("http://x/Q1", "http://y/height", "1.5"),
        ("http://x/Q2", "http://y/age", "7"),
    ]
    assert read(raw / "features" / "image.ids") == [("http://x/Q3",)]
    assert np.load(raw / "features" / "image.npy").tolist() == [[1.0] * 6]
    assert not (raw / "image.npy").exists()
    pack_folder(raw, tmp_path / "dataset", DataConfig())


def test_a_split_never_hides_an_entity_even_when_it_then_falls_short():
    star = [("hub", "r", f"leaf {n}") for n in range(20)]
    parts = split_triples(star, (0.5, 0.25, 0.25), seed=0)
    assert parts["train"] != [] and parts["valid"] == parts["test"] == []


def drop(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "make, run, damage, message",
    [
        (openke, import_mmkg, drop("entity2id.txt"), r"no entity2id.txt \(nor .gz\); a release has entity2id.txt"),
        (openke, import_mmkg, drop("test2id.txt"), "no test2id.txt nor test.txt"),
        (
            openke,
            import_mmkg,
            lambda f: write(f / "valid2id.txt", "1", "0 12 0"),
            r"valid2id.txt:2: '12' is no number below 12",
        ),
        (
            openke,
            import_mmkg,
            lambda f: write(f / "valid2id.txt", "0 1"),
            r"valid2id.txt:1: expected head, tail and relation",
        ),
        (openke, import_mmkg, lambda f: write(f / "entity2id.txt", "a 0", "b 2"), "not 0 to 1"),
        (
            openke,
            import_mmkg,
            lambda f: write(f / "entity2id.txt", "a 0", "b 0"),
            "entity2id.txt:2: number 0 occurs twice",
        ),
        (openke, import_libkge, lambda f: None, "no entity_ids.del .*a LibKGE folder has"),
        (openke, import_pykeen, lambda f: None, "entity_to_id.tsv|training.*folder not found; a PyKEEN folder has"),
        (openke, import_wikidata5m, lambda f: None, "no wikidata5m_text.txt"),
        (openke, import_mmkb, lambda f: None, "0 files end in _EntityTriples.txt; expected one"),
        (wikikg, import_wikikg90m, drop("val_t.npy"), "no val_t.npy .*WikiKG90Mv2 has"),
        (wikikg, import_wikikg90m, lambda f: np.save(f / "val_t.npy", np.zeros(3)), "val_t.npy: float64 of shape"),
        (wikikg, import_wikikg90m, lambda f: np.save(f / "val_t.npy", np.zeros(3, int)), "has 4 rows, val_t.npy 3"),
        (
            wikikg,
            import_wikikg90m,
            lambda f: np.save(f / "val_t.npy", np.array([0, -1, 2, 3])),
            "val_t.npy: holds the number -1",
        ),
        (
            mmkb,
            import_mmkb,
            lambda f: write(f / "DB15K_NumericalTriples.txt", "a b many"),
            "Triples.txt:1: expected a number, got 'many'",
        ),
    ],
)
def test_what_is_missing_or_malformed_is_named_and_nothing_is_left(tmp_path, make, run, damage, message):
    source = make(tmp_path / "source")
    damage(source)
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_array_of_objects_is_refused(tmp_path):
    source = wikikg(tmp_path / "arrays")
    np.save(source / "train_hrt.npy", np.array([[1, "r", 2]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"train_hrt.npy: not an array of numbers"):
        import_wikikg90m(source, tmp_path / "raw")


def test_a_foreign_folder_is_refused_and_an_imported_one_replaced(tmp_path):
    source = openke(tmp_path / "source")
    write(tmp_path / "raw" / "mine.txt", "precious")
    with pytest.raises(ConfigError, match="not written by an importer"):
        import_mmkg(source, tmp_path / "raw")
    assert (tmp_path / "raw" / "mine.txt").is_file()
    for _ in range(2):
        import_mmkg(source, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "IMPORT.json").read_text())["form"] == "mmkg"


def test_the_command_prints_counts_and_leaves_with_3_for_a_bad_source(tmp_path):
    def run(source):
        command = [sys.executable, "-m", "mocme_dist.import", "mmkg", str(source), str(tmp_path / "raw")]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=400)

    done = run(openke(tmp_path / "source"))
    assert done.returncode == 0 and json.loads(done.stdout)["test.txt"] == len(TEST)
    failed = run(tmp_path / "nowhere")
    assert failed.returncode == 3 and "folder not found" in failed.stderr and "Traceback" not in failed.stderr


def test_what_a_user_added_to_an_imported_folder_is_not_deleted(tmp_path):
    source = openke(tmp_path / "source")
    import_mmkg(source, tmp_path / "raw")
    write(tmp_path / "raw" / "images" / "Q1.png", "precious")
    with pytest.raises(ConfigError, match=r"holds images/Q1.png and perhaps more that no import wrote"):
        import_mmkg(source, tmp_path / "raw")
    assert (tmp_path / "raw" / "images" / "Q1.png").is_file() and (tmp_path / "raw" / "train.txt").is_file()


def test_a_link_as_out_stays_one_and_its_folder_is_written(tmp_path):
    source = openke(tmp_path / "source")
    (tmp_path / "real").mkdir()
    (tmp_path / "raw").symlink_to(tmp_path / "real")
    for _ in range(2):
        import_mmkg(source, tmp_path / "raw")
    assert (tmp_path / "raw").is_symlink() and (tmp_path / "real" / "train.txt").is_file()


def test_an_out_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(tmp_path):
    source = openke(tmp_path / "source")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        import_mmkg(source, tmp_path / "file" / "raw")
    with pytest.raises(StorageError, match="No space left"), RawWriter(tmp_path / "raw", source, "mmkg"):
        raise OSError(28, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_a_mapping_may_be_compressed_and_a_torn_one_is_named(tmp_path):
    source = wikikg(tmp_path / "arrays")
    (tmp_path / "map").mkdir()
    for kind, names in (("entity", NAMES), ("relation", RELATIONS)):
        text = "".join(
            f"{line}\n" for line in (f"idx,{kind},title,desc", *(f"{n},{name},," for n, name in enumerate(names)))
        )
        (tmp_path / "map" / f"{kind}.csv.gz").write_bytes(gzip.compress(text.encode()))
    import_wikikg90m(source, tmp_path / "raw", tmp_path / "map")
    check_graph(tmp_path / "raw")
    whole = (tmp_path / "map" / "entity.csv.gz").read_bytes()
    (tmp_path / "map" / "entity.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"entity.csv.gz: cannot be read as CSV"):
        import_wikikg90m(source, tmp_path / "raw", tmp_path / "map")


def test_vectors_that_are_no_hdf5_are_named(tmp_path):
    source = mmkb(tmp_path / "DB15K")
    write(source / "DB15K_ImageIndex.txt", "<http://x/Q3>\tDBP001")
    write(source / "DB15K_ImageData.h5", "no HDF5")
    with pytest.raises(DataError, match=r"ImageData.h5: cannot be read as HDF5 vectors"):
        import_mmkb(source, tmp_path / "raw")
