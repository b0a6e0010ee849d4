"""What a run learned, for people: `python -m tools.demo_report RUN_DIR [--control RUN_DIR]`.

Prints the test metrics next to a control's, draws learning curves and modality weights into RUN_DIR/report.png, and
completes five facts of the test split in words: one of each of the five most frequent relations, drawn by seed and not
picked by result.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.config import load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.evaluation.protocol import split_queries
from mocme_dist.model.rotate import distance, rotate
from mocme_dist.parallel.comm import communication
from mocme_dist.training import checkpoint
from mocme_dist.training.loop import restore
from mocme_dist.training.worker import Worker

METRICS = ("mrr", "hits@1", "hits@3", "hits@10", "mr")


def read_report(run: Path) -> dict[str, Any]:
    """A run's test metrics."""
    return dict(json.loads((run / "metrics.json").read_text(encoding="utf8")))


def metrics_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """One line a run and side: both directions, heads, tails."""
    width = max(len(name) for name in reports) + 8
    lines = [f"{'test':<{width}}" + "".join(f"{metric.upper() if len(metric) < 4 else metric:>10}" for metric in METRICS)]
    for name, report in reports.items():
        for side, values in (("", report), (" head", report["head"]), (" tail", report["tail"])):
            cells = [f"{values[metric]:>10.1f}" if metric == "mr" else f"{values[metric]:>10.4f}" for metric in METRICS]
            lines.append(f"{name + side:<{width}}" + "".join(cells))
    return lines


def read_curve(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Every series of metrics.jsonl as (epochs, values)."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf8").splitlines():
        values = json.loads(line)
        for key, value in values.items():
            if key not in ("step", "epoch"):
                epochs, points = series.setdefault(key, ([], []))
                epochs.append(values["epoch"])
                points.append(value)
    return series


def draw(runs: dict[str, Path], target: Path) -> None:
    """Valid MRR of every run, and loss, modality weights and entropy classes of the first, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    curves = {name: read_curve(run) for name, run in runs.items()}
    first = next(iter(curves.values()))
    for name, curve in curves.items():
        axes[0, 0].plot(*curve["valid/mrr"], marker="o", markersize=3, label=name)
        axes[0, 1].plot(*curve["train/loss"], label=name)
    for key in sorted(first):
        if key.startswith("fusion/modality/"):
            axes[1, 0].plot(*first[key], label=key.rsplit("/", 1)[1])
    for name in ("easy", "ambiguous", "hard"):
        axes[1, 1].plot(*first[f"entropy/{name}"], label=name)
    titles = ("MRR on valid", "Training loss", "Mean weight of each modality", "Negatives by entropy")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes[1]:
        axis.set_ylim(0, 1)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


class Answerer:
    """A run's best checkpoint on one process: distances of every entity to a query."""

    def __init__(self, run: Path) -> None:
        config = load_config(
            [run / "config.yaml"], ["deepspeed.engine=torch", "deepspeed.bf16=false", "compile=off", f"run.dir={json.dumps(str(run))}"]
        )
        self.dataset = Dataset.open(Path(str(config.data.dataset)))
        with communication(60) as comm:
            worker = Worker(config, self.dataset, comm)
            saved = checkpoint.find(run / "checkpoints", "auto", best=True)
            if saved is None:
                raise SystemExit(f"{run}: no checkpoint; train first")
            restore(worker, saved)
            self.z_ED = worker.encode_rows().z_rD
            self.relations = worker.model.relations

    def distances(self, source: int, relation: int, direction: int) -> np.ndarray:
        """(E,) distances of all entities to a query; smaller is more plausible."""
        with torch.no_grad():
            phase_1C = self.relations(torch.tensor([relation]))
            query_1D = rotate(self.z_ED[source][None], phase_1C, torch.tensor([1.0 - 2.0 * direction]))
            return np.asarray(distance(query_1D, self.z_ED).numpy())


def complete(answerer: Answerer, query: tuple[int, int, int, int], top: int) -> tuple[list[int], int]:
    """Best new answers to a query, facts of train left out, and the filtered rank of the true one."""
    source, relation, direction, target = query
    distance_E = answerer.distances(source, relation, direction)
    one = lambda value: np.array([value])  # noqa: E731
    _, trained = answerer.dataset.known("train").lookup(one(source), one(relation), one(direction))
    _, known = answerer.dataset.known("all").lookup(one(source), one(relation), one(direction))
    order = [int(entity) for entity in np.argsort(distance_E, kind="stable") if entity not in set(trained.tolist())]
    others = np.setdiff1d(known, one(target))
    competing = np.delete(distance_E, np.append(others, target))
    rank = 1 + int((competing < distance_E[target]).sum())
    return order[:top], rank


def examples(runs: dict[str, Path], count: int, seed: int) -> list[str]:
    """Facts of the test split's `count` most frequent relations in words: the first run's best answers, the true one's ranks."""
    answerers = {name: Answerer(run) for name, run in runs.items()}
    dataset = next(iter(answerers.values())).dataset
    names, relations = dataset.entity_names(), dataset.relation_names()
    queries = split_queries(dataset.triples("test"))
    tails = np.flatnonzero(queries.direction == 0)
    np.random.default_rng(seed).shuffle(tails)
    asked, times = np.unique(queries.relation[tails], return_counts=True)
    lines = []
    for asked_relation in asked[np.argsort(-times, kind="stable")][:count]:
        index = tails[queries.relation[tails] == asked_relation][0]
        source, relation, direction, target = (int(column[index]) for column in queries)
        ranks = {}
        for name, answerer in answerers.items():
            best, ranks[name] = complete(answerer, (source, relation, direction, target), 5)
            if name == next(iter(runs)):
                shown = ", ".join(f"[{names[e]}]" if e == target else names[e] for e in best)
        told = "; ".join(f"{name} {rank}" for name, rank in ranks.items())
        lines += [f"  {names[source]} -{relations[relation]}-> ?  {shown}", f"      true: {names[target]}, rank: {told}"]
    return lines


def main() -> None:
    """Parse and report."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--control", type=Path, metavar="RUN_DIR", help="a run to compare with, structure only say")
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = {"MoCME": args.run.absolute()} | ({"structure only": args.control.absolute()} if args.control else {})
    print("\n".join(metrics_table({name: read_report(run) for name, run in runs.items()})))
    picture = args.run / "report.png"
    draw(runs, picture)
    print("\nFacts of the test split, drawn by seed; the true answer in [brackets], known training facts left out:")
    print("\n".join(examples(runs, args.examples, args.seed)))
    print(f"\nCurves and weights: {picture}")
    print(f"TensorBoard:        .venv/bin/tensorboard --logdir {args.run.parent}")


if __name__ == "__main__":
    main()
