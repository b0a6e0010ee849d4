"""A run's checkpoint to a bundle, part by part; a killed export goes on where it stopped.

Never more than one part is in memory. The bundle appears as a whole: it is built beside its place (layout.staging).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist import __version__
from mocme_dist.data.files import read_json, write_json
from mocme_dist.data.known import PARTS
from mocme_dist.data.progress import Progress
from mocme_dist.data.tensors import read_metadata, write_tensors
from mocme_dist.errors import DataError, DivergedError
from mocme_dist.evaluation.protocol import split_queries
from mocme_dist.partition import ShardPartition
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.calibration import CANDIDATES, calibrate
from mocme_dist.serving.layout import FORMAT, MANIFEST, file_entries, part_name, staging
from mocme_dist.serving.newcomer_map import fit_map
from mocme_dist.serving.rows import RunRows, model_state, source_of
from mocme_dist.serving.scorer import Asked, best_answers, not_competing

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20  # of a part's vectors
CALIBRATION_QUERIES = 4000


def export_bundle(rows: RunRows, target: Path, dtype: str = "float32", part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """Write the bundle of a checkpoint to `target`, replacing an earlier bundle there.

    Args:
        rows: the checkpoint.
        dtype: of the vectors on disk, float32 or float16.
        part_bytes: about how large a part's vectors are, and so how much memory the export takes.

    Returns:
        The manifest.

    Raises:
        ConfigError: `target` holds something else. LockedError: another export to it is running.
        DivergedError: a vector is not finite. StorageError: the disk is full or not writable.
    """
    width, size = rows.config.experts.width, np.dtype(dtype).itemsize
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
        manifest["modality_weights"] = _mean_weights(bundle)
        manifest["calibration"] = _calibration(bundle, rows)
        matrix, manifest["newcomers"] = fit_map(rows, bundle)
        if matrix is not None:
            write_tensors(folder / "newcomers.safetensors", {"matrix": matrix}, {})
        manifest["files"] = file_entries(folder)
        write_json(folder / MANIFEST, manifest)
    return manifest


def _is_done(folder: Path, part: int, pinned: str) -> bool:
    """Whether both files of a part stand there, made from the same source; files are whole or absent."""
    try:
        return all(read_metadata(folder / part_name(kind, part)).get("source") == pinned for kind in ("vectors", "modalities"))
    except (OSError, ValueError):
        return False


def _write_part(rows: RunRows, folder: Path, part: int, bounds: tuple[int, int], dtype: np.dtype[Any], views: bool, pinned: str) -> None:
    first, last = bounds
    n, M, D = last - first, len(rows.modalities), rows.config.experts.width
    vectors, weights = np.empty((n, D), dtype), np.empty((n, M), np.float32)
    directions = np.empty((M, n, D), np.int8) if views else None
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
    """int8 vectors with the directions of the given ones, each scaled by its largest number; 0 where absent.

    A cosine of two such vectors is off by a thousandth or so, for a quarter of the bytes.
    """
    largest = np.abs(modal_MnD).max(axis=-1, keepdims=True)
    scaled = modal_MnD * (127 / np.maximum(largest, np.finfo(np.float32).tiny))
    return np.where(present_Mn[..., None], np.rint(scaled), 0).astype(np.int8)


def _write_rest(rows: RunRows, folder: Path) -> None:
    """Relations, dense model, names and known facts."""
    write_tensors(folder / "relations.safetensors", {"phases": rows.phase_RC.numpy()}, {})
    dense = {name: np.ascontiguousarray(value.float().numpy()) for name, value in model_state(rows.saved).items()}
    write_tensors(folder / "dense.safetensors", dense, {})
    graph = rows.dataset.directory / "graph"
    names = ["entities.parquet", "relations.parquet", *(f"known_all_{part}.npy" for part in PARTS)]
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
        "width": config.experts.width,
        "gamma": config.rotate.gamma,
        "dtype": dtype,
        "part_rows": part_rows,
        "modalities": list(rows.modalities),
        "views": views,
        "raw_widths": rows.raw_widths,
        "config": config.model_dump(mode="json"),
        "features": _features(rows),
        "reflexive": _reflexive(dataset.triples("train")),
        "trained": {"step": rows.saved.step, "valid_mrr": rows.saved.manifest.get("metric"), "dataset": dataset.fingerprint},
    }


def _features(rows: RunRows) -> dict[str, Any]:
    """What pins the encoders of each modality: a new entity must meet the ones that made the others' features."""
    found: dict[str, Any] = {}
    for name in rows.modalities:
        if name == "structure":
            continue
        rows.dataset.bring(f"features/{name}/*.json")
        directory = rows.dataset.directory / "features" / name
        manifest = read_json(directory / "manifest.json")
        found[name] = {key: manifest[key] for key in ("encoder_hash", "dtype", "width")}
        if name == "numeric":
            found[name]["statistics"] = read_json(directory / "statistics.json")
    return found


def _reflexive(triples_T3: NDArray[np.int64]) -> list[int]:
    """Relations that join some entity to itself in train."""
    return sorted({int(r) for r in triples_T3[triples_T3[:, 0] == triples_T3[:, 2], 1]})


def _mean_weights(bundle: Bundle) -> dict[str, float]:
    """Mean weight of each modality over the entities that have it."""
    total, count = np.zeros(len(bundle.modalities)), np.zeros(len(bundle.modalities))
    for weight_nM in bundle.weights:
        total += weight_nM.sum(0, dtype=np.float64)
        count += (weight_nM > 0).sum(0)
    return dict(zip(bundle.modalities, (total / np.maximum(count, 1)).tolist(), strict=True))


def _calibration(bundle: Bundle, rows: RunRows) -> dict[str, Any] | None:
    """Fit probabilities on the development set; see calibration.py.

    The graph's known facts hold those of valid too, so a question's own answers of valid compete, and only they are right.
    """
    valid = rows.dataset.triples("valid")
    queries = split_queries(valid, CALIBRATION_QUERIES)
    if not len(queries.source):
        return None
    asked = Asked.of(bundle, queries.source, queries.relation, queries.direction)
    # Each question once, with all its answers in valid.
    keys = np.stack([queries.source, queries.relation, queries.direction], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    asked = asked.take(np.sort(first))
    right = _answers_in(valid, asked)
    left_out = [np.setdiff1d(part, own) for part, own in zip(not_competing(bundle, asked), right, strict=True)]
    best = best_answers(bundle, asked, left_out, CANDIDATES)
    there = best.id_Qk >= 0
    right_Qk = np.stack([np.isin(ids, own) for ids, own in zip(best.id_Qk, right, strict=True)])
    spread = lambda column: np.broadcast_to(column[:, None], there.shape)[there]  # noqa: E731
    rank = np.broadcast_to(np.arange(1.0, there.shape[1] + 1), there.shape)[there]
    return calibrate(
        best.score_Qk[there].astype(np.float64),
        rank,
        spread(asked.direction).astype(np.float64),
        right_Qk[there],
        spread(np.arange(len(there))),
    )


def _answers_in(triples_T3: NDArray[np.int64], asked: Asked) -> list[NDArray[np.int64]]:
    """The answers that some triples give to each question."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for head, relation, tail in np.asarray(triples_T3).tolist():
        found.setdefault((head, relation, 0), []).append(tail)
        found.setdefault((tail, relation, 1), []).append(head)
    keys = zip(asked.source.tolist(), asked.relation.tolist(), asked.direction.tolist(), strict=True)
    return [np.array(found.get(key, []), np.int64) for key in keys]
