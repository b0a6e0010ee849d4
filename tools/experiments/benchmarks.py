"""Benchmarks: data sets x forms x seeds, each a run of `mocme train`; a row per run, a table of means and deviations.

    python -m tools.experiments.benchmarks --data DATA --out OUT --sets MKG-W MKG-Y --forms recommended --seeds 1 2 3
    python -m tools.experiments.benchmarks --data DATA --out OUT --sets DB15K --forms paper --set train.epochs=20

Checkpoint and weights of the blend are chosen on dev, test is ranked once per run. A command that was stopped continues
where it was: runs resume, finished ones are not repeated. Forms:

    recommended     configs/SET.yaml and configs/recommended.yaml: the model, and its blend with evidence of neighbours
    structure       plain RotatE, ranked by the model alone; where the recommended model is plain RotatE, its own run
                    gives this row
    paper           configs/paper.yaml and configs/SET.yaml, ranked by the model alone

Rows lie in OUT/benchmarks.parquet, the table in OUT/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mocme_dist.config import load_config
from mocme_dist.data.files import write_json
from tools.experiments import pages
from tools.experiments.trials import commit

log = logging.getLogger(__name__)

SETS = {
    "MKG-W": "mkg_w",
    "MKG-Y": "mkg_y",
    "DB15K": "db15k",
    "KVC16K": "kvc16k",
    "TIVA": "tiva",
    "FB15K-237": "fb15k_237",
}
FORMS = ("structure", "paper", "recommended")
ALONE = ["evidence.spaces=[]"]
PLAIN = ["modalities=[structure]", "experts.kind=identity", "experts.num_experts=auto", *ALONE]


class Bench(NamedTuple):
    """One run: data set, form and seed."""

    name: str
    form: str
    seed: int

    @property
    def files(self) -> list[str]:
        """Configuration files: the paper's form comes before the file of the data set, the recommended one after it."""
        own = f"configs/{SETS[self.name]}.yaml"
        return ["configs/paper.yaml", own] if self.form == "paper" else [own, "configs/recommended.yaml"]

    @property
    def overrides(self) -> list[str]:
        """Settings of the form."""
        return {"structure": PLAIN, "paper": ALONE, "recommended": []}[self.form]

    def is_plain(self, settings: list[str]) -> bool:
        """Whether the recommended form is plain RotatE here, so that its run gives the row of structure only."""
        config = load_config(Bench(self.name, "recommended", self.seed).files, settings)
        return config.modalities == ("structure",) and config.experts.kind == "identity"


def run_bench(bench: Bench, args: argparse.Namespace) -> None:
    """Train in a process of its own and keep the row; nothing where the row is there."""
    path = row_path(args.out, bench)
    if path.is_file():
        return
    if bench.form == "structure" and bench.is_plain(args.set):
        run_bench(bench._replace(form="recommended"), args)
        row = json.loads(row_path(args.out, bench._replace(form="recommended")).read_text())
        write_json(path, {**row, "form": "structure", "without_frequency": None, **row["model"]})
        return
    out = args.out.absolute()
    run = out / "runs" / f"{bench.name}-{bench.form}-{bench.seed}"
    settings = [
        "launch.mode=local",
        "deepspeed.engine=torch",
        "train.projector=0",
        f"data.raw={json.dumps(str((args.data / bench.name).absolute()))}",
        f"data.dataset={json.dumps(str(out / 'data' / bench.name))}",
        f"run.dir={json.dumps(str(run))}",
        f"train.seed={bench.seed}",
        *bench.overrides,
        *args.set,
    ]
    command = [sys.executable, "-m", "mocme_dist.train", "--config", *bench.files, "--set", *settings]
    started = time.monotonic()
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("ab") as written:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=written, env=os.environ)
    if done.returncode:
        log.warning("%s %s seed %d: exit code %d, see %s", *bench, done.returncode, run.with_suffix(".log"))
        return
    report = json.loads(done.stdout.splitlines()[-1])
    row = row_of(bench, report, run) | {"last_leg_s": round(time.monotonic() - started)}
    write_json(path, row)
    print(
        json.dumps({key: row[key] for key in ("data", "form", "seed", "valid_mrr", "mrr", "hits@1", "hits@10")}),
        flush=True,
    )


def row_path(out: Path, bench: Bench) -> Path:
    """Where the row of a run is kept."""
    return out / "rows" / f"{bench.name}-{bench.form}-{bench.seed}.json"


def row_of(bench: Bench, report: dict[str, Any], run: Path) -> dict[str, Any]:
    """The row of a run: figures of the blend where there is one, and of the model alone."""
    config = load_config([run / "config.yaml"], [])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "elapsed_s" in line]
    row = {"data": bench.name, "form": bench.form, "seed": bench.seed, "commit": commit()}
    row |= {"epochs": config.train.epochs, "epochs_done": trained[-1]["epoch"], "train_s": trained[-1]["elapsed_s"]}
    row |= {"valid_mrr": report["valid_mrr"], "num_queries": report["num_queries"]}
    row |= _figures(report)
    model_valid = report.get("blend", {}).get("model_mrr", report["valid_mrr"])
    row["model"] = {"valid_mrr": model_valid, **_figures(report.get("model", report))}
    row["without_frequency"] = _figures(report["without_frequency"]) if "without_frequency" in report else None
    row["unseen"] = {side: found.get("mrr") for side, found in report["unseen"].items()}
    return row


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    found = {key: metrics[key] for key in ("mrr", "hits@1", "hits@3", "hits@10", "mr")}
    return found | {f"{side}_mrr": metrics[side]["mrr"] for side in ("head", "tail") if side in metrics}


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows that are there, in order of data sets, forms and seeds."""
    for name in SETS:
        for form in FORMS:
            for path in sorted((args.out / "rows").glob(f"{name}-{form}-*.json")):
                yield json.loads(path.read_text())


def results_table(rows: list[dict[str, Any]]) -> str:
    """Means and deviations over seeds; a line per data set and form."""
    header = ["data set", "form", "seeds", "epochs", "dev MRR", "test MRR", "Hits@1", "Hits@10"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["form"]), []).append(row)
    lines = []
    for (name, form), found in groups.items():
        epochs = sorted({f"{row['epochs_done']:g}" for row in found})
        figures = [pages.mean_sd([row[key] for row in found]) for key in ("valid_mrr", "mrr", "hits@1", "hits@10")]
        lines.append([name, form, str(len(found)), " to ".join(dict.fromkeys((epochs[0], epochs[-1]))), *figures])
        plain = [row["without_frequency"] for row in found]
        if form == "recommended" and all(plain):
            figures = [pages.mean_sd([row[key] for row in plain]) for key in ("mrr", "hits@1", "hits@10")]
            lines.append(["", "the same without frequency", "", "", "", *figures])
    return pages.table(header, lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the raw folders")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="for all runs")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, the first seed of everything first, and write the table after each run."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    args = parse(arguments)
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    benches = [Bench(name, form, seed) for seed in args.seeds for form in reversed(args.forms) for name in args.sets]

    def run(bench: Bench) -> None:
        run_bench(bench, args)
        rows = list(rows_of(args))
        (args.out / "benchmarks.md").write_text(results_table(rows) + "\n", encoding="utf8")
        flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
        pages.write_rows(args.out / "benchmarks.parquet", flat)

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(run, benches))
    print(results_table(list(rows_of(args))))


if __name__ == "__main__":
    main()
