"""Metrics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.metrics import breakdown, rank_metrics, relation_types, report, report_table
from mocme_dist.evaluation.ranking import Queries, Ranks
from mocme_dist.evidence.facts import Facts


def test_metrics_of_a_few_ranks():
    found = rank_metrics(np.array([1.0, 2.0, 4.0, 10.0, 20.0]))
    assert found["mrr"] == pytest.approx((1 + 0.5 + 0.25 + 0.1 + 0.05) / 5)
    assert found == {"mrr": found["mrr"], "hits@1": 0.2, "hits@3": 0.4, "hits@10": 0.8, "mr": 7.4}


def test_a_tie_for_the_first_place_is_no_hit_at_1():
    found = rank_metrics(np.array([1.5, 3.5]))
    assert (found["hits@1"], found["hits@3"], found["hits@10"], found["mr"]) == (0.0, 0.5, 1.0, 2.5)
    assert found["mrr"] == pytest.approx((1 / 1.5 + 1 / 3.5) / 2)


def test_no_ranks_give_zeros():
    assert rank_metrics(np.zeros(0)) == {"mrr": 0.0, "hits@1": 0.0, "hits@3": 0.0, "hits@10": 0.0, "mr": 0.0}


def test_a_report_splits_directions():
    everywhere = np.ones((2, 4), bool)
    found = report("test", np.array([1.0, 2.0, 1.0, 4.0]), np.array([0, 1, 0, 1]), everywhere, step=7)
    assert (found["split"], found["num_queries"], found["step"]) == ("test", 4, 7)
    assert found["tail"]["mrr"] == 1.0
    assert found["head"]["mrr"] == pytest.approx(0.375)
    assert found["mrr"] == pytest.approx(0.6875)
    assert found["seen"] == {**rank_metrics(np.array([1.0, 2.0, 1.0, 4.0])), "num_queries": 4}
    assert found["unseen"] == {"source": {"num_queries": 0}, "target": {"num_queries": 0}}
    one_sided = report("valid", np.array([2.0]), np.array([0]), np.ones((2, 1), bool))
    assert one_sided["head"]["mr"] == 0.0
    assert one_sided["tail"] == rank_metrics(np.array([2.0]))


def test_a_report_sets_queries_of_unseen_entities_apart():
    seen = np.array([[True, False, True, False], [True, True, False, False]])
    found = report("test", np.array([1.0, 2.0, 4.0, 8.0]), np.zeros(4, int), seen)
    assert found["seen"] == {**rank_metrics(np.array([1.0])), "num_queries": 1}
    assert found["unseen"]["source"] == {**rank_metrics(np.array([2.0, 8.0])), "num_queries": 2}
    assert found["unseen"]["target"] == {**rank_metrics(np.array([4.0, 8.0])), "num_queries": 2}


def test_numbers_of_the_table_have_four_digits():
    seen_2Q = np.array([[True, True, True, False], [True] * 4])
    found = report("test", np.array([1, 2, 3, 12000.0]), np.array([0, 0, 1, 1]), seen_2Q)
    table = [line.split() for line in report_table(found).splitlines()]
    assert table[0] == ["test", "MRR", "Hits@1", "Hits@3", "Hits@10", "mean", "rank"]
    assert table[1] == ["all", "0.4584", "0.2500", "0.7500", "0.7500", "3,001.5"]
    assert table[4] == ["unseen", "source", "0.0001", "0.0000", "0.0000", "0.0000", "12,000.0"]
    assert table[5] == ["4", "queries"]  # no query asks for an unseen target


def broken_down() -> dict:
    """Relation 0 is 1-N, 1 is N-1, 2 is N-N, 3 is 1-1, 4 has no training fact."""
    pairs = [
        (0, 0, 1),
        (0, 0, 2),
        (0, 0, 3),
        (1, 1, 5),
        (2, 1, 5),
        (3, 1, 5),
        (1, 2, 2),
        (1, 2, 3),
        (2, 2, 3),
        (3, 2, 2),
        (4, 3, 5),
    ]
    facts = Facts(KnownAnswers.build(np.array(pairs), 5), 8)
    queries = Queries.both_directions(np.array([[4, 0, 6], [6, 1, 5], [4, 3, 1]]))
    ranks = Ranks(np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.0, 1, 3, 4, 5, 6]))
    return breakdown(queries, ranks, facts, facts.known, ["a", "b", "c", "d", "e"])


def test_a_breakdown_groups_queries_by_relation_type_and_degree():
    found = broken_down()
    facts = Facts(KnownAnswers.build(np.array([(0, 0, 1), (0, 0, 2)]), 2), 8)
    assert relation_types(facts) == ["1-N", ""]
    assert found["by_relation"]["a"] == {
        "type": "1-N", **rank_metrics(np.array([1.0, 2])), "num_queries": 2, "head_mrr": 0.5, "tail_mrr": 1.0,
    }  # fmt: skip
    assert {name: row["type"] for name, row in found["by_relation"].items()} == {"a": "1-N", "b": "N-1", "d": "1-1"}
    assert list(found["by_relation_type"]) == ["1-1", "1-N", "N-1"]
    assert found["by_relation_type"]["N-1"]["num_queries"] == 2
    # Degrees of the targets: 6 has none, 4 has 1, 5 has 4, 6 none, 1 has 4, 4 has 1.
    assert {name: row["num_queries"] for name, row in found["by_degree"]["target"].items()} == {
        "0": 2,
        "1-2": 2,
        "3-5": 2,
    }
    assert found["by_degree"]["target"]["0"]["mrr"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["without_source"]["head"]["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 6) / 3)
    assert found["baselines"].keys() == {"frequency", "inverse_rules"}


def test_the_table_has_a_line_for_each_group_and_baseline():
    seen_2Q = np.ones((2, 6), bool)
    ranks = np.arange(1.0, 7)
    drop = {
        "affected": {"source": {**rank_metrics(ranks), "num_queries": 6}, "target": {"num_queries": 0}},
        "unaffected": {"num_queries": 0},
    }
    found = report("test", ranks, np.array([0, 1] * 3), seen_2Q, **broken_down(), drop=drop)
    names = [line[:30].strip() for line in report_table(found).splitlines()]
    for name in ("1-N relations", "target in 1-2 facts", "source hidden", "source left out", "baseline: inverse rules"):
        assert any(line.startswith(name) for line in names), name
    assert not any(line.startswith(("target hidden", "unseen")) for line in names)
