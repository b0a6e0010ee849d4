"""Baselines against counting by hand."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.baselines import frequency_ranks, rule_ranks
from mocme_dist.evaluation.ranking import Queries, split_queries
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.rules import find_rules

E, R = 30, 4


def graph(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test: relation 1 is mostly the inverse of 0, relation 2 mostly implies 3, and the rest is noise."""
    gen = np.random.default_rng(seed)
    pairs = gen.integers(E - 2, size=(60, 2))
    parts = [np.insert(pairs[:30], 1, 0, 1), np.insert(pairs[:25, ::-1], 1, 1, 1), np.insert(pairs[30:], 1, 2, 1)]
    parts += [
        np.insert(pairs[35:], 1, 3, 1),
        np.insert(gen.integers(E - 2, size=(20, 2)), 1, gen.integers(R, size=20), 1),
    ]
    triples = gen.permutation(np.unique(np.concatenate(parts), axis=0))
    return triples[30:], np.concatenate([triples[:30], [[E - 1, 0, E - 2], [3, 1, E - 1]]])


def facts_of(train: np.ndarray) -> list[tuple[int, int, int]]:
    """(entity, place, neighbour) from both ends."""
    return [f for h, r, t in train.tolist() for f in ((h, 2 * r, t), (t, 2 * r + 1, h))]


def rank_by_hand(queries: Queries, known: KnownAnswers, scores: list[np.ndarray]) -> np.ndarray:
    ranks = []
    for (s, r, d, t), score in zip(zip(*(column.tolist() for column in queries), strict=True), scores, strict=True):
        competes = np.ones(E, bool)
        competes[known.lookup([s], [r], [d])[1]] = False
        competes[t] = False
        above, equal = (score[competes] > score[t]).sum(), (score[competes] == score[t]).sum()
        ranks.append(1 + above + equal / 2)
    return np.array(ranks)


@pytest.mark.parametrize("seed", range(3))
def test_baselines_rank_as_counting_by_hand_does(seed, monkeypatch):
    from mocme_dist.evaluation import baselines

    monkeypatch.setattr(baselines, "_QUERIES", 7)
    train, test = graph(seed)
    queries, facts = split_queries(test), Facts(KnownAnswers.build(train, R), E)
    known = KnownAnswers.build(np.concatenate([train, test]), R)
    each = list(zip(queries.source.tolist(), (2 * queries.relation + queries.direction).tolist(), strict=True))
    count = Counter((place, c) for _, place, c in facts_of(train))
    by_count = [np.array([count[place, c] for c in range(E)]) for _, place in each]
    found = frequency_ranks(queries, known, facts)
    assert np.array_equal(found, rank_by_hand(queries, known, by_count))

    places, pairs = defaultdict(set), defaultdict(set)
    for s, place, c in facts_of(train):
        places[s, c].add(place)
        pairs[place].add((s, c))
    confidence = {(a, b): len(pairs[a] & pairs[b]) / len(pairs[a]) for a in pairs for b in pairs if a != b}
    by_rule = [
        np.array(
            [max((confidence.get((a, place), 0.0) for a in places[s, c] - {place}), default=0.0) for c in range(E)]
        )
        for s, place in each
    ]
    found = rule_ranks(queries, known, facts)
    assert np.array_equal(found, rank_by_hand(queries, known, by_rule))
    assert (found == 1).mean() > 0.2
    rules = find_rules(facts)
    wanted = {8 * a + b: share for (a, b), share in confidence.items() if share}
    assert dict(zip(rules.code.tolist(), rules.confidence.tolist(), strict=True)) == pytest.approx(wanted)


def test_baselines_of_a_graph_without_facts_give_ties():
    facts = Facts(KnownAnswers.build(np.zeros((0, 3), np.int64), R), E)
    queries = Queries.both_directions(np.array([[0, 1, 2]]))
    known = KnownAnswers.build(np.array([[0, 1, 2]]), R)
    for rank in (frequency_ranks, rule_ranks):
        assert rank(queries, known, facts).tolist() == [E / 2 + 0.5] * 2
