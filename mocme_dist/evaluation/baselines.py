"""Rankings without a model, to hold figures against: by frequency, and by rules that copy facts of other relations.

Both count training facts, rank every entity, filter known answers and give ties their mean, as the ranking of a model
does. On graphs whose relations have inverses that were not removed, the rules alone reach high figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import Queries
from mocme_dist.evidence.facts import Facts, Integers
from mocme_dist.evidence.rules import find_rules, look_up, rule_scores
from mocme_dist.evidence.votes import Asked

# Queries that are ranked at once.
_QUERIES = 4096


def frequency_ranks(queries: Queries, known: KnownAnswers, facts: Facts) -> NDArray[np.float64]:
    """(Q,) filtered ranks by the number of training facts in which a candidate answers the relation and direction."""
    rank_Q = np.zeros(len(queries.source))
    place_Q = 2 * queries.relation + queries.direction
    order = np.argsort(place_Q, kind="stable")
    places, starts = np.unique(place_Q[order], return_index=True)
    for place, low, high in zip(places, starts, [*starts[1:], len(order)], strict=True):
        ids, counts = facts.answers(int(place))
        counts_E = np.zeros(facts.num_entities, np.int64)
        counts_E[ids] = counts
        ascending = np.sort(counts)
        for start in range(low, high, _QUERIES):
            at = order[start : min(start + _QUERIES, high)]
            target_q = counts_E[queries.target[at]]
            above_q = len(ascending) - np.searchsorted(ascending, target_q, "right")
            equal_q = len(ascending) - above_q - np.searchsorted(ascending, target_q, "left")
            equal_q = np.where(target_q == 0, facts.num_entities - len(ids), equal_q)
            query, candidate = _not_competing(queries.take(at), known)
            rank_Q[at] = _filtered(above_q, equal_q, target_q, query, counts_E[candidate])
    return rank_Q


def rule_ranks(queries: Queries, known: KnownAnswers, facts: Facts) -> NDArray[np.float64]:
    """(Q,) filtered ranks by the most confident rule that leads from a training fact of the source to a candidate."""
    rules, rank_Q = find_rules(facts), np.zeros(len(queries.source))
    for start in range(0, len(rank_Q), _QUERIES):
        some = queries.take(slice(start, start + _QUERIES))
        asked = Asked(some.source, 2 * some.relation + some.direction)
        key, score = rule_scores(rules.code, rules.confidence, asked, facts)

        count, owner = len(some.source), key // facts.num_entities
        target_q = look_up(key, score, np.arange(count) * facts.num_entities + some.target)
        above_q = np.bincount(owner[score > target_q[owner]], minlength=count)
        equal_q = np.bincount(owner[score == target_q[owner]], minlength=count)
        equal_q = np.where(target_q == 0, facts.num_entities - np.bincount(owner, minlength=count), equal_q)
        query, candidate = _not_competing(some, known)
        rank_Q[start : start + count] = _filtered(
            above_q, equal_q, target_q, query, look_up(key, score, query * facts.num_entities + candidate)
        )
    return rank_Q


def _not_competing(queries: Queries, known: KnownAnswers) -> tuple[Integers, Integers]:
    """Distinct pairs (query, entity): known answers, and the target."""
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    query = np.repeat(np.arange(len(queries.source)), np.diff(offsets))
    other = targets != queries.target[query]
    everyone = np.arange(len(queries.source))
    return np.concatenate([query[other], everyone]), np.concatenate([targets[other], queries.target])


def _filtered(
    above_q: Integers, equal_q: Integers, target_q: NDArray[Any], query: Integers, score: NDArray[Any]
) -> NDArray[np.float64]:
    """Ranks from counts over all entities, once the scores of the pairs that do not compete are taken back."""
    count = len(target_q)
    above_q = above_q - np.bincount(query[score > target_q[query]], minlength=count)
    equal_q = equal_q - np.bincount(query[score == target_q[query]], minlength=count)
    return np.asarray(1 + above_q + equal_q / 2, np.float64)
