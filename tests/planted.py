"""A small graph whose evidence is computed by brute force, term by term, from the definitions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.spaces import feature_source, vector_space
from mocme_dist.evidence.terms import Evidence
from mocme_dist.evidence.units import SCALE, to_units
from mocme_dist.kernels.evidence import evidence_kernels
from mocme_dist.parallel.comm import Comm
from mocme_dist.partition import RowPartition

E, R, D, F = 53, 3, 10, 6
NEIGHBOURS, HOLDERS, ANSWERS, BETA = 4, 20, 3, 15.0


class Planted(NamedTuple):
    """Triples of train and test, features (E, F) with who has them, vectors (E, D), phases (R, C)."""

    train: np.ndarray
    test: np.ndarray
    feature_EF: torch.Tensor
    present_E: torch.Tensor
    z_ED: torch.Tensor
    phase_RC: torch.Tensor


def planted(seed: int = 0) -> Planted:
    """Few sources, so that queries have several answers.

    Entities that train never shows and that are equal, so that they tie.
    """
    gen, torch_gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    triples = np.stack([gen.integers(15, size=260), gen.integers(R, size=260), gen.integers(44, size=260)], 1)
    triples[::2] = triples[::2, ::-1] % np.array([44, R, 15])
    triples = np.unique(triples, axis=0)[gen.permutation(len(np.unique(triples, axis=0)))]
    feature_EF, z_ED = torch.randn(E, F, generator=torch_gen), torch.randn(E, D, generator=torch_gen)
    for copies in ([3, 30, 52], [44, 46, 47, 49]):
        feature_EF[copies], z_ED[copies] = feature_EF[copies[0]].clone(), z_ED[copies[0]].clone()
    present_E = torch.rand(E, generator=torch_gen) < 0.8
    present_E[44:52] = True
    unseen = np.stack([np.arange(6), np.arange(6) % R, np.full(6, 46)], 1)
    test = np.concatenate([triples[:40], unseen])
    return Planted(triples[40:], test, feature_EF, present_E, z_ED, torch.rand(R, D // 2, generator=torch_gen) * 6 - 3)


def evidence_of(data: Planted, comm: Comm, compiled: bool = False) -> Evidence:
    """This rank's evidence: features as "text", the vectors as "model", and shared facts; with kernels if compiled."""
    kernels = evidence_kernels(1) if compiled else None
    first, last = RowPartition(E, comm.world_size).bounds(comm.rank)
    facts = Facts(KnownAnswers.build(data.train, R), E)

    def gather(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        present = data.present_E[first:last][rows]
        return data.feature_EF[first:last][rows] * present[:, None], present

    spaces = [
        feature_source("text", gather, last - first, comm, BETA).fill(0, last - first, comm.device),
        vector_space("model", data.z_ED[first:last], BETA),
    ]
    shared = SharedFacts(facts, first, last, HOLDERS, ANSWERS, kernels)
    return Evidence(facts, spaces, shared, first, last - first, NEIGHBOURS, BETA, comm, kernels)


def brute_force(data: Planted, queries: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """(Q, E) of each term from its definition, one entity at a time."""
    facts = {(0, int(h), int(r), int(t)) for h, r, t in data.train} | {
        (1, int(t), int(r), int(h)) for h, r, t in data.train
    }
    answers: dict[tuple[int, int, int], set[int]] = {}
    for direction, source, relation, target in facts:
        answers.setdefault((source, relation, direction), set()).add(target)
    mean = data.feature_EF[data.present_E].double().mean(0)
    text = to_units((data.feature_EF.double() - mean).numpy()) * data.present_E.numpy()[:, None]
    dense = {"text": text.astype(float), "model": to_units(data.z_ED.numpy()).astype(float)}
    sparse = _sparse_rows(facts)
    out: dict[str, np.ndarray] = {}
    for number, query in enumerate(queries):
        source, relation, direction = query
        known = sorted(answers.get(query, ()))
        with_place = [x for x in range(E) if answers.get((x, relation, direction)) and x != source]
        for name, units in dense.items():
            there = [x for x in with_place if units[x].any()] if units[source].any() else []
            cosine = {x: 1 - np.square(units[source] - units[x]).sum() / 2 / SCALE**2 for x in there}
            _put(out, f"votes:{name}", number, _votes(cosine, answers, relation, direction))
            total = units[known].sum(0) if known else np.zeros(units.shape[1])
            size = np.sqrt(np.square(total).sum())
            likeness = units @ np.rint(total * SCALE / size) / SCALE**2 if size else np.zeros(E)
            _put(out, f"likeness:{name}", number, likeness)
        has_facts = any(end == source for _, end, _, _ in facts)
        match = np.zeros(E) if has_facts else dense["text"] @ dense["text"][source] / SCALE**2
        match[source] = 0
        _put(out, "match:text", number, match)
        near = {x: _cosine(sparse[source], sparse[x]) for x in with_place}
        _put(out, "votes:facts", number, _votes({x: c for x, c in near.items() if c > 0}, answers, relation, direction))
        _put(out, "likeness:facts", number, _fact_likeness(sparse, known[:ANSWERS], source, relation, direction))
        _put(out, "rules", number, _rules(facts, source, relation, direction))
        count = [len(answers.get((c, relation, 1 - direction), ())) for c in range(E)]
        _put(out, "frequency", number, np.log(np.array(count) + 0.02) - np.log(0.02))
    return out


def _put(out: dict[str, np.ndarray], name: str, query: int, value: np.ndarray) -> None:
    out.setdefault(name, np.zeros((0, E)))
    assert len(out[name]) == query
    out[name] = np.concatenate([out[name], value[None]])


def _rules(facts: set[tuple[int, int, int, int]], source: int, relation: int, direction: int) -> np.ndarray:
    best = np.zeros(E)
    for other in {(d, r) for d, s, r, _ in facts if s == source} - {(direction, relation)}:
        pairs = {(s, t) for d, s, r, t in facts if (d, r) == other}
        both = sum((direction, s, relation, t) in facts for s, t in pairs)
        for s, t in pairs:
            if s == source:
                best[t] = max(best[t], both / (len(pairs) + 5))
    return np.log(best + 0.01) - np.log(0.01)


def _votes(cosine: dict[int, float], answers: dict, relation: int, direction: int) -> np.ndarray:
    nearest = sorted(cosine, key=lambda x: (-cosine[x], x))[:NEIGHBOURS]
    votes = np.zeros(E)
    if nearest:
        weights = np.array([math.exp(BETA * (cosine[x] - cosine[nearest[0]])) for x in nearest])
        for x, weight in zip(nearest, weights / weights.sum() * max(cosine[nearest[0]], 0), strict=True):
            for c in answers[(x, relation, direction)]:
                votes[c] += weight
    return np.log(votes + 1e-3) - np.log(1e-3)


def _sparse_rows(facts: set[tuple[int, int, int, int]]) -> list[dict[tuple, float]]:
    holders: dict[tuple, int] = {}
    for direction, _, relation, target in facts:
        holders[(direction, relation, target)] = holders.get((direction, relation, target), 0) + 1
    rows: list[dict[tuple, float]] = [{} for _ in range(E)]
    for direction, source, relation, target in facts:
        column = (direction, relation, target)
        if holders[column] <= HOLDERS:
            rows[source][column] = math.log(E / holders[column])
    return rows


def _cosine(a: dict[tuple, float], b: dict[tuple, float]) -> float:
    shared = sum(weight * b[column] for column, weight in a.items() if column in b)
    return shared / math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values())) if shared else 0.0


def _fact_likeness(sparse: list, known: list[int], source: int, relation: int, direction: int) -> np.ndarray:
    mean: dict[tuple, float] = {}
    for a in known:
        size = math.sqrt(sum(w * w for w in sparse[a].values()))
        for column, weight in sparse[a].items():
            if column != (1 - direction, relation, source):
                mean[column] = mean.get(column, 0.0) + weight / size
    return np.array([_cosine(mean, sparse[c]) for c in range(E)])
