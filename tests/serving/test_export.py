"""A bundle is what evaluation ranked with, cut into parts, whole or absent; other formats hold the same numbers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import PART_BYTES, config_of, rows_of

from mocme_dist.data import files
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import exchange
from mocme_dist.errors import ConfigError, DataError, DivergedError, LockedError
from mocme_dist.evaluation.metrics import rank_metrics
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving import bundle_format, export
from mocme_dist.serving import mapped_bundle as bundle_module
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle, to_directions
from mocme_dist.serving.export_formats import export_other
from mocme_dist.training import checkpoint
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.loop import restore

HASH = "0" * 64


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def plain_ranks(
    entities: np.ndarray, phases: np.ndarray, gamma: float, triples: np.ndarray, known: np.ndarray
) -> np.ndarray:
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
        worker = build_worker(config, open_dataset(config.data), comm)
        saved = Checkpoints(answered_run).find("auto", best=True)
        assert saved is not None
        restore(worker, saved)
        z_ED = worker.encode_rows().z_rD
        weights = worker.modality_weights
        phases = worker.model.relations.phase_RC.detach()
    assert len(bundle.vector_parts) == 4
    assert np.array_equal(np.concatenate(bundle.vector_parts), z_ED.numpy())
    assert np.array_equal(np.concatenate(bundle.weight_parts), weights.numpy())
    assert np.array_equal(bundle.phase_RC, phases.numpy())
    assert len(Bundle.open(bundle.directory, verify=True).vector_parts) == 4
    assert bundle.manifest["modality_weights"].keys() == {"structure", "text", "image", "numeric"}


def test_every_rank_can_be_recomputed_from_the_npz_with_numpy_alone(answered_run, tmp_path):
    rows = rows_of(answered_run)
    export_other(rows, tmp_path / "out", "npz")
    with np.load(tmp_path / "out" / "mocme.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {"entities", "phases", "gamma", "entity_names", "relation_names"}
    assert arrays["entity_names"].tolist() == rows.dataset.entity_names()
    assert arrays["relation_names"].tolist() == rows.dataset.relation_names()
    known = np.concatenate([rows.dataset.triples(split) for split in ("train", "valid", "test")])
    ranks = plain_ranks(
        arrays["entities"], arrays["phases"], float(arrays["gamma"]), rows.dataset.triples("test"), known
    )
    report = json.loads((answered_run / "metrics.json").read_text())
    assert rank_metrics(ranks) == pytest.approx({key: report[key] for key in rank_metrics(ranks)}, rel=1e-9)


def test_parquet_and_word2vec_hold_the_same_vectors(answered_run, bundle, tmp_path):
    import pyarrow.parquet

    rows = rows_of(answered_run)
    vectors, names = np.concatenate(bundle.vector_parts), rows.dataset.entity_names()
    export_other(rows, tmp_path / "parquet", "parquet")
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "entities.parquet")
    assert table["name"].to_pylist() == names and table["id"].to_pylist() == list(range(len(names)))
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors)
    assert table.schema.metadata[b"gamma"] == b"4.0"
    relations = pyarrow.parquet.read_table(tmp_path / "parquet" / "relations.parquet")
    assert np.array_equal(np.array(relations["phase"].to_pylist(), np.float32), bundle.phase_RC)
    export_other(rows, tmp_path / "text", "word2vec")
    first, *lines = (tmp_path / "text" / "entities.txt").read_text().splitlines()
    assert first == "60 8" and [line.split(" ")[0] for line in lines] == [name.replace(" ", "%20") for name in names]
    assert np.array_equal(np.array([line.split(" ")[1:] for line in lines], np.float32), vectors)


def test_a_killed_export_goes_on_where_it_stopped_and_gives_the_same_bytes(
    answered_run, bundle_dir, tmp_path, monkeypatch
):
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
    (tmp_path / ".tmp-bundle" / f".tmp-{files._HOST}-12345678-vectors-00002.safetensors").write_bytes(b"half")

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
    assert {part.dtype for part in half.vector_parts} == {np.dtype(np.float16)}
    np.testing.assert_allclose(
        np.concatenate(half.vector_parts), np.concatenate(Bundle.open(bundle_dir).vector_parts), rtol=1e-3, atol=1e-4
    )


def test_what_is_not_ours_is_refused_and_left_untouched(answered_run, tmp_path):
    rows = rows_of(answered_run)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty and not an export"):
        export_bundle(rows, tmp_path / "thesis")
    with pytest.raises(ConfigError, match="is a file or a link"):
        export_bundle(rows, tmp_path / "file")
    export_other(rows, tmp_path / "npz", "npz")
    with pytest.raises(ConfigError, match="holds an export of format npz, not bundle"):
        export_bundle(rows, tmp_path / "npz")
    with pytest.raises(DataError, match="format npz, expected bundle"):
        Bundle.open(tmp_path / "npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "npz", "thesis"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_exports_to_one_folder_do_not_meet(answered_run, tmp_path):
    (tmp_path / ".tmp-bundle.lock").write_text("")  # of one that was killed: it holds nothing
    with (
        bundle_format.staging(tmp_path / "bundle", "bundle", {}),
        pytest.raises(LockedError, match="another export to it is running"),
    ):
        export_bundle(rows_of(answered_run), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_while_an_export_is_replaced_leaves_the_old_one_or_the_new_one(bundle_dir, tmp_path, monkeypatch, swaps):
    """Killed before each rename; where two folders cannot be swapped, the old one is read where it was moved to."""
    old, new = "old", "new"
    for kill_at in range(3):
        target, folder = tmp_path / f"{kill_at}" / "bundle", tmp_path / f"{kill_at}" / ".tmp-bundle"
        for place, mark in ((target, old), (folder, new)):
            shutil.copytree(bundle_dir, place)
            (place / "mark").write_text(mark)
        rename, count = Path.rename, iter(range(10))

        def killed(self, other, rename=rename, count=count, kill_at=kill_at):
            if next(count) == kill_at:
                raise KeyboardInterrupt
            return rename(self, other)

        monkeypatch.setattr(Path, "rename", killed)
        monkeypatch.setattr(bundle_format, "exchange", exchange if swaps else lambda *_: False)
        with contextlib.suppress(KeyboardInterrupt):
            bundle_format._put(folder, target)
        monkeypatch.undo()
        found = Bundle.open(target).directory
        assert (found / "mark").read_text() == (new if swaps or kill_at == 2 else old)
        with bundle_format.staging(target, "bundle", {}) as again:
            shutil.copytree(bundle_dir, again, dirs_exist_ok=True)
        assert [path.name for path in target.parent.iterdir()] == ["bundle"] and not (target / "mark").exists()


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


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["vectors-00001.safetensors", "dense.safetensors", "entities.parquet", "known_all_targets.npy"]
)
def test_a_flipped_bit_is_found_when_a_bundle_is_opened(bundle_dir, tmp_path, name):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    Bundle.open(copy)
    flip(copy / name)
    with pytest.raises(DataError, match=rf"{name}: sha256 differs from the manifest's.*export again"):
        Bundle.open(copy)


def test_a_part_of_another_bundle_is_refused(answered_run, bundle_dir, tmp_path):
    """The same model in parts of the same size whose vectors differ: the first two parts, the other way round."""
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    shutil.copyfile(bundle_dir / "vectors-00001.safetensors", copy / "vectors-00000.safetensors")
    with pytest.raises(DataError, match=r"vectors-00000.*sha256 differs"):
        Bundle.open(copy)


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest of a bundle and let it name the files as they are now, as a stranger can."""
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"] = bundle_format.file_entries(folder)
    (folder / "bundle.json").write_text(json.dumps({**manifest, **changes}))


def test_an_id_out_of_range_is_refused_whatever_the_hashes_say(bundle_dir, tmp_path):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    targets = np.load(copy / "known_all_targets.npy")
    for wrong in (60, -1):
        np.save(copy / "known_all_targets.npy", np.where(np.arange(len(targets)) == 3, wrong, targets))
        rewrite(copy)
        with pytest.raises(DataError, match=rf"targets: {wrong} found, expected numbers from 0 to 59"):
            Bundle.open(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_entities": "60"}, r"num_entities: Input should be a valid integer, found '60'; export again"),
        ({"num_entities": 10**15}, r"files: lacks vectors-"),
        ({"modalities": ["../x"]}, r"modalities.0: String should match pattern .*, found '../x'"),
        ({"reflexive": [4]}, r"reflexive names relation 4 of 4"),
        ({"gamma": float("nan")}, r"gamma: Input should be a finite number"),
        ({"files": {"../../x": {"bytes": 1, "sha256": HASH}}}, r"files.*: String should match pattern"),
        ({"files": {"x": {"bytes": -1, "sha256": HASH}}}, r"files.x.bytes: .*greater than or equal to 0"),
        ({"files": []}, r"files: Input should be a valid dictionary"),
    ],
)
def test_a_manifest_that_says_something_impossible_is_one_line(bundle_dir, tmp_path, changes, message):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    rewrite(copy, **changes)
    with pytest.raises(DataError, match=message) as error:
        Bundle.open(copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_open_bundle_answers_from_one_model_when_it_is_replaced(answered_run, bundle_dir, tmp_path):
    """Everything is mapped when it is opened: another model in its place changes nothing, however late it is asked."""
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    names = rows_of(answered_run).dataset.entity_names()
    opened = Bundle.open(copy)
    shutil.rmtree(copy)
    copy.mkdir()
    assert opened.predict(names[5], "near", k=3)["id"].tolist()
    for attribute in ("vector_parts", "weight_parts", "view_parts"):
        assert all(map(np.array_equal, getattr(opened, attribute), getattr(Bundle.open(bundle_dir), attribute)))
    assert np.isfinite(opened.phase_RC).all() and opened.dense and len(opened.known.targets)


def test_a_bundle_replaced_while_it_is_being_opened_is_opened_anew(answered_run, bundle_dir, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    export_bundle(rows_of(answered_run), target, "float16", part_bytes=PART_BYTES // 2)
    other = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    mapped, map_tensors = [], bundle_module.map_tensors

    def late(path):
        mapped.append(path)
        if len(mapped) == 3:
            bundle_format._put(other, target)
        return map_tensors(path)

    monkeypatch.setattr(bundle_module, "map_tensors", late)
    assert {part.dtype for part in Bundle.open(target).vector_parts} == {np.dtype(np.float32)}


def test_directions_keep_cosines_and_mark_what_is_absent():
    gen = np.random.default_rng(0)
    vectors = gen.normal(size=(2, 50, 64)).astype(np.float32)
    present = gen.random((2, 50)) < 0.8
    packed = to_directions(vectors, present).astype(np.float64)
    assert not packed[~present].any()
    cosine = (packed * vectors).sum(-1) / (np.linalg.norm(packed, axis=-1) * np.linalg.norm(vectors, axis=-1)).clip(
        1e-9
    )
    assert cosine[present].min() > 0.9995


def test_a_checkpoint_of_another_model_is_refused(answered_run):
    rows = rows_of(answered_run)
    from mocme_dist.errors import CheckpointError

    config = rows.config.model_copy(update={"experts": rows.config.experts.model_copy(update={"num_experts": 3})})
    with pytest.raises(CheckpointError, match=r"experts.num_experts 2 -> 3"):
        export.RunRows(config, Dataset.open(rows.dataset.directory), rows.saved)


def test_rows_of_any_range_come_from_whatever_parts_hold_them(answered_run):
    saved = rows_of(answered_run).saved
    whole = checkpoint.read_rows(saved, 0, 60)
    assert torch.equal(torch.cat([checkpoint.read_rows(saved, a, b) for a, b in ((0, 7), (7, 40), (40, 60))]), whole)
    from mocme_dist.errors import CheckpointError

    with pytest.raises(CheckpointError, match="parts cover"):
        checkpoint.read_rows(saved, 50, 61)


def test_layout_names_every_file_of_a_bundle(bundle_dir):
    named = bundle_format.__doc__ or ""
    for name in (path.name for path in bundle_dir.iterdir()):
        assert re.sub(r"known_(all|train|valid|test)_.*", "known_", name.split("-")[0].split(".")[0]) in named
