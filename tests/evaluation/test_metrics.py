"""Metrics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.evaluation.metrics import rank_metrics, report


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
    found = report("test", np.array([1.0, 2.0, 1.0, 4.0]), np.array([0, 1, 0, 1]), step=7)
    assert (found["split"], found["num_queries"], found["step"]) == ("test", 4, 7)
    assert found["tail"]["mrr"] == 1.0
    assert found["head"]["mrr"] == pytest.approx(0.375)
    assert found["mrr"] == pytest.approx(0.6875)
    one_sided = report("valid", np.array([2.0]), np.array([0]))
    assert one_sided["head"]["mr"] == 0.0
    assert one_sided["tail"] == rank_metrics(np.array([2.0]))
