"""From ranks to the figures that are reported: metrics of all queries, and of groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.baselines import frequency_ranks, rule_ranks
from mocme_dist.evaluation.ranking import Queries, Ranks
from mocme_dist.evidence.facts import Facts

HITS = (1, 3, 10)
TYPES = ("1-1", "1-N", "N-1", "N-N")
# From this many answers per query on, on average over train, a side of a relation counts as N.
_MANY = 1.5
# Smallest number of training facts of an entity in each group by degree.
_DEGREES = (0, 1, 3, 6, 11, 31, 101)
# Baselines sort all training facts in memory; of larger graphs they are left out.
_MOST_FACTS = 20_000_000


def rank_metrics(rank_Q: np.ndarray) -> dict[str, float]:
    """MRR, Hits@k and mean rank of filtered ranks (1 is best; ties count with their mean, so ranks may be halves)."""
    if not len(rank_Q):
        return {"mrr": 0.0, **{f"hits@{k}": 0.0 for k in HITS}, "mr": 0.0}
    metrics = {"mrr": float((1 / rank_Q).mean())}
    metrics |= {f"hits@{k}": float((rank_Q <= k).mean()) for k in HITS}
    return {**metrics, "mr": float(rank_Q.mean())}


def direction_metrics(rank_Q: np.ndarray, direction_Q: np.ndarray) -> dict[str, Any]:
    """Metrics of all queries, and apart of those that ask for the head and for the tail."""
    return {
        **rank_metrics(rank_Q),
        "head": rank_metrics(rank_Q[direction_Q == 1]),
        "tail": rank_metrics(rank_Q[direction_Q == 0]),
    }


def report(
    split: str, rank_Q: np.ndarray, direction_Q: np.ndarray, seen_2Q: np.ndarray, **extra: Any
) -> dict[str, Any]:
    """The metrics that train and evaluate print.

    All queries, each direction, and apart those that touch an unseen entity.

    Args:
        split: its name.
        rank_Q: filtered ranks.
        direction_Q: 0 where the tail is asked for, 1 where the head is.
        seen_2Q: whether train shows the query's source, and its target.
        extra: further fields.
    """
    source_Q, target_Q = seen_2Q
    return {
        "split": split,
        **direction_metrics(rank_Q, direction_Q),
        "seen": counted_metrics(rank_Q[source_Q & target_Q]),
        "unseen": {"source": counted_metrics(rank_Q[~source_Q]), "target": counted_metrics(rank_Q[~target_Q])},
        "num_queries": len(rank_Q),
        **extra,
    }


def counted_metrics(rank_Q: np.ndarray) -> dict[str, float]:
    """Metrics of some queries and their number; the number alone where there are none."""
    return {**(rank_metrics(rank_Q) if len(rank_Q) else {}), "num_queries": len(rank_Q)}


def breakdown(
    queries: Queries, ranks: Ranks, facts: Facts, known: KnownAnswers, relation_names: Sequence[str]
) -> dict[str, Any]:
    """Figures of groups of queries, and of baselines; docs/evaluation.md describes each field.

    Args:
        ranks: of the queries.
        facts: of train.
        known: answers that do not compete with the target.
        relation_names: by id.
    """
    direction_Q, rank_Q = queries.direction, ranks.filtered
    type_R = relation_types(facts)
    relations, which_Q = np.unique(queries.relation, return_inverse=True)
    groups = np.split(np.argsort(which_Q, kind="stable"), np.cumsum(np.bincount(which_Q))[:-1])
    by_relation = {
        relation_names[relation]: {"type": type_R[relation], **_both(rank_Q[at], direction_Q[at])}
        for relation, at in zip(relations.tolist(), groups, strict=True)
    }
    type_Q = np.array(type_R)[queries.relation]
    by_type = {name: _both(rank_Q[type_Q == name], direction_Q[type_Q == name]) for name in TYPES}
    ends = {"source": queries.source, "target": queries.target}
    found = {
        "without_source": direction_metrics(ranks.without_source, direction_Q),
        "by_relation": by_relation,
        "by_relation_type": {name: row for name, row in by_type.items() if row["num_queries"]},
        "by_degree": {end: _by_degree(rank_Q, facts.degrees(ids_Q)) for end, ids_Q in ends.items()},
    }
    if len(facts.known.targets) <= 2 * _MOST_FACTS:
        baselines = {"frequency": frequency_ranks, "inverse_rules": rule_ranks}
        found["baselines"] = {
            name: direction_metrics(rank(queries, known, facts), direction_Q) for name, rank in baselines.items()
        }
    return found


def relation_types(facts: Facts) -> list[str]:
    """Type of each relation by its training facts: N where queries have 1.5 answers on average; "" without facts."""
    place = np.asarray(facts.known.keys) % (2 * facts.num_relations)
    queries_P = np.bincount(place, minlength=2 * facts.num_relations)
    answers_P = np.bincount(place, np.diff(facts.known.offsets), minlength=2 * facts.num_relations)
    many_P = answers_P >= _MANY * queries_P
    sides = [("N" if heads else "1", "N" if tails else "1") for tails, heads in many_P.reshape(-1, 2).tolist()]
    return ["-".join(side) if count else "" for side, count in zip(sides, queries_P[::2].tolist(), strict=True)]


def _by_degree(rank_Q: NDArray[np.float64], degree_Q: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Metrics of queries by the number of training facts of an entity; empty groups are left out."""
    group_Q = np.searchsorted(_DEGREES, degree_Q, side="right") - 1
    found = {}
    for group, first in enumerate(_DEGREES):
        last = _DEGREES[group + 1] - 1 if group + 1 < len(_DEGREES) else None
        name = f"{first}+" if last is None else str(first) if first == last else f"{first}-{last}"
        if (group_Q == group).any():
            found[name] = counted_metrics(rank_Q[group_Q == group])
    return found


def _both(rank_Q: NDArray[np.float64], direction_Q: NDArray[np.int64]) -> dict[str, Any]:
    """Metrics of some queries, and the MRR of each direction."""
    sides = {"head": rank_Q[direction_Q == 1], "tail": rank_Q[direction_Q == 0]}
    return {**counted_metrics(rank_Q), **{f"{name}_mrr": rank_metrics(rank)["mrr"] for name, rank in sides.items()}}


def report_table(report: dict[str, Any]) -> str:
    """A report as a table for readers: a line for all queries, for each group of them, and for each baseline."""
    unseen, degrees = report.get("unseen", {}), report.get("by_degree", {}).get("target", {})
    named = {
        "all": report,
        "tail asked": report["tail"],
        "head asked": report["head"],
        "unseen source": unseen.get("source", {}),
        "unseen target": unseen.get("target", {}),
        **{f"{kind} relations": row for kind, row in report.get("by_relation_type", {}).items()},
        **{f"target in {name} facts": row for name, row in degrees.items()},
        **_hidden_rows(report.get("drop", {})),
        "model alone": report.get("model", {}),
        "no frequency term": report.get("without_frequency", {}),
        "source left out": report.get("without_source", {}),
        **{f"baseline: {name.replace('_', ' ')}": row for name, row in report.get("baselines", {}).items()},
    }
    titles = ["MRR", *(f"Hits@{k}" for k in HITS), "mean rank"]
    width = max(len(name) for name, row in named.items() if "mrr" in row) + 2
    lines = [f"{report['split']:<{width}}" + "".join(f"{title:>10}" for title in titles)]
    for name, row in named.items():
        if "mrr" in row:
            shares = [row["mrr"], *(row[f"hits@{k}"] for k in HITS)]
            lines.append(f"{name:<{width}}" + "".join(f"{share:>10.4f}" for share in shares) + f"{row['mr']:>10,.1f}")
    return "\n".join([*lines, f"{report['num_queries']:,} queries"])


def _hidden_rows(drop: dict[str, Any]) -> dict[str, Any]:
    """Lines of the queries that a hidden modality affects, and of the others."""
    return {f"{name} hidden": row for name, row in drop.get("affected", {}).items()} | (
        {"nothing hidden": drop["unaffected"]} if drop else {}
    )
