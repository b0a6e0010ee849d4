"""Exports a checkpoint to a bundle, part by part; a killed export continues where it stopped.

At most one part is in memory. The bundle is built beside its target and appears when it is complete
(bundle_format.staging).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mocme_dist import __version__
from mocme_dist.data.features import features_manifest
from mocme_dist.data.files import read_json, write_bytes, write_json
from mocme_dist.data.known import ARRAYS, KnownAnswers
from mocme_dist.data.labels import ENTITY_LABELS, RELATION_LABELS
from mocme_dist.data.progress import Progress
from mocme_dist.data.tensors import read_metadata, write_tensors
from mocme_dist.errors import CheckpointError, DataError, DivergedError
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.evidence.blend import FILE, Blend, load_blend, save_blend
from mocme_dist.evidence.spaces import sources_of
from mocme_dist.evidence.units import to_units
from mocme_dist.evidence.votes import LAST
from mocme_dist.parallel.comm import single
from mocme_dist.partition import ShardPartition
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.bundle_format import CARD, FORMAT, MANIFEST, file_entries, part_name, staging
from mocme_dist.serving.calibration import CANDIDATES, Candidates, calibrate, gap_to
from mocme_dist.serving.card import card, learning_curves
from mocme_dist.serving.evidence import FACTS, KIND, MODEL
from mocme_dist.serving.rows import RunRows, model_state, source_of
from mocme_dist.serving.scorer import Asked, answers_in, best_answers, not_competing
from mocme_dist.serving.structure_imputer import fit_imputer
from mocme_dist.training.build import feature_modalities
from mocme_dist.training.evidence_plan import numeric_statistics

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20  # of a part's vectors
CALIBRATION_QUERIES = 4000


def export_bundle(
    rows: RunRows, target: Path, dtype: str = "float32", part_bytes: int = PART_BYTES, selected: bool = True
) -> dict[str, Any]:
    """Write the bundle of a checkpoint to `target`, replacing an earlier bundle there.

    Args:
        rows: the checkpoint.
        dtype: type of the vectors on disk, float32 or float16.
        part_bytes: approximate size of a part's vectors, which determines the memory of the export.
        selected: whether the run's report is about this checkpoint, so that its metrics belong into the bundle.

    Returns:
        The manifest.

    Raises:
        ConfigError: `target` holds something else.
        LockedError: another export to it is running.
        DivergedError: a vector is not finite.
        StorageError: the disk is full or not writable.
    """
    width, size = rows.model.blocks.total, np.dtype(dtype).itemsize
    part_rows = max(1, part_bytes // (width * size * rows.block_rows)) * rows.block_rows
    views = len(rows.modalities) > 1
    source = source_of(rows, format=FORMAT, dtype=dtype, part_rows=part_rows)
    with staging(target, "bundle", source) as folder:
        (folder / MANIFEST).unlink(missing_ok=True)
        partition = ShardPartition(rows.dataset.num_entities, part_rows)
        pinned = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        with Progress("export", rows.dataset.num_entities, "entities") as progress:
            for part in range(partition.num_shards):
                first, last = partition.bounds(part)
                if not _is_done(folder, part, pinned):
                    _write_part(rows, folder, part, (first, last), np.dtype(dtype), views, pinned)
                progress.add(last - first)
        _write_rest(rows, folder)
        manifest = _manifest(rows, dtype, part_rows, views)
        write_json(folder / MANIFEST, {**manifest, "calibration": None, "files": {}})
        bundle = Bundle(folder, manifest)
        manifest["evidence"] = write_evidence(rows, folder, bundle)
        if manifest["evidence"]:
            bundle = Bundle(folder, manifest)
        manifest["modality_weights"] = _mean_weights(bundle)
        manifest["calibration"] = _calibration(bundle, rows)
        matrix, manifest["structure_imputer"] = fit_imputer(rows, bundle)
        if matrix is not None:
            write_tensors(folder / "structure_imputer.safetensors", {"matrix": matrix}, {})
        manifest["metrics"] = _metrics(rows) if selected else {}
        manifest["curves"] = _curves(rows)
        manifest["leakage"] = rows.dataset.manifest["report"].get("leakage", {})
        write_bytes(folder / CARD, card(manifest, rows.dataset.manifest).encode())
        manifest["files"] = file_entries(folder)
        write_json(folder / MANIFEST, manifest)
    return manifest


def _is_done(folder: Path, part: int, pinned: str) -> bool:
    """Return whether both files of a part exist and were made from the same source; files are complete or absent."""
    try:
        return all(
            read_metadata(folder / part_name(kind, part)).get("source") == pinned for kind in ("vectors", "modalities")
        )
    except (OSError, ValueError):
        return False


def _write_part(
    rows: RunRows, folder: Path, part: int, bounds: tuple[int, int], dtype: np.dtype[Any], views: bool, pinned: str
) -> None:
    first, last = bounds
    n, M, blocks = last - first, len(rows.modalities), rows.model.blocks
    vectors, weights = np.empty((n, blocks.total), dtype), np.empty((n, M), np.float32)
    directions = np.empty((M, n, blocks.width), np.int8) if views else None
    for block in rows.blocks(first, last):
        here = slice(block.first - first, block.last - first)
        with np.errstate(over="ignore"):
            vectors[here] = block.z_nD.numpy()
        if not np.isfinite(vectors[here]).all():
            raise DivergedError(
                f"entities {block.first:,} to {block.last:,}: a vector is not finite as {dtype}; "
                "export an earlier checkpoint (--step)" + (", or use --dtype float32" if dtype == np.float16 else "")
            )
        weights[here] = block.weight_nM.numpy()
        if directions is not None:
            directions[:, here] = to_directions(block.modal_MnD.numpy(), weights[here].T > 0)
    metadata = {"source": pinned, "first": str(first), "last": str(last)}
    write_tensors(folder / part_name("vectors", part), {"vectors": vectors}, metadata)
    tensors: dict[str, NDArray[Any]] = {"weights": weights} | ({"views": directions} if directions is not None else {})
    write_tensors(folder / part_name("modalities", part), tensors, metadata)


def to_directions(modal_MnD: NDArray[np.float32], present_Mn: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return int8 vectors with the directions of the given ones, each scaled by its largest number; 0 where absent.

    The cosine of two such vectors is off by about 0.001, for a quarter of the bytes.
    """
    largest = np.abs(modal_MnD).max(axis=-1, keepdims=True)
    scaled = modal_MnD * (127 / np.maximum(largest, np.finfo(np.float32).tiny))
    return np.where(present_Mn[..., None], np.rint(scaled), 0).astype(np.int8)


def _write_rest(rows: RunRows, folder: Path) -> None:
    """Write relations, dense model, names, labels and known facts."""
    write_tensors(folder / "relations.safetensors", {"phases": rows.phase_RC.numpy()}, {})
    dense = {name: np.ascontiguousarray(value.float().numpy()) for name, value in model_state(rows.saved).items()}
    write_tensors(folder / "dense.safetensors", dense, {})
    graph = rows.dataset.directory / "graph"
    names = ["entities.parquet", "relations.parquet"]
    names += [f"known_{name}_{array}.npy" for name in ("all", "train") for array in ARRAYS]
    names += [name for name in (ENTITY_LABELS, RELATION_LABELS) if (graph / name).is_file()]
    for split in ("valid", "test"):
        KnownAnswers.build(rows.dataset.triples(split), rows.dataset.num_relations).save(folder, split)
    for name in names:
        if not (graph / name).is_file():
            raise DataError(f"{(graph / name).absolute()}: file not found; pack the data set again")
        shutil.copyfile(graph / name, folder / name)


def _manifest(rows: RunRows, dtype: str, part_rows: int, views: bool) -> dict[str, Any]:
    config, dataset = rows.config, rows.dataset
    return {
        "format": FORMAT,
        "kind": "bundle",
        "mocme_dist": __version__,
        "num_entities": dataset.num_entities,
        "num_relations": dataset.num_relations,
        "width": rows.model.blocks.total,
        "blocks": rows.model.blocks.num,
        "gamma": config.rotate.gamma,
        "dtype": dtype,
        "part_rows": part_rows,
        "modalities": list(rows.modalities),
        "views": views,
        "raw_widths": rows.raw_widths,
        "config": config.model_dump(mode="json"),
        "features": _features(rows),
        "reflexive": dataset.reflexive(),
        "trained": {
            "step": rows.saved.step,
            "valid_mrr": rows.saved.manifest.get("metric"),
            "dataset": dataset.fingerprint,
        },
    }


def _features(rows: RunRows) -> dict[str, Any]:
    """Return what identifies the encoder of each modality.

    An unseen entity needs the one that made the others' features.
    """
    found: dict[str, Any] = {}
    for name in rows.modalities:
        if name == "structure":
            continue
        rows.dataset.bring(f"features/{name}/*.json")
        directory = rows.dataset.directory / "features" / name
        features = features_manifest(rows.dataset.directory, name)
        if features is None:
            raise DataError(f"{directory}: no finished features of this modality; extract them again")
        found[name] = features.model_dump(include={"encoder_hash", "dtype", "width"})
        imported = rows.dataset.modalities[name].get("vectors")
        if imported is not None:
            found[name]["imported"] = imported["file"]
        elif name == "numeric":
            found[name]["statistics"] = read_json(directory / "statistics.json")
    return found


def _mean_weights(bundle: Bundle) -> dict[str, float]:
    """Return the mean weight of each modality over the entities that have it."""
    total, count = np.zeros(len(bundle.modalities)), np.zeros(len(bundle.modalities))
    for weight_nM in bundle.weight_parts:
        total += weight_nM.sum(0, dtype=np.float64)
        count += (weight_nM > 0).sum(0)
    return dict(zip(bundle.modalities, (total / np.maximum(count, 1)).tolist(), strict=True))


def _calibration(bundle: Bundle, rows: RunRows) -> dict[str, Any] | None:
    """Fit probabilities on the development set; see calibration.py.

    Known facts include those of valid, so a question's own answers in valid compete again, and only they are right.
    """
    valid = rows.dataset.triples("valid")
    queries = split_queries(valid, CALIBRATION_QUERIES)
    if not len(queries.source):
        return None
    asked = Asked.of(bundle, queries.source, queries.relation, queries.direction)
    # Each question occurs once, with all its answers in valid.
    keys = np.stack([queries.source, queries.relation, queries.direction], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    asked = asked.take(np.sort(first))
    right = answers_in(bundle.known_in["valid"], asked)
    left_out = [np.setdiff1d(part, own) for part, own in zip(not_competing(bundle, asked), right, strict=True)]
    best = best_answers(bundle, asked, left_out, CANDIDATES)
    there = (best.id_Qk >= 0) & (best.score_Qk > LAST / 2)
    other_Qk = np.repeat(best.score_Qk[:, :1], there.shape[1], axis=1)
    other_Qk[:, 0] = best.score_Qk[:, 1] if there.shape[1] > 1 else -np.inf
    right_Qk = np.stack([np.isin(ids, own) for ids, own in zip(best.id_Qk, right, strict=True)])
    relation_Qk, direction_Qk, question_Qk = (
        np.broadcast_to(column[:, None], there.shape)
        for column in (asked.relation, asked.direction, np.arange(len(there)))
    )
    rank_Qk = np.broadcast_to(np.arange(1.0, there.shape[1] + 1), there.shape)
    return calibrate(
        Candidates(
            score=best.score_Qk[there].astype(np.float64),
            rank=rank_Qk[there],
            gap=gap_to(best.score_Qk, other_Qk)[there],
            relation=relation_Qk[there],
            direction=direction_Qk[there],
            right=right_Qk[there],
            question=question_Qk[there],
        )
    )


def write_evidence(rows: RunRows, folder: Path, bundle: Bundle) -> dict[str, Any] | None:
    """Write the blend of a checkpoint and its evidence.

    Args:
        rows: the checkpoint.
        folder: folder of the bundle, with its vectors.
        bundle: the bundle so far.

    Returns:
        The manifest's `evidence`, see `ServedEvidence`; None if the run has no blend of this checkpoint.
    """
    blend = _blend_of(rows)
    if blend is None:
        return None
    about, settings = _settings(blend), rows.config.evidence
    sources = []
    means = {}
    for name in feature_modalities(rows.config.modalities, rows.config.evidence.spaces, rows.dataset):
        gather = rows.store(name, 0, bundle.num_entities).gather
        betas = (settings.beta_coordinates, settings.beta)
        statistics = numeric_statistics(rows.dataset, name)
        found = sources_of(name, gather, bundle.num_entities, statistics, single(), betas)
        sources += [source for source in found if source.name in about["used"]]
        if statistics is None and name in about["used"]:
            # What is subtracted from the features; an unseen entity's are centred alike.
            means[name] = -found[0].change(np.zeros((1, found[0].width)))[0].astype(np.float32)
    about["spaces"] = {source.name: source.width for source in sources}
    about["betas"] = {**{source.name: source.beta for source in sources}, MODEL: settings.beta, FACTS: settings.beta}
    if MODEL in about["used"]:
        about["spaces"][MODEL] = bundle.width
    for part, vectors_nD in enumerate(bundle.vector_parts):
        first, last = bundle.partition.bounds(part)
        units = {source.name: source.fill(first, last, torch.device("cpu")).unit_rF.numpy() for source in sources}
        if MODEL in about["used"]:
            units[MODEL] = to_units(np.asarray(vectors_nD, np.float32))
        write_tensors(folder / part_name(KIND, part), units, {})
    if means:
        write_tensors(folder / "evidence_means.safetensors", means, {})
    save_blend(folder / FILE, _kept(blend, about.pop("used")))
    return about


def _metrics(rows: RunRows) -> dict[str, Any]:
    """Return the test metrics of the run's report, or nothing if there is no report."""
    directory = RunDirectory(rows.config.run.dir)
    report = (directory.read_report() or {}) if directory.fetch_file(directory.metrics) else {}
    return report if report.get("split") == "test" else {}


def _curves(rows: RunRows) -> dict[str, Any]:
    """Return the curves of the run's training."""
    directory = RunDirectory(rows.config.run.dir)
    path = directory.curve
    return learning_curves(path) if directory.fetch_file(path) else {}


def _blend_of(rows: RunRows) -> Blend | None:
    """Return the run's blend if it belongs to this checkpoint."""
    directory = RunDirectory(rows.config.run.dir)
    path = directory.blend
    if not directory.fetch_file(path):
        return None
    try:
        blend = load_blend(path)
    except CheckpointError as error:
        log.warning("the bundle answers by the model alone: %s", error)
        return None
    if blend.step != rows.saved.step:
        log.warning(
            "the bundle answers by the model alone: %s is of step %d, the checkpoint of step %d",
            path,
            blend.step,
            rows.saved.step,
        )
        return None
    return blend


def _settings(blend: Blend) -> dict[str, Any]:
    """Return the settings that answers need, and the spaces with a weight at any place."""
    kept = {key: blend.settings[key] for key in ("neighbours", "max_holders", "max_answers")}
    used = {
        term.split(":", 1)[1]
        for term, weight_P in zip(blend.terms, blend.weight_PF.T, strict=True)
        if weight_P.any() and ":" in term
    }
    return {**kept, "used": {name for name in used if name in _spaces(blend)}}


def _spaces(blend: Blend) -> set[str]:
    return {term.split(":", 1)[1] for term in blend.terms if term.startswith("votes:")}


def _kept(blend: Blend, used: set[str]) -> Blend:
    """Return the blend without the terms of unused spaces."""
    gone = {f"{kind}:{name}" for kind in ("votes", "likeness", "match") for name in _spaces(blend) - used}
    columns = [at for at, term in enumerate(blend.terms) if term not in gone]
    tables = [np.ascontiguousarray(table[:, columns]) for table in (blend.weight_PF, blend.without_frequency_PF)]
    terms = tuple(blend.terms[at] for at in columns)
    return blend._replace(terms=terms, weight_PF=tables[0], without_frequency_PF=tables[1])
