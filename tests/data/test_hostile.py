"""Raw folders and data sets with hostile content.

One line that names the file, no traceback, bounded memory and time.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from mocme_dist.config.schema import DataConfig
from mocme_dist.data import tsv
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import constant_columns, count_constant_columns
from mocme_dist.data.known import load_integers
from mocme_dist.data.packing import pack_folder
from mocme_dist.data.tsv import RawFile
from mocme_dist.data.vectors import open_vectors
from mocme_dist.data.vocabulary import find_twins
from mocme_dist.errors import DataError


def refused(call, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_graph(raw: Path, names: list[str]) -> Path:
    """A ring over `names`, twice as long in train as in the other splits."""
    raw.mkdir()
    ring = [f"{head}\tr\t{tail}\n" for head, tail in zip(names, names[1:] + names[:1], strict=True)]
    (raw / "train.txt").write_text("".join(ring), encoding="utf8")
    (raw / "valid.txt").write_text(f"{names[0]}\tr\t{names[2]}\n", encoding="utf8")
    (raw / "test.txt").write_text(f"{names[1]}\tr\t{names[3]}\n", encoding="utf8")
    return raw


NAMES = ["a", "b", "c", "d", "e"]


def test_text_without_a_text_column_is_named(tmp_path):
    raw = write_graph(tmp_path / "raw", NAMES)
    (raw / "text.tsv").write_text("entity\na\n")
    message = refused(pack_folder, raw, tmp_path / "out", DataConfig())
    assert message.startswith("text.tsv:1: the header has the column entity alone")


def test_a_name_of_a_megabyte_is_refused(tmp_path):
    raw = write_graph(tmp_path / "raw", [*NAMES, "x" * 1_000_000])
    assert "1,000,000 bytes; expected a name of at most 4,096" in refused(
        pack_folder, raw, tmp_path / "out", DataConfig()
    )


def test_an_entity_file_may_begin_with_any_digits(tmp_path):
    raw = write_graph(tmp_path / "raw", NAMES)
    (raw / "entity2id.txt").write_text("9" * 5000 + "\n")
    assert "entity2id.txt:1: expected 2 tab-separated fields" in refused(
        pack_folder, raw, tmp_path / "out", DataConfig()
    )


def test_a_gzip_bomb_of_empty_lines_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "EXPANSION_ALLOWANCE", 1 << 20)
    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress(b"\n" * (64 << 20)))
    assert "bytes expand to more than" in refused(lambda: list(RawFile(path).lines()))
    path.write_bytes(gzip.compress(b"".join(b"entity%d\tr\tentity%d\n" % (i, i + 1) for i in range(200_000))))
    assert sum(1 for _ in RawFile(path).lines()) == 200_000


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda raw: (raw / "part-0.parquet").write_bytes(b"PAR1"), "part-0.parquet is Parquet: write its columns"),
        (lambda raw: (raw / "graph.nt").write_text("<a> <b> <c> .\n"), "graph.nt is RDF: `mocme import rdf graph.nt"),
        (lambda raw: tarfile.open(raw / "all.tar", "w").close(), "all.tar is an archive: unpack it"),
    ],
)
def test_another_form_of_a_graph_is_recognised(tmp_path, make, message):
    raw = tmp_path / "raw"
    raw.mkdir()
    make(raw)
    assert message in refused(pack_folder, raw, tmp_path / "out", DataConfig())
    [file] = raw.iterdir()
    found = refused(pack_folder, file, tmp_path / "out", DataConfig())
    assert "is a file; expected a raw folder" in found and message in found


# -- names that look the same

TWINS = [
    "caf\u00e9",
    unicodedata.normalize("NFD", "caf\u00e9"),
    "b\u200b",
    "b",
    "c ",
    "c",
    "\U0001f469\u200d\U0001f52c",
]


def test_twins_are_found_and_joiners_are_kept():
    groups = find_twins([name.encode() for name in [*TWINS, "\U0001f469\U0001f52c"]])
    assert [[name.decode() for name in group] for group in groups] == [["b", "b\u200b"], ["c", "c "], TWINS[:2]]


def test_twins_are_reported_and_joined_on_request(tmp_path, caplog):
    raw = write_graph(tmp_path / "raw", TWINS)
    (raw / "text.tsv").write_text(f"entity\tlabel\n{TWINS[1]}\tcoffee\nb\t\u200b\nc \tsea\n", encoding="utf8")
    apart = pack_folder(raw, tmp_path / "apart", DataConfig())
    assert apart.num_entities == 7 and apart.manifest["report"]["twins"]["entities"]["groups"] == 3
    assert "6 entities have names that look the same" in caplog.text and "data.twins=join" in caplog.text
    assert apart.modalities["text"]["entities"] == 2  # a zero-width space is no text
    joined = pack_folder(raw, tmp_path / "joined", DataConfig(twins="join", allow_leakage=True))
    assert sorted(joined.entity_names()) == sorted(["caf\u00e9", "b", "c", TWINS[-1]])
    names = joined.entity_names()
    texts = {
        names[sample.id]: json.loads(sample.members["text.json"])["label"] for sample in joined.read_samples(0, 1 << 20)
    }
    assert texts == {"caf\u00e9": "coffee", "c": "sea"}


def test_a_file_is_found_under_the_other_unicode_form(tmp_path):
    raw = write_graph(tmp_path / "raw", NAMES)
    (raw / unicodedata.normalize("NFD", "caf\u00e9.png")).write_bytes(b"x")
    (raw / "images.tsv").write_text("entity\tfile\na\tcaf\u00e9.png\n", encoding="utf8")
    assert pack_folder(raw, tmp_path / "out", DataConfig()).modalities["image"]["files"] == 1


# -- vectors

IDS = {b"a": 0, b"b": 1}


def saved(tmp_path: Path, value: object) -> Path:
    (tmp_path / "features").mkdir()
    torch.save(value, tmp_path / "features" / "image.pt")
    (tmp_path / "features" / "image.ids").write_text("a\nb\n")
    return tmp_path


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(1, 3).expand(2, 3).contiguous().to_sparse(), "sparse_coo"),
        (torch.ones(2, 3, device="meta"), "on device meta"),
        (torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(1, 1).expand(10**6, 10**6), "4,000,000,000,000 bytes of numbers in a file of"),
        ({"a": torch.ones(1).expand(10**9)}, "4,000,000,000 bytes of numbers in a file of"),
    ],
    ids=["sparse", "meta", "quantized", "expanded", "expanded in a dictionary"],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, value, message):
    assert message in refused(open_vectors, saved(tmp_path, value), "image", IDS)


def test_a_refused_file_does_not_tell_how_to_unpickle_it(tmp_path):
    message = refused(open_vectors, saved(tmp_path, {"a": Path("x")}), "image", IDS)
    assert "something other than tensors" in message and "weights_only" not in message


@pytest.mark.parametrize("header", [b"{'descr': '<f4', 'fortran", b"{" * 100, b"(" * 5000, b"\xff\xfe", b"'''"])
def test_headers_of_npy_that_do_not_parse_are_one_line(tmp_path, header):
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    assert "not a whole .npy file of numbers" in refused(load_integers, path)


# -- manifests


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack_folder(write_graph(tmp_path / "raw", NAMES), tmp_path / "out", DataConfig())
    return tmp_path / "out"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_entities": 10**15},
        {"num_entities": 10**15, "shard_rows": 10**15},
        {"num_relations": 10**15},
        {"num_entities": 10**40},
        {"modalities": {"text": {"entities": "many"}}},
        {"modalities": {"text": []}},
        {"source": "here"},
        {"report": []},
    ],
    ids=str,
)
def test_manifests_with_impossible_values_end_at_once(packed, changes):
    path = packed / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(Dataset.open, packed)


def test_a_manifest_of_brackets_or_a_folder_in_its_place_is_one_line(packed):
    path = packed / "manifest.json"
    path.write_text("[" * 100_000)
    assert "nested too deeply" in refused(Dataset.open, packed)


# -- constant columns


def test_constant_columns_are_counted_over_all_parts():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 6)).astype(np.float16)
    values[:, 2] = 3
    values[:10, 4], values[10:, 4] = 1, 2  # constant in each part, not over all
    parts = [values[:10], values[10:11], values[11:11], values[11:]]
    records = [{"present": len(part), **constant_columns(part)} for part in parts]
    assert count_constant_columns(records, 6) == int((values == values[0]).all(axis=0).sum()) == 1
    assert count_constant_columns([{"present": 3}], 6) is None
