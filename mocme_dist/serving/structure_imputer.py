"""A linear map from the other modalities of an entity to its whole vector, for entities without structure.

Training mostly shows the model entities with their structure, so a vector without it is biased. The map is a ridge
regression from the modalities' own vectors to the fused one, over a sample of the trained entities. It is used only if
it ranks facts of other trained entities better than the plain vectors without structure do. (The structure of these
entities has shaped the answers' vectors, so both figures are too good; honest ones need entities held out of training,
see tools/experiments/inductive.py.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.kernels.scan import distances
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.rows import RunRows
from mocme_dist.serving.scorer import Asked, rotated

SAMPLE = 20_000  # entities; ids are a random permutation, so the first ones are a random sample
QUESTIONS = 1000
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal
_CHECKED = 5  # every fifth entity is held out of the fit
Floats = NDArray[np.float64]


def inputs_of(modal_MnD: NDArray[np.float32], present_Mn: NDArray[np.bool_], structure: int) -> Floats:
    """Return (n, (M - 1) (D + 1) + 1): the other modalities' vectors, which of them are present, and a constant."""
    others = [m for m in range(len(modal_MnD)) if m != structure]
    parts = [modal_MnD[m] * present_Mn[m][:, None] for m in others] + [present_Mn[m][:, None] for m in others]
    return np.concatenate([*parts, np.ones((modal_MnD.shape[1], 1))], axis=1).astype(np.float64)


def fit_imputer(rows: RunRows, bundle: Bundle) -> tuple[NDArray[np.float32] | None, dict[str, Any]]:
    """Return the map of a checkpoint and its figures.

    No map if there is nothing to fit, or the plain vectors rank better.

    Args:
        rows: the checkpoint.
        bundle: its vectors.
    """
    if "structure" not in rows.modalities or len(rows.modalities) < 2:
        return None, {}
    x, plain, whole, ids = _sample(rows)
    checked = ids % _CHECKED == 0
    if checked.sum() < 2 or (~checked).sum() < 2:
        return None, {}
    fits = [_ridge(x[~checked], whole[~checked], ridge) for ridge in _RIDGES]
    off = [_distance(x[checked] @ matrix, whole[checked]) for matrix in fits]
    matrix = fits[int(np.argmin(off))]
    mapped = (x @ matrix).astype(np.float32)
    triples = rows.dataset.triples("train")
    plain_mrr, map_mrr = (_reciprocal_rank(bundle, triples, ids[checked], z[checked]) for z in (plain, mapped))
    report: dict[str, Any] = {"entities": len(ids), "plain_mrr": plain_mrr, "map_mrr": map_mrr}
    report |= {"plain_distance": _distance(plain[checked], whole[checked]), "map_distance": float(min(off))}
    report["used"] = bool(report["map_mrr"] > report["plain_mrr"])
    return (matrix.astype(np.float32) if report["used"] else None), report


def _sample(rows: RunRows) -> tuple[Floats, NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return inputs, vectors without structure, whole vectors and ids of entities with structure and one
    more modality.
    """
    last = min(rows.dataset.num_entities, -(-SAMPLE // rows.block_rows) * rows.block_rows)
    structure = rows.modalities.index("structure")
    found = []
    for block, bare in zip(rows.blocks(0, last), rows.blocks(0, last, hide="structure"), strict=True):
        present_Mn = block.weight_nM.numpy().T > 0
        # Without structure the whole vector equals the bare one, and would teach the map to change nothing.
        has = present_Mn[structure] & np.delete(present_Mn, structure, axis=0).any(0)
        x = inputs_of(block.modal_MnD.numpy(), present_Mn, structure)
        found.append((x[has], bare.z_nD.numpy()[has], block.z_nD.numpy()[has], np.arange(block.first, block.last)[has]))
    x, plain, whole, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    return x, plain, whole, ids


def _ridge(x: Floats, y: NDArray[np.float32], ridge: float) -> Floats:
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    return np.asarray(np.linalg.solve(gram, x.T @ y), dtype=np.float64)


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the mean RotatE distance between vectors."""
    C = a.shape[1] // 2
    square = np.square(a - b)
    return float(np.sqrt(square[:, :C] + square[:, C:]).sum(1).mean())


def _reciprocal_rank(
    bundle: Bundle, triples_T3: NDArray[np.int64], ids: NDArray[np.int64], vector_nD: NDArray[np.float32]
) -> float:
    """Return the filtered MRR of training facts of some entities, with the given vectors in place of their own.

    Candidates are the first part of the bundle: ids are random, so it is a random sample.
    """
    rows_nD, last = bundle.vector_parts[0], len(bundle.vector_parts[0])
    place = np.full(bundle.num_entities, -1)
    place[ids] = np.arange(len(ids))
    tails, heads = triples_T3[place[triples_T3[:, 0]] >= 0], triples_T3[place[triples_T3[:, 2]] >= 0][:, ::-1]
    asked = np.concatenate([np.insert(tails, 2, 0, axis=1), np.insert(heads, 2, 1, axis=1)])
    asked = asked[asked[:, 3] < last]
    asked = asked[np.sort(np.random.default_rng(0).permutation(len(asked))[:QUESTIONS])]
    if not len(asked):
        return 0.0
    source, relation, direction, answer = asked.T
    query_QD = rotated(bundle, Asked(source, relation, direction, vector_nD[place[source]]))
    offsets, known = bundle.known.lookup(source, relation, direction)
    ranks = np.empty(len(source))
    for q in range(len(source)):
        distance = distances(rows_nD, query_QD[q : q + 1])[0]
        wanted = distance[answer[q]]
        others = known[offsets[q] : offsets[q + 1]]
        distance[others[others < last]] = np.inf
        distance[answer[q]] = np.inf
        ranks[q] = 1 + (distance < wanted).sum() + (distance == wanted).sum() / 2
    return float((1 / ranks).mean())
