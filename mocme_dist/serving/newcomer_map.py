"""Where an entity without structure belongs: a linear map from what its modalities say to the whole vector.

Training shows the model every entity with its structure, so a vector without it lies off. The map is a ridge
regression from the modalities' own vectors to the fused one, over a sample of the entities that were trained. Whether
it is used is decided on others of them: their facts are ranked by the plain vector without structure and by the
mapped one, and the better stays. (Their structure has shaped the answers' vectors, so both figures flatter; an honest
one needs entities held out of training, see tools/experiments/inductive.py.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.kernel import distances
from mocme_dist.serving.rows import RunRows
from mocme_dist.serving.scorer import Asked, rotated

SAMPLE = 20_000  # entities; ids are a random permutation, so the first ones are a random sample
QUESTIONS = 1000
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal
_CHECKED = 5  # one entity of so many is not fitted on
Floats = NDArray[np.float64]


def inputs_of(modal_MnD: NDArray[np.float32], present_Mn: NDArray[np.bool_], structure: int) -> Floats:
    """(n, (M - 1) (D + 1) + 1) what the other modalities say, which of them are there, and a constant."""
    others = [m for m in range(len(modal_MnD)) if m != structure]
    parts = [modal_MnD[m] * present_Mn[m][:, None] for m in others] + [present_Mn[m][:, None] for m in others]
    return np.concatenate([*parts, np.ones((modal_MnD.shape[1], 1))], axis=1).astype(np.float64)


def fit_map(rows: RunRows, bundle: Bundle) -> tuple[NDArray[np.float32] | None, dict[str, Any]]:
    """The map of a checkpoint and what was measured; None where there is none to fit, or the plain vectors do better.

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
    rank = lambda vectors: _reciprocal_rank(bundle, triples, ids[checked], vectors[checked])  # noqa: E731
    report = {"entities": len(ids), "plain_mrr": rank(plain), "map_mrr": rank(mapped)}
    report |= {"plain_distance": _distance(plain[checked], whole[checked]), "map_distance": float(min(off))}
    report["used"] = bool(report["map_mrr"] > report["plain_mrr"])
    return (matrix.astype(np.float32) if report["used"] else None), report


def _sample(rows: RunRows) -> tuple[Floats, NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Inputs, vectors without structure, whole vectors and ids of a sample of entities that have another modality."""
    last = min(rows.dataset.num_entities, -(-SAMPLE // rows.block_rows) * rows.block_rows)
    structure = rows.modalities.index("structure")
    found = []
    for block, bare in zip(rows.blocks(0, last), rows.blocks(0, last, hide="structure"), strict=True):
        present_Mn = block.weight_nM.numpy().T > 0
        has = np.delete(present_Mn, structure, axis=0).any(0)
        x = inputs_of(block.modal_MnD.numpy(), present_Mn, structure)
        found.append((x[has], bare.z_nD.numpy()[has], block.z_nD.numpy()[has], np.arange(block.first, block.last)[has]))
    x, plain, whole, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    return x, plain, whole, ids


def _ridge(x: Floats, y: NDArray[np.float32], ridge: float) -> Floats:
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    return np.asarray(np.linalg.solve(gram, x.T @ y), dtype=np.float64)


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Mean RotatE distance of vectors."""
    C = a.shape[1] // 2
    square = np.square(a - b)
    return float(np.sqrt(square[:, :C] + square[:, C:]).sum(1).mean())


def _reciprocal_rank(bundle: Bundle, triples_T3: NDArray[np.int64], ids: NDArray[np.int64], vector_nD: NDArray[np.float32]) -> float:
    """MRR of train facts of some entities, asked by the given vectors in place of their own, known answers left out.

    Candidates are the first part of the bundle: ids are random, so it is a sample, and enough to compare two vectors.
    """
    rows_nD, last = bundle.vectors[0], len(bundle.vectors[0])
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
