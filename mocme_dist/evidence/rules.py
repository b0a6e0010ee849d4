"""Rules of one fact: what facts of other relations say about the answers of a query; numpy alone.

A rule says that (s, place, c) in train implies (s, other place, c), where a place is a relation with a direction:
relations that are inverse, symmetric, equivalent or narrower have such rules. Its confidence is the share of the pairs
(s, c) of the place that have the other place, too. Every rank finds the same rules, and gives terms to its own
entities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mocme_dist.evidence.facts import Facts, Integers
from mocme_dist.evidence.votes import Asked, Entries, Floats, to_entries

# Pairs without the other place that are added to a rule's: few facts support little.
_DOUBT = 5.0
FLOOR = 1e-2


class Rules(NamedTuple):
    """Rules that training facts support.

    Attributes:
        code: place * places + other place, ascending.
        confidence: share of the pairs of the place that have the other place.
        cautious: the same with a few pairs more that do not.
    """

    code: Integers
    confidence: Floats
    cautious: Floats


def find_rules(facts: Facts) -> Rules:
    """All rules that at least one pair of entities supports."""
    source, place, target = facts.all()
    places = 2 * facts.num_relations
    order = np.lexsort((place, target, source))
    source, place, target = source[order], place[order], target[order]
    pair = source * facts.num_entities + target
    codes, shift = [np.zeros(0, np.int64)], 1
    # Facts of one pair lie side by side, and there are few of them.
    while len(at := np.flatnonzero(pair[shift:] == pair[:-shift])):
        first, second = place[at], place[at + shift]
        codes += [first * places + second, second * places + first]
        shift += 1
    code, count = np.unique(np.concatenate(codes), return_counts=True)
    size = np.bincount(place, minlength=places)[code // places]
    return Rules(code, count / np.maximum(size, 1), count / (size + _DOUBT))


def look_up(code: Integers, value: Floats, wanted: Integers) -> Floats:
    """Values of codes, which ascend; 0 for those that are not there."""
    if not len(code):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(code, wanted), len(code) - 1)
    return np.where(code[at] == wanted, value[at], 0.0)


def best_by_key(key: Integers, score: Floats) -> tuple[Integers, Floats]:
    """Each key once, ascending, with its largest score."""
    order = np.lexsort((-score, key))
    key, score = key[order], score[order]
    new = np.diff(key, prepend=-1) > 0
    return key[new], score[new]


def rule_scores(code: Integers, value: Floats, asked: Asked, facts: Facts) -> tuple[Integers, Floats]:
    """The largest value of a rule that leads from a fact of each query's source to a candidate.

    Args:
        code, value: of the rules.

    Returns:
        query * entities + candidate, ascending, and the value, where it is above 0.
    """
    query, place, candidate = facts.facts_of(asked.source_U)
    score = look_up(code, value, place * 2 * facts.num_relations + asked.place_U[query])
    found = score > 0
    return best_by_key(query[found] * facts.num_entities + candidate[found], score[found])


def rule_entries(rules: Rules, asked: Asked, facts: Facts, first: int, last: int) -> Entries:
    """log(confidence + FLOOR) - log(FLOOR) of the entities [first, last) that a rule leads to;
    confidence is cautious.
    """
    key, score = rule_scores(rules.code, rules.cautious, asked, facts)
    query, row = key // facts.num_entities, key % facts.num_entities - first
    mine = (row >= 0) & (row < last - first)
    value = np.log(score[mine] + FLOOR) - np.log(FLOOR)
    return to_entries(query[mine], row[mine], value, len(asked.source_U))
