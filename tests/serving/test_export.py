"""A bundle is what evaluation ranked with, cut into parts, whole or absent; other formats hold the same numbers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import PART_BYTES, config_of, rows_of

from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import ConfigError, DataError, DivergedError, LockedError
from mocme_dist.evaluation.metrics import rank_metrics
from mocme_dist.parallel.comm import communication
from mocme_dist.serving import export, foreign, layout
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle, to_directions
from mocme_dist.serving.foreign import export_foreign
from mocme_dist.training import checkpoint
from mocme_dist.training.loop import restore
from mocme_dist.training.worker import Worker, open_dataset


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def plain_ranks(entities: np.ndarray, phases: np.ndarray, gamma: float, triples: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Filtered mean ranks of both directions of every triple by complex arithmetic, from arrays alone."""
    C = phases.shape[1]
    z = entities[:, :C].astype(np.complex128) + 1j * entities[:, C:]
    ranks = []
    for h, r, t in triples.tolist():
        for source, target, sign, column in ((h, t, 1, 2), (t, h, -1, 0)):
            score = gamma - np.abs(z[source] * np.exp(sign * 1j * phases[r].astype(np.float64)) - z).sum(1)
            same = (known[:, 2 - column] == source) & (known[:, 1] == r)
            wanted = score[target]
            score[np.append(known[same, column], target)] = -np.inf
            ranks.append(1 + (score > wanted).sum() + (score == wanted).sum() / 2)
    return np.array(ranks)


def test_vectors_and_weights_are_those_that_evaluation_ranks_with(answered_run, bundle):
    config = config_of(answered_run)
    with communication(60) as comm:
        worker = Worker(config, open_dataset(config), comm)
        saved = checkpoint.find(answered_run / "checkpoints", "auto", best=True)
        assert saved is not None
        restore(worker, saved)
        z_ED = worker.encode_rows().z_rD
        weights = worker.modality_weights
        phases = worker.model.relations.phase_RC.detach()
    assert len(bundle.vectors) == 4
    assert np.array_equal(np.concatenate(bundle.vectors), z_ED.numpy())
    assert np.array_equal(np.concatenate(bundle.weights), weights.numpy())
    assert np.array_equal(bundle.phase_RC, phases.numpy())
    bundle.verify()
    assert bundle.manifest["modality_weights"].keys() == {"structure", "text", "image", "numeric"}


def test_every_rank_can_be_recomputed_from_the_npz_with_numpy_alone(answered_run, tmp_path):
    rows = rows_of(answered_run)
    export_foreign(rows, tmp_path / "out", "npz")
    with np.load(tmp_path / "out" / "mocme.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {"entities", "phases", "gamma", "entity_names", "relation_names"}
    assert arrays["entity_names"].tolist() == rows.dataset.entity_names()
    assert arrays["relation_names"].tolist() == rows.dataset.relation_names()
    known = np.concatenate([rows.dataset.triples(split) for split in ("train", "valid", "test")])
    ranks = plain_ranks(arrays["entities"], arrays["phases"], float(arrays["gamma"]), rows.dataset.triples("test"), known)
    report = json.loads((answered_run / "metrics.json").read_text())
    assert rank_metrics(ranks) == pytest.approx({key: report[key] for key in rank_metrics(ranks)}, rel=1e-9)


def test_parquet_and_word2vec_hold_the_same_vectors(answered_run, bundle, tmp_path):
    import pyarrow.parquet

    rows = rows_of(answered_run)
    vectors, names = np.concatenate(bundle.vectors), rows.dataset.entity_names()
    export_foreign(rows, tmp_path / "parquet", "parquet")
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "entities.parquet")
    assert table["name"].to_pylist() == names and table["id"].to_pylist() == list(range(len(names)))
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors)
    assert table.schema.metadata[b"gamma"] == b"4.0"
    relations = pyarrow.parquet.read_table(tmp_path / "parquet" / "relations.parquet")
    assert np.array_equal(np.array(relations["phase"].to_pylist(), np.float32), bundle.phase_RC)
    export_foreign(rows, tmp_path / "text", "word2vec")
    first, *lines = (tmp_path / "text" / "entities.txt").read_text().splitlines()
    assert first == "60 8" and [line.split(" ")[0] for line in lines] == [name.replace(" ", "_") for name in names]
    assert np.array_equal(np.array([line.split(" ")[1:] for line in lines], np.float32), vectors)


def test_a_killed_export_goes_on_where_it_stopped_and_gives_the_same_bytes(answered_run, bundle_dir, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    write, written = export._write_part, []

    def killed(rows, folder, part, *rest):
        if part == 2:
            raise KeyboardInterrupt
        write(rows, folder, part, *rest)

    monkeypatch.setattr(export, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(rows_of(answered_run), target, part_bytes=PART_BYTES)
    assert not target.exists()

    def counted(rows, folder, part, *rest):
        written.append(part)
        write(rows, folder, part, *rest)

    monkeypatch.setattr(export, "_write_part", counted)
    export_bundle(rows_of(answered_run), target, part_bytes=PART_BYTES)
    assert written == [2, 3]
    assert hashes(target) == hashes(bundle_dir)
    # Another type is another source: nothing of the old parts may stay.
    export_bundle(rows_of(answered_run), target, "float16", part_bytes=PART_BYTES)
    assert written == [2, 3, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    half = Bundle.open(target)
    assert {part.dtype for part in half.vectors} == {np.dtype(np.float16)}
    np.testing.assert_allclose(np.concatenate(half.vectors), np.concatenate(Bundle.open(bundle_dir).vectors), rtol=1e-3, atol=1e-4)


def test_what_is_not_ours_is_refused_and_left_untouched(answered_run, tmp_path):
    rows = rows_of(answered_run)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty and not an export"):
        export_bundle(rows, tmp_path / "thesis")
    with pytest.raises(ConfigError, match="is a file or a link"):
        export_bundle(rows, tmp_path / "file")
    export_foreign(rows, tmp_path / "npz", "npz")
    with pytest.raises(ConfigError, match="holds an export of format npz, not bundle"):
        export_bundle(rows, tmp_path / "npz")
    with pytest.raises(DataError, match="format npz, expected bundle"):
        Bundle.open(tmp_path / "npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "npz", "thesis"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_exports_to_one_folder_do_not_meet(answered_run, tmp_path):
    (tmp_path / ".tmp-bundle").mkdir()
    with (tmp_path / ".tmp-bundle" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another export to it is running"):
            export_bundle(rows_of(answered_run), tmp_path / "bundle")


def test_a_vector_that_is_not_finite_stops_the_export(answered_run, tmp_path):
    rows = rows_of(answered_run)
    rows.model.experts.second_bias_LD[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="a vector is not finite"):
        export_bundle(rows, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "names"])
def test_a_damaged_bundle_says_what_is_wrong(bundle_dir, tmp_path, damage):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    part = copy / "vectors-00002.safetensors"
    if damage == "missing":
        part.unlink()
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:-4])
    elif damage == "manifest":
        (copy / "bundle.json").write_text('{"kind": "bundle", "format": 1}')
    else:
        (copy / "entities.parquet").unlink()
    with pytest.raises(DataError, match=r"not found|the manifest says|damaged"):
        Bundle.open(copy)


def test_a_flipped_bit_is_found_by_verify(bundle_dir, tmp_path):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    path = copy / "vectors-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"vectors-00001.*sha256 differs"):
        Bundle.open(copy).verify()


def test_directions_keep_cosines_and_mark_what_is_absent():
    gen = np.random.default_rng(0)
    vectors = gen.normal(size=(2, 50, 64)).astype(np.float32)
    present = gen.random((2, 50)) < 0.8
    packed = to_directions(vectors, present).astype(np.float64)
    assert not packed[~present].any()
    cosine = (packed * vectors).sum(-1) / (np.linalg.norm(packed, axis=-1) * np.linalg.norm(vectors, axis=-1)).clip(1e-9)
    assert cosine[present].min() > 0.9995


def test_a_checkpoint_of_another_model_is_refused(answered_run):
    rows = rows_of(answered_run)
    from mocme_dist.errors import CheckpointError

    config = rows.config.model_copy(update={"experts": rows.config.experts.model_copy(update={"num_experts": 3})})
    with pytest.raises(CheckpointError, match=r"num_experts  2 +3"):
        export.RunRows(config, Dataset.open(rows.dataset.directory), rows.saved)


def test_rows_of_any_range_come_from_whatever_parts_hold_them(answered_run):
    saved = rows_of(answered_run).saved
    whole = checkpoint.read_rows(saved, 0, 60)
    assert torch.equal(torch.cat([checkpoint.read_rows(saved, a, b) for a, b in ((0, 7), (7, 40), (40, 60))]), whole)
    from mocme_dist.errors import CheckpointError

    with pytest.raises(CheckpointError, match="parts cover"):
        checkpoint.read_rows(saved, 50, 61)


def test_layout_names_every_file_of_a_bundle(bundle_dir):
    named = layout.__doc__ or ""
    for name in (path.name for path in bundle_dir.iterdir()):
        assert name.split("-")[0].split("_all_")[0].split(".")[0] in named


@pytest.mark.parametrize("names", [["a_b", "c", "a b"], ["a b", "c", "a_b"], ["a  b", "c", "a b"]])
def test_word2vec_refuses_names_that_become_one_in_either_order(tmp_path, names):
    with pytest.raises(ConfigError, match="two names become 'a_b'"):
        foreign._write_text(tmp_path / "entities.txt", 3, 2, iter([names]), iter([np.zeros((3, 2), np.float32)]))
    assert list(tmp_path.iterdir()) == []
