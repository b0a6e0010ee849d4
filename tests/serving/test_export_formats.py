"""Vectors for other tools: names survive word2vec readers, and a FAISS index finds what numpy finds."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from tiny_bundle import rows_of

from mocme_dist.serving import export_formats
from mocme_dist.serving.export_formats import export_other, word_of

NAMES = [
    "New York", "New\u00a0York", "New_York", "New%20York", "100 %", " leading", "trailing\u00a0", "tab\tinside",
    "line\u2028end", "next\x85line", "zero\u200bwidth", "ideographic\u3000space", "é", "e\u0301", "Ω", "n02084071",
    "a  b",
]  # fmt: skip


def write(path: Path) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((len(NAMES), 4)).astype(np.float32)
    export_formats._write_text(path, len(NAMES), 4, iter([NAMES[:5], NAMES[5:]]), iter([vectors[:9], vectors[9:]]))
    return vectors


def plain_reader(path: Path) -> tuple[list[str], np.ndarray]:
    """Reads the text form as gensim does: lines of bytes, split at spaces."""
    words, rows = [], []
    with path.open("rb") as file:
        count, width = map(int, file.readline().decode("utf8").split())
        for _ in range(count):
            word, *numbers = file.readline().decode("utf8").rstrip().split(" ")
            assert len(numbers) == width
            words.append(word)
            rows.append(numbers)
    return words, np.array(rows, np.float32)


def test_names_survive_a_reader_of_the_text_form(tmp_path):
    vectors = write(tmp_path / "entities.txt")
    words, found = plain_reader(tmp_path / "entities.txt")
    assert [unquote(word) for word in words] == NAMES and len(set(words)) == len(NAMES)
    assert np.array_equal(found, vectors)


def test_names_survive_gensim(tmp_path):
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    vectors = write(tmp_path / "entities.txt")
    found = models.KeyedVectors.load_word2vec_format(str(tmp_path / "entities.txt"))
    assert [unquote(word) for word in found.index_to_key] == NAMES
    for name, vector in zip(NAMES, vectors, strict=True):
        assert np.array_equal(found[word_of(name)], vector)


def test_a_faiss_index_finds_the_nearest_rows(answered_run, tmp_path):
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` is not installed")
    import pyarrow.parquet

    rows = rows_of(answered_run)
    export_other(rows, tmp_path / "index", "faiss")
    export_other(rows, tmp_path / "npz", "npz")
    vectors = np.load(tmp_path / "npz" / "mocme.npz")["entities"]
    index = faiss.read_index(str(tmp_path / "index" / "entities.faiss"))
    assert (index.ntotal, index.d) == vectors.shape
    _, found = index.search(vectors[:7], 3)
    expected = np.argsort(np.square(vectors[:7, None] - vectors).sum(-1), axis=1, kind="stable")[:, :3]
    assert np.array_equal(found, expected)
    names = pyarrow.parquet.read_table(tmp_path / "index" / "entities.parquet")["name"].to_pylist()
    assert names == rows.dataset.entity_names()
    assert (tmp_path / "index" / "relations.parquet").is_file() and (tmp_path / "index" / "bundle.json").is_file()
