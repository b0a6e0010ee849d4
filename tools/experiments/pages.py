"""Rows of a study as a table, a picture, a Parquet file and a page; means, deviations and paired bootstraps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"
_DRAWS = 2000


def mean_sd(values: Sequence[float], digits: int = 4) -> str:
    """Mean and sample deviation as text; the mean alone of one value, a dash of none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def paired_bootstrap(ranks_SQ: np.ndarray, base_SQ: np.ndarray, draws: int = _DRAWS) -> tuple[float, float, float]:
    """Difference in MRR and its 95 % interval; queries are drawn with replacement, the same for all seeds of both arms.

    Args:
        ranks_SQ: (S, Q) ranks of S seeds; base_SQ: of the arm that is compared with, the same queries.
    """
    difference_Q = (1 / ranks_SQ).mean(0) - (1 / base_SQ).mean(0)
    generator = np.random.default_rng(0)
    means = [difference_Q[generator.integers(len(difference_Q), size=len(difference_Q))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference_Q.mean()), float(low), float(high)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as Parquet; a column per key, missing values null."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in keys}), path)


def draw(path: Path, bars: Sequence[tuple[str, Sequence[float]]], title: str) -> None:
    """Mean test MRR of each arm as a bar, seeds as points, to an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "mocme"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(bars)))
    names = [name for name, _ in bars]
    means = [float(np.mean(values)) if len(values) else 0.0 for _, values in bars]
    axes.barh(names, means, color="#8fbcbb")
    for at, (_, values) in enumerate(bars):
        axes.plot(values, [at] * len(values), "o", color="#2e3440", markersize=3)
    inside = [value for _, values in bars for value in values]
    if inside:
        margin = max(0.2 * (max(inside) - min(inside)), 0.005)
        axes.set_xlim(max(min(inside) - 3 * margin, 0), max(inside) + margin)
    axes.invert_yaxis()
    axes.set_xlabel("test MRR")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_page(path: Path, title: str, question: str, generated: str) -> None:
    """Replace the generated part of a page; a new page gets a title, its question and a place for the verdict."""
    if path.is_file():
        text = path.read_text(encoding="utf8")
    else:
        text = f"# {title}\n\n{question}\n\n## Verdict\n\nNot written yet.\n\n## Figures\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n{generated}\n{END}{tail}", encoding="utf8")
