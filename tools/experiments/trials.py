"""One trial: train an arm of a study with one seed, rank test once, look into the trained model, keep a row.

A row is a JSON file named by the digest of everything that its figures depend on, so arms that several studies share
are trained once, and a study that was stopped continues with what is missing. Beside it lie the filtered ranks of every
test query, for paired comparisons. Test is ranked by the model alone: studies are about the model, not about the blend.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mocme_dist.config import Config, load_config
from mocme_dist.data.files import write_json
from mocme_dist.errors import MocmeError
from mocme_dist.evaluation.metrics import rank_metrics
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.kernels.distance import distance
from mocme_dist.model.entropy import Weighting, entropy_bits, entropy_class
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import find
from mocme_dist.train import prepare_data, resolve_paths, train
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.loop import restore
from mocme_dist.training.worker import Worker

CLASSES = ("easy", "ambiguous", "hard")
# Queries of train whose negatives are classified, every entity a negative.
_CLASSIFIED = 1000


class Trial(NamedTuple):
    """One arm with one seed.

    Attributes:
        arm: its name.
        config: configuration files.
        overrides: settings of the study and of the arm, `KEY.PATH=VALUE`.
        seed: of weights, batches and negatives.
        hidden: "MODALITY:SHARE" that are hidden at test as by `evaluate --drop`, each a ranking of its own.
    """

    arm: str
    config: tuple[str, ...]
    overrides: tuple[str, ...]
    seed: int
    hidden: tuple[str, ...] = ()

    def settings(self, run: Path) -> Config:
        """Resolved configuration of the run: one process, no evidence."""
        fixed = [
            "launch.mode=local",
            "deepspeed.engine=torch",
            "evidence.spaces=[]",
            "train.projector=0",
            f"train.seed={self.seed}",
            f"run.dir={json.dumps(str(run.absolute()))}",
        ]
        return resolve_paths(load_config(self.config, [*self.overrides, *fixed]))

    @property
    def digest(self) -> str:
        """Name of the row's files."""
        values = self.settings(Path("run")).model_dump(mode="json")
        values["data"] = {**values["data"], "dataset": Path(values["data"]["dataset"]).name, "raw": None}
        del values["run"], values["launch"], values["evaluation"]
        text = json.dumps([values, self.hidden], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def commit() -> str:
    """Short name of the commit that runs, with `+` where files were changed; empty outside a repository."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip()


def run_trial(trial: Trial, out: Path) -> dict[str, Any]:
    """Train, rank, examine; the row, which is also kept in `out`. A mistake or divergence becomes a row with `error`.

    Args:
        out: folder of rows and runs.
    """
    digest = trial.digest
    row_path, run = out / "rows" / f"{digest}.json", out / "runs" / digest
    if row_path.is_file():
        return dict(json.loads(row_path.read_text()))
    row: dict[str, Any] = {"digest": digest, "seed": trial.seed, "commit": commit()}
    started = time.monotonic()
    if (run / "metrics.json").is_file():  # its row was taken away, and its checkpoints are gone
        shutil.rmtree(run)
    try:
        config = trial.settings(run)
        prepare_data(config)
        report = train(config)
        row |= {"epochs": config.train.epochs, "valid_mrr": report["valid_mrr"], "step": report["step"]}
        row |= {key: report[key] for key in ("mrr", "hits@1", "hits@10", "mr")}
        row |= {f"{side}_mrr": report[side]["mrr"] for side in ("head", "tail")}
        row |= read_curve(run / "metrics.jsonl")
        found, ranks = examine(config, trial.hidden)
        row |= found
        row_path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(row_path.with_suffix(".npz"), **ranks)  # type: ignore[arg-type]
    except MocmeError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.monotonic() - started)
    write_json(row_path, row)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return row


def read_curve(path: Path) -> dict[str, float]:
    """Class shares and weights of modalities as the last lines of a run's curve have them."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        found |= {key: value for key, value in values.items() if key.startswith(("entropy/", "fusion/modality/"))}
    return found


def examine(config: Config, hidden: tuple[str, ...]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures of the best checkpoint, and filtered ranks of the test queries.

    `ranks`, and one more array per `hidden`.
    """
    figures: dict[str, float] = {}
    with communication(config.launch.timeout_s, config.launch.gpus_per_worker) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        saved = find(RunDirectory(config.run.dir), worker, "auto", best=True)
        assert saved is not None
        restore(worker, saved)
        worker.model.eval()
        queries, found = worker.rank("test")
        ranks = {"ranks": found.filtered}
        if config.train.loss == "contrastive":
            figures |= false_negatives(worker)
        for what in hidden:
            name, _, share = what.partition(":")
            worker.hide({name: float(share)})
            ranks[what] = worker.rank("test")[1].filtered
            lost_Q = worker.lost(np.concatenate([queries.source, queries.target])).reshape(2, -1).any(0)
            worker.hidden.clear()
            figures[f"hidden/{what}"] = rank_metrics(ranks[what])["mrr"]
            figures[f"affected/{what}"] = rank_metrics(ranks[what][lost_Q])["mrr"]
            figures[f"affected_before/{what}"] = rank_metrics(ranks["ranks"][lost_Q])["mrr"]
    return figures, ranks


def false_negatives(worker: Worker) -> dict[str, float]:
    """Share of negatives in each class of entropy, and share of each class that valid or test call true.

    Negatives of a sample of train queries: every entity that is no known answer in train.
    """
    dataset, settings = worker.dataset, worker.config.negatives
    queries = split_queries(dataset.triples("train"), _CLASSIFIED)
    z_ED = worker.encode_rows().z_rD
    with torch.no_grad():
        source_QD = z_ED[torch.from_numpy(queries.source)]
        sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction).float().to(z_ED.device)
        phase_QC = worker.model.relations(torch.from_numpy(queries.relation).to(z_ED.device))
        query_QD = rotate(source_QD, phase_QC, sign_Q)
    shares = Weighting("entropy", settings.easy_below, settings.hard_from, 0.0, 0.0, 0.0, 1.0)
    count, false = np.zeros(3), np.zeros(3)
    for at in range(len(queries.source)):
        one = queries.take(slice(at, at + 1))
        in_train = dataset.known("train").lookup(one.source, one.relation, one.direction)[1]
        in_all = dataset.known("all").lookup(one.source, one.relation, one.direction)[1]
        with torch.no_grad():
            score_E = worker.config.rotate.gamma - distance(query_QD[at : at + 1].expand(len(z_ED), -1), z_ED)
            class_E = entropy_class(entropy_bits(score_E.float()), shares).cpu().numpy()
        negative_E = np.ones(len(z_ED), bool)
        negative_E[in_train] = False
        count += np.bincount(class_E[negative_E], minlength=3)
        held_out = np.setdiff1d(in_all, in_train)
        false += np.bincount(class_E[held_out], minlength=3)
    of_all = {f"share/{name}": float(part) for name, part in zip(CLASSES, count / count.sum(), strict=True)}
    rate = false / np.maximum(count, 1)
    return of_all | {f"false/{name}": float(part) for name, part in zip(CLASSES, rate, strict=True)}
