"""The report of a run.

Metrics of the split that it names, examples, pictures, and a page in which names are escaped.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mocme_dist.data.known import KnownAnswers
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.report import (
    Example,
    complete,
    draw,
    html_page,
    metric_rows,
    read_report,
    text_table,
    write_report,
)

METRICS = {"mrr": 0.5, "hits@1": 0.25, "hits@3": 0.5, "hits@10": 1.0, "mr": 3.25}


def test_a_report_of_another_split_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"split": "test", "mrr": 0.5}))
    assert read_report(tmp_path)["mrr"] == 0.5
    (tmp_path / "metrics.json").write_text(json.dumps({"split": "valid", "mrr": 0.5}))
    with pytest.raises(ConfigError, match="metrics of split 'valid', expected 'test'"):
        read_report(tmp_path)


def test_a_directory_without_a_finished_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.json: not found; give the directory of a finished run"):
        read_report(tmp_path)
    for text in ("{}", "[1]"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(ConfigError, match="holds metrics of split None, expected 'test'"):
            read_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_report(tmp_path)


def test_a_source_is_no_answer_unless_its_relation_joins_some_entity_to_itself():
    near = SimpleNamespace(
        dataset=SimpleNamespace(known=lambda _: KnownAnswers.build(np.array([[0, 0, 1], [2, 1, 2]]), 2)),
        reflexive={1},
        distances=lambda source, relation, direction: np.abs(np.arange(5.0) - source),  # each is nearest to itself
    )
    assert complete(near, (0, 0, 0, 3), 3) == ([2, 3, 4], 3)
    assert complete(near, (0, 1, 0, 3), 3)[0] == [0, 1, 2]


def test_the_table_has_a_line_for_each_part_that_was_measured():
    measured = {"head": METRICS, "tail": METRICS, "model": METRICS, "baselines": {"inverse_rules": METRICS}}
    rows = metric_rows({"MoCME": {**METRICS, **measured}})
    names = ["MoCME", "MoCME head", "MoCME tail", "MoCME model alone", "baseline: inverse rules"]
    assert [name for name, _ in rows] == names
    head, first, *_ = text_table(rows)
    assert head.split() == ["test", "MRR", "hits@1", "hits@3", "hits@10", "MR"]
    assert first.split() == ["MoCME", "0.5000", "0.2500", "0.5000", "1.0000", "3.2"]


def test_a_run_too_short_for_curves_is_drawn():
    curves = {"MoCME": {"valid/mrr": ([1.0], [0.1])}}
    bins = [{"said": 0.1, "true": 0.2, "count": 9}, {"said": 0.8, "true": 0.7, "count": 5}]
    relations = {"near": {**METRICS, "num_queries": 4}, "kind": {**METRICS, "num_queries": 9}}
    informed = {"MoCME": {**curves["MoCME"], "information/inter/text-image": ([1.0, 2.0], [0.5, 0.25])}}
    pictures = {draw(curves, bins, relations), draw(curves, [], relations), draw(curves, bins, {})}
    pictures.add(draw(informed, bins, relations))
    assert len(pictures) == 4  # reliability, relations and information are in the picture
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 1000 for picture in pictures)


def test_a_finished_run_is_reported_beside_a_control(answered_run, blended_run):
    text = write_report({"MoCME": blended_run, "alone": answered_run}, 2, 0)
    assert "MoCME model alone" in text and "\nalone tail" in text and text.count("true: ") == 2
    assert (blended_run / "report.png").stat().st_size > 1000
    page = (blended_run / "report.html").read_text(encoding="utf8")
    assert "MoCME by relation" in page and "alone by relation" in page and page.count("<li>") == 2


def test_names_are_escaped_in_the_page_and_it_loads_nothing():
    fact = Example("<script>alert(1)</script>", "a & b", "<b>", ["<b>", "c"], {"MoCME": 1})
    rows = [("<i>run</i>", METRICS)]
    reports = {"MoCME": {"by_relation": {"<u>": {**METRICS, "num_queries": 4}}}}
    page = html_page("run <1>", rows, reports, b"png", [fact])
    for raw in ("<script", "<i>", "<u>", "run <1>", "http:", "https:"):
        assert raw not in page
    assert "<mark>&lt;b&gt;</mark>" in page and "a &amp; b" in page and "&lt;u&gt;" in page
