"""A study of the model: its arms with several seeds on Ray Tune, rows as Parquet, a page with table and picture.

    python -m tools.experiments.study ablation --data DATA/worldfacts --out OUT --config configs/worldfacts.yaml
    python -m tools.experiments.study all --data DATA/MKG-W --out OUT --config configs/mkg_w.yaml --set train.epochs=20

A run that was stopped continues with the trials that have no row yet; arms that studies share are trained once.
`--page` names the folder of the pages (NAME.md, NAME.svg, NAME.parquet): text outside the generated part of a page is
kept.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune

from mocme_dist.config import load_config
from mocme_dist.config.load import find_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import features_manifest
from mocme_dist.train import prepare_data, resolve_paths
from mocme_dist.training.build import resolve_modalities
from tools.experiments import pages
from tools.experiments.arms import STUDIES, Arm, Graph, Study
from tools.experiments.graphs import make_variant
from tools.experiments.trials import Trial, run_trial

log = logging.getLogger(__name__)
_TITLES = {"fusion/modality/structure": "weight of structure", "fusion/modality/video": "weight of noise"}


class Bench(tune.Trainable):  # type: ignore[misc]
    """Runs trials one after another in one process, so that imports and kernels are paid once."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the next trial."""
        self.trial, self.out = Trial(*config["trials"][config["trial"]]), Path(config["out"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same process."""
        import torch

        torch.compiler.reset()  # type: ignore[no-untyped-call]
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Run it to its end."""
        row = run_trial(self.trial, self.out)
        return {"done": True, "mrr": row.get("mrr", float("nan")), "error": row.get("error", "")}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: what a trial leaves is its row."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


class Plan:
    """Trials of some studies on one graph."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.absolute()
        args.data = args.data.absolute()
        self.config = tuple(str(find_config(path).absolute()) for path in args.config)  # workers run in another folder
        base = ["launch.mode=local", "deepspeed.engine=torch", *args.set]
        config = load_config(self.config, [*base, *self._data(""), "run.dir=unused"])
        prepare_data(resolve_paths(config))
        dataset = Dataset.open(self._packed(""))
        modalities = resolve_modalities(config.modalities, dataset)
        manifests = {name: features_manifest(dataset.directory, name) for name in modalities if name != "structure"}
        widths = {name: manifest.width for name, manifest in manifests.items() if manifest is not None}
        self.graph = Graph(modalities, widths, config.experts.count_for(len(modalities)), config.experts.width)
        self.about = (
            f"{args.data.name}: {dataset.num_entities:,} entities, {len(dataset.triples('train')):,} training facts,"
            f" {2 * len(dataset.triples('test')):,} test queries; modalities {', '.join(modalities)}; K"
            f" {self.graph.num_experts}, D {self.graph.width}, {config.train.epochs} epochs, {config.negatives.count}"
            f" negatives, seeds {', '.join(map(str, args.seeds))}."
        )

    def _packed(self, variant: str) -> str:
        return str(self.out / "data" / (variant.replace(":", "-") or "graph"))

    def _data(self, variant: str) -> list[str]:
        raw = make_variant(self.args.data, self.out / "raw", variant)
        return [f"data.raw={json.dumps(str(raw.absolute()))}", f"data.dataset={json.dumps(self._packed(variant))}"]

    def trial(self, arm: Arm, seed: int) -> Trial:
        """An arm with a seed."""
        overrides = (*self.args.set, *self._data(arm.dataset), *arm.settings)
        return Trial(arm.name, self.config, overrides, seed, arm.hidden)

    def trials(self, studies: list[Study]) -> list[Trial]:
        """Trials without a row, one per digest, the first seed of all arms first."""
        wanted = [
            self.trial(arm, seed) for seed in self.args.seeds for study in studies for arm in study.arms(self.graph)
        ]
        by_digest = {trial.digest: trial for trial in wanted}
        return [trial for digest, trial in by_digest.items() if not self.row_path(digest).is_file()]

    def row_path(self, digest: str) -> Path:
        """Where the row of a digest is kept."""
        return self.out / "rows" / f"{digest}.json"

    def rows(self, study: Study) -> dict[str, list[dict[str, Any]]]:
        """Rows by arm, as far as they are there; failed trials only as `error`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for arm in study.arms(self.graph):
            paths = [self.row_path(self.trial(arm, seed).digest) for seed in self.args.seeds]
            found[arm.name] = [{"arm": arm.name, **json.loads(path.read_text())} for path in paths if path.is_file()]
        return found


def run_trials(trials: list[Trial], out: Path, parallel: int) -> None:
    """Run trials on Ray Tune, `parallel` at once with one core each."""
    if not trials:
        return
    joined_here = not ray.is_initialized()
    if joined_here:
        ray.init(
            address="local",
            num_cpus=parallel,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
        )
    listed = [tuple(trial) for trial in trials]
    space = {"trial": tune.grid_search(list(range(len(trials)))), "trials": listed, "out": str(out)}
    settings = tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=True)
    run = tune.RunConfig(name="tune", storage_path=str(out), verbose=0)
    try:
        tune.Tuner(
            tune.with_resources(Bench, {"cpu": 1}), param_space=space, tune_config=settings, run_config=run
        ).fit()
    finally:
        if joined_here:
            ray.shutdown()


def generated(study: Study, plan: Plan, picture: str) -> str:
    """The table of a study and what was run."""
    rows = plan.rows(study)
    base = next(iter(rows.values()))
    columns = [_TITLES.get(key, key) for key in study.columns]
    header = ["arm", "seeds", "valid MRR", "test MRR", "Hits@10", "difference to the first, 95 %", *columns]
    lines, failed = [], []
    for name, found in rows.items():
        good = [row for row in found if "error" not in row]
        failed += [f"- {name}, seed {row['seed']}: {row['error']}" for row in found if "error" in row]
        columns = [pages.mean_sd([row[key] for row in good if key in row], 3) for key in study.columns]
        figures = [pages.mean_sd([row[key] for row in good]) for key in ("valid_mrr", "mrr", "hits@10")]
        lines.append([name, str(len(good)), *figures, _difference(plan, good, base), *columns])
    parts = [f"Run on {plan.about}", pages.table(header, lines), f"![test MRR by arm]({picture})"]
    if hidden := _hidden_table(rows):
        parts.append("MRR of test with a modality hidden from a share of the entities; in parentheses the queries that "
                     "touch one, with the modality hidden and before.\n\n" + hidden)  # fmt: skip
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    commits = sorted({row["commit"] for found in rows.values() for row in found if row.get("commit")})
    parts.append(f"Commits: {', '.join(commits)}. Command: `{plan.args.command}`")
    return "\n\n".join(parts)


def _difference(plan: Plan, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    if not rows or rows == base:
        return ""
    kept = {row["seed"]: row["digest"] for row in base if "error" not in row}
    pairs = [(row["digest"], kept[row["seed"]]) for row in rows if row["seed"] in kept]
    if not pairs:
        return ""
    ours, theirs = (
        np.stack([np.load(plan.row_path(digest).with_suffix(".npz"))["ranks"] for digest in side])
        for side in zip(*pairs, strict=True)
    )
    if ours.shape != theirs.shape:
        return "other queries"
    mean, low, high = pages.paired_bootstrap(ours, theirs)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _hidden_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    keys = [key for found in rows.values() for row in found for key in row if key.startswith("hidden/")]
    whats = list(dict.fromkeys(key.split("/", 1)[1] for key in keys))
    names = [name for name, found in rows.items() if any(f"hidden/{what}" in row for row in found for what in whats)]
    lines = []
    for what in whats:
        cells = []
        for name in names:
            all_queries, affected, before = (
                pages.mean_sd([row[f"{kind}/{what}"] for row in rows[name] if f"{kind}/{what}" in row], 3)
                for kind in ("hidden", "affected", "affected_before")
            )
            cells.append(f"{all_queries} ({affected}, {before})")
        lines.append([what, *cells])
    return pages.table(["hidden", *names], lines) if lines else ""


def write_pages(names: list[str], plan: Plan, folder: Path) -> None:
    """Page, picture and Parquet file of each study."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        study = STUDIES[name]
        rows = plan.rows(study)
        if not any(rows.values()):
            continue
        bars = [(arm, [row["mrr"] for row in found if "mrr" in row]) for arm, found in rows.items()]
        pages.draw(folder / f"{name}.svg", bars, f"{study.title}, {plan.args.data.name}")
        pages.write_rows(folder / f"{name}.parquet", [row for found in rows.values() for row in found])
        pages.write_page(folder / f"{name}.md", study.title, study.question, generated(study, plan, f"{name}.svg"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--data", type=Path, required=True, metavar="RAW_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows, runs and packed graphs")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="trials at once, a core each")
    parser.add_argument("--page", type=Path, metavar="DIR", help="folder of the pages; default OUT/pages")
    args = parser.parse_args(arguments)
    shown = f"--config {' '.join(map(str, args.config))} " if args.config else ""
    shown += f"--set {' '.join(args.set)} " if args.set else ""
    seeds = " ".join(map(str, args.seeds))
    args.command = (
        f"python -m tools.experiments.study {args.study} --data {args.data.name} --out OUT {shown}--seeds {seeds}"
    )
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the pages from what is there."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    args = parse(arguments)
    names = list(STUDIES) if args.study == "all" else [args.study]
    plan = Plan(args)
    run_trials(plan.trials([STUDIES[name] for name in names]), plan.out, args.parallel)
    write_pages(names, plan, args.page or plan.out / "pages")


if __name__ == "__main__":
    main()
