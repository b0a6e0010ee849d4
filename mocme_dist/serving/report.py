"""The report of a finished run: tables, pictures, and examples in words, as text and as one HTML page.

The page is for people who were not there when the run was trained: it holds its pictures and loads nothing.
"""

from __future__ import annotations

import base64
import html
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.config import load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.files import read_json
from mocme_dist.errors import CheckpointError, ConfigError
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.predict import Question, predict
from mocme_dist.serving.rows import RunRows

METRICS = ("mrr", "hits@1", "hits@3", "hits@10", "mr")
# Parts of a run's report that get a line of their own, with the name of that line.
PARTS = {
    "head": "head",
    "tail": "tail",
    "without_frequency": "no frequency",
    "model": "model alone",
}
# Relations that the picture has a bar for.
MOST_RELATIONS = 14
# Groups of queries that the page has a table for, with their headings.
GROUPS = {"by_relation": "relation", "by_relation_type": "type of relation", "by_degree": "facts of the true answer"}
# Colours that differ in print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")


class Example(NamedTuple):
    """One fact of the test split, completed by every run.

    Attributes:
        source, relation, target: labels of the fact that was held out.
        answers: labels of the first run's best answers, best first.
        ranks: filtered rank of the target, by run.
    """

    source: str
    relation: str
    target: str
    answers: list[str]
    ranks: dict[str, int]

    def lines(self) -> list[str]:
        """Return the example as two lines of text; the true answer stands in brackets."""
        shown = ", ".join(f"[{answer}]" if answer == self.target else answer for answer in self.answers)
        told = "; ".join(f"{name} {rank}" for name, rank in self.ranks.items())
        return [f"  {self.source} -{self.relation}-> ?  {shown}", f"      true: {self.target}, rank: {told}"]


def write_report(runs: Mapping[str, Path], count: int, seed: int) -> str:
    """Write report.png and report.html into the first run's directory; return the report as text.

    Args:
        runs: run directories by the name that the report gives them; the first is the subject, others are controls.
        count: number of examples in words.
        seed: seed of their draw.

    Raises:
        ConfigError: a directory does not hold a finished run, or matplotlib is not installed.
        CheckpointError: a run has no checkpoint.
    """
    reports = {name: read_report(run) for name, run in runs.items()}
    curves = {name: read_curves(run) for name, run in runs.items()}
    with tempfile.TemporaryDirectory(prefix="mocme-report-") as folder:
        answerers = {name: Answerer(run, Path(folder) / str(at)) for at, (name, run) in enumerate(runs.items())}
        facts = examples(answerers, count, seed)
        calibration = next(iter(answerers.values())).bundle.manifest.get("calibration") or {}
    subject = next(iter(runs.values()))
    reliability = calibration.get("reliability", {}).get("bins", [])
    picture = draw(curves, reliability, next(iter(reports.values())).get("by_relation", {}))
    (subject / "report.png").write_bytes(picture)
    table = metric_rows(reports)
    page = html_page(subject.name, table, reports, picture, facts)
    (subject / "report.html").write_text(page, encoding="utf8")
    lines = [
        *text_table(table),
        "",
        "Facts of the test split, drawn by seed; the true answer in [brackets], known training facts left out:",
        *(line for fact in facts for line in fact.lines()),
        "",
        f"Page:               {subject / 'report.html'}",
        f"Curves and weights: {subject / 'report.png'}",
        f"TensorBoard:        tensorboard --logdir {subject.parent}",
    ]
    return "\n".join(lines) + "\n"


# -- metrics


def read_report(run: Path) -> dict[str, Any]:
    """Return the test metrics of a run.

    Raises:
        ConfigError: there are none, or they are of another split.
        DataError: the file is not JSON.
    """
    path = run / "metrics.json"
    if not path.is_file():
        raise ConfigError(f"{path}: not found; give the directory of a finished run (run.dir)")
    report = read_json(path)
    split = report.get("split") if isinstance(report, dict) else None
    if split != "test":
        raise ConfigError(f"{path}: holds metrics of split {split!r}, expected 'test'; train the run again")
    return dict(report)


def metric_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, float]]]:
    """Return (name, metrics) of each line of the table: every run as a whole and its parts, then the baselines."""
    rows: list[tuple[str, Mapping[str, float]]] = []
    for name, report in reports.items():
        rows.append((name, report))
        rows += [(f"{name} {part}", report[key]) for key, part in PARTS.items() if "mrr" in (report.get(key) or {})]
    # Baselines depend on the graph and the split alone: those of the first run are those of all.
    for name, metrics in (next(iter(reports.values())).get("baselines") or {}).items():
        rows.append((f"baseline: {name.replace('_', ' ')}", metrics))
    return rows


def _cells(metrics: Mapping[str, float]) -> list[str]:
    """Return the metrics of one line as text; a rank has one decimal, a share four."""
    return [f"{metrics[key]:.1f}" if key == "mr" else f"{metrics[key]:.4f}" for key in METRICS]


def _titles() -> list[str]:
    return [key.upper() if key in ("mrr", "mr") else key for key in METRICS]


def text_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return the lines of the table of metrics."""
    width = max(len(name) for name, _ in rows) + 4
    head = f"{'test':<{width}}" + "".join(f"{title:>10}" for title in _titles())
    return [head, *(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in _cells(values)) for name, values in rows)]


# -- pictures


def read_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return every series of metrics.jsonl as (epochs, values), by its name."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else []:
        values = json.loads(line)
        for key, value in values.items():
            if key not in ("step", "epoch"):
                epochs, points = series.setdefault(key, ([], []))
                epochs.append(values["epoch"])
                points.append(value)
    return series


def draw(
    curves: Mapping[str, Mapping[str, tuple[list[float], list[float]]]],
    reliability: Sequence[Mapping[str, float]],
    by_relation: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """Return a PNG: valid MRR and loss of all runs, and of the first its weights, time, negatives, relations,
    reliability
    and information.

    Args:
        curves: the series of each run, from `read_curves`.
        reliability: bins of said and true probability of the first run's bundle: `said`, `true`, `count`.
        by_relation: metrics of the first run by the name of the relation; those with the most queries are drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the report draws with matplotlib: pip install 'mocme-dist[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(20, 7.5), constrained_layout=True)
    first = next(iter(curves.values()))
    for colour, (name, series) in zip(COLOURS, curves.items(), strict=False):
        for axis, key in ((axes[0, 0], "valid/mrr"), (axes[0, 1], "train/loss")):
            axis.plot(*series.get(key, ([], [])), label=name, color=colour, marker="o", markersize=3)
    weights = sorted(key for key in first if key.startswith("fusion/modality/"))
    _draw_series(axes[0, 2], {key.rsplit("/", 1)[1]: first[key] for key in weights})
    classes = ("easy", "ambiguous", "hard")
    _draw_series(axes[1, 0], {name: first.get(f"entropy/{name}", ([], [])) for name in classes})
    phases = [key for key in first if key.startswith("phases/") and key.endswith("_ms")]
    phases = sorted(phases, key=lambda key: -first[key][1][-1])[: len(COLOURS)]  # the longest ones
    _draw_series(axes[0, 3], {key.removeprefix("phases/").removesuffix("_ms"): first[key] for key in phases})
    _draw_relations(axes[1, 1], by_relation)
    _draw_reliability(axes[1, 2], reliability)
    _draw_information(axes[1, 3], first)
    titles = (
        ("MRR on valid", "epoch"),
        ("Training loss", "epoch"),
        ("Mean weight of each modality", "epoch"),
        ("Milliseconds per step", "epoch"),
        ("Negatives by class of entropy (share)", "epoch"),
        ("Test MRR by relation", "MRR"),
        ("Reliability of probabilities on valid", "probability said"),
        ("Information between modalities, last evaluation", ""),
    )
    for axis, (title, below) in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel(below)
        axis.grid(alpha=0.0 if axis.images else 0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        elif not axis.has_data():
            axis.text(0.5, 0.5, "not recorded for this run", ha="center", transform=axis.transAxes, color="#666666")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def _draw_series(axis: Any, series: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Draw some series, each in a colour of its own; empty ones are left out."""
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        if points[1]:
            axis.plot(*points, label=name, color=colour)


def _draw_relations(axis: Any, by_relation: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a bar for each of the relations with the most queries, the most frequent on top."""
    frequent = sorted(by_relation.items(), key=lambda item: -item[1]["num_queries"])[:MOST_RELATIONS]
    for place, (name, row) in enumerate(reversed(frequent)):
        axis.barh(place, row["mrr"], color=COLOURS[0])
        axis.text(0.02, place, name[:40], va="center", fontsize=8)
    if frequent:
        axis.set_xlim(0, 1)
        axis.set_yticks([])


def _draw_reliability(axis: Any, reliability: Sequence[Mapping[str, float]]) -> None:
    """Draw the true share against the probability that was said, one point per bin; the diagonal is perfect."""
    if not reliability:
        return
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="perfect")
    said, true = [point["said"] for point in reliability], [point["true"] for point in reliability]
    axis.plot(said, true, marker="o", color=COLOURS[0], label="this run")
    axis.set_ylabel("share that is true")


def _draw_information(axis: Any, series: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Draw the matrix of the last estimates between modalities, with names and values."""
    start = "information/inter/"
    pairs = {tuple(key.removeprefix(start).split("-")): series[key][1][-1] for key in series if key.startswith(start)}
    if not pairs:
        return
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    value_nn = np.full((len(names), len(names)), np.nan)
    for (left, right), value in pairs.items():
        at = names.index(left), names.index(right)
        value_nn[at] = value_nn[at[::-1]] = value
    axis.figure.colorbar(axis.imshow(value_nn, cmap="Blues", vmin=0), ax=axis)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    half = np.nanmax(value_nn) / 2
    for row, column in np.argwhere(np.isfinite(value_nn)).tolist():
        value = value_nn[row, column]
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > half else "black")


# -- examples


class Answerer:
    """The best checkpoint of a run, exported and asked as `query` asks a bundle.

    Attributes:
        dataset: the packed data set that the run was trained on.
        bundle: the exported bundle.
        reflexive: relations that join some entity to itself in train.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        """Export the bundle of `run` to `folder` and open it.

        Raises:
            CheckpointError: the run has no checkpoint.
        """
        config = load_config([run / "config.yaml"], [f"run.dir={json.dumps(str(run))}"])
        self.dataset = Dataset.open(Path(str(config.data.dataset)))
        self.reflexive = set(self.dataset.reflexive())
        saved = Checkpoints(run).find(best=True)
        if saved is None:
            raise CheckpointError(f"{run}: no checkpoint; train the run first")
        export_bundle(RunRows(config, self.dataset, saved), folder)
        self.bundle = Bundle.open(folder)
        self.names, self.relations = self.dataset.entity_names(), self.dataset.relation_names()

    def distances(self, source: int, relation: int, direction: int) -> NDArray[np.float64]:
        """Return (E,) minus the scores of all entities as answers to a query; smaller is more plausible."""
        head, tail = (None, self.names[source]) if direction else (self.names[source], None)
        answers = predict(
            self.bundle, [Question(head, self.relations[relation], tail)], k=len(self.names), filter="none"
        )
        distance_E = np.full(len(self.names), np.inf)
        distance_E[answers.answer] = -answers.score
        return distance_E


def complete(answerer: Answerer, query: tuple[int, int, int, int], top: int) -> tuple[list[int], int]:
    """Return the best new answers to a query, and the filtered rank of its true one.

    Facts of train are left out, and so is the source where its relation joins no entity to itself in train.
    """
    source, relation, direction, target = query
    distance_E = answerer.distances(source, relation, direction)
    place = (np.array([source]), np.array([relation]), np.array([direction]))
    _, trained = answerer.dataset.known("train").lookup(*place)
    _, known = answerer.dataset.known("all").lookup(*place)
    left_out = set(trained.tolist()) | (set() if relation in answerer.reflexive else {source})
    order = [entity for entity in np.argsort(distance_E, kind="stable").tolist() if entity not in left_out]
    others = np.setdiff1d(known, [target])
    competing = np.delete(distance_E, np.append(others, target))
    rank = 1 + int((competing < distance_E[target]).sum())
    return order[:top], rank


def examples(answerers: Mapping[str, Answerer], count: int, seed: int) -> list[Example]:
    """Return one fact of the test split for each of its `count` most frequent relations, completed by every run."""
    first = next(iter(answerers.values()))
    dataset = first.dataset
    label = first.bundle.label
    queries = split_queries(dataset.triples("test"))
    tails = np.flatnonzero(queries.direction == 0)
    np.random.default_rng(seed).shuffle(tails)
    asked, times = np.unique(queries.relation[tails], return_counts=True)
    found = []
    for asked_relation in asked[np.argsort(-times, kind="stable")][:count]:
        index = tails[queries.relation[tails] == asked_relation][0]
        source, relation, direction, target = (int(column[index]) for column in queries)
        results = {name: complete(one, (source, relation, direction, target), 5) for name, one in answerers.items()}
        best = next(iter(results.values()))[0]
        ranks = {name: rank for name, (_, rank) in results.items()}
        shown = first.bundle.relation_label(relation)
        found.append(Example(label(source), shown, label(target), [label(entity) for entity in best], ranks))
    return found


# -- the page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #8889; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: .5rem; }
li { margin: .5rem 0; } mark { border-radius: .2rem; padding: 0 .2rem; } .quiet { opacity: .75; }
"""


def html_page(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    reports: Mapping[str, Mapping[str, Any]],
    picture: bytes,
    facts: Sequence[Example],
) -> str:
    """Return the report as one HTML page; every name is escaped, and the picture is part of the page."""
    image = base64.b64encode(picture).decode()
    parts = [
        f"<h1>Report of {html.escape(title)}</h1>",
        "<p>Filtered ranks on the test split: every entity is a candidate, ties have their mean rank.</p>",
        _html_table(["test", *_titles()], [[name, *_cells(values)] for name, values in rows]),
        f'<p><img alt="Learning curves, weights and reliability" src="data:image/png;base64,{image}"></p>',
    ]
    for name, report in reports.items():
        parts += _html_groups(name, report)
    parts.append("<h2>Facts of the test split, completed</h2>")
    parts.append("<p>Drawn by seed, not chosen by result. Known training facts are left out.</p><ul>")
    parts += [_html_example(fact) for fact in facts]
    parts.append("</ul>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title></head>\n'
        + "<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_groups(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return a heading and a table for every group of queries that a run's report has figures of."""
    parts = []
    for key, heading in GROUPS.items():
        groups = report.get(key) or {}
        if key == "by_degree":
            groups = groups.get("target", {})
        rows = [
            [row.get("label", group), f"{row['num_queries']:,}", *_cells(row)]
            for group, row in groups.items()
            if "mrr" in row
        ]
        if rows:
            parts.append(f"<h2>{html.escape(name)} by {heading}</h2>")
            parts.append(_html_table([heading, "queries", *_titles()], rows))
    return parts


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table; cells are escaped."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _html_example(fact: Example) -> str:
    """Return one example as an item of a list; the true answer is marked."""
    answers = (
        f"<mark>{html.escape(answer)}</mark>" if answer == fact.target else html.escape(answer)
        for answer in fact.answers
    )
    ranks = "; ".join(f"{name} {rank}" for name, rank in fact.ranks.items())
    asked = f"<b>{html.escape(fact.source)}</b> {html.escape(fact.relation)} &rarr; {', '.join(answers)}"
    return (
        f'<li>{asked}<br><span class="quiet">true: {html.escape(fact.target)}; rank: {html.escape(ranks)}</span></li>'
    )
