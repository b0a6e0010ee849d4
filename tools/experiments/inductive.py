"""How well entities that were never seen are placed: MRR on held-out entities, beside seen ones and a baseline.

    python -m tools.experiments.inductive DATA/MKG-Y OUT --config configs/mkg_y.yaml --seeds 1 2 3
    python -m tools.experiments.inductive DATA/worldfacts OUT --structure-dropout 0 0.2

For each seed a share of the entities is held out with all their triples; entities need a modality and two triples at
least. A model is trained on the rest and exported. Each held-out entity is then encoded by its modalities alone, as
`query --new` does, and asked for its facts with seen entities, in both directions; every seen entity is a candidate,
known answers are left out, ties count with their mean. Rows, printed and appended to OUT/results.jsonl as they come:

    transductive    test MRR of the run itself, on entities that were seen
    inductive       the fused vector without structure, with the weights of the other modalities renormalised
    inductive_map   the same, corrected as the bundle does it (structure imputer)
    blend_vector    answers by the bundle's blend, with neighbours by the fused vector alone
    blend           answers by the bundle's blend, with neighbours in all spaces that the features give: what
                    `query --new` does
    frequency       candidates by how often train has them as the answer of that relation and direction
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.config import Config, load_config
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.evaluation.metrics import rank_metrics
from mocme_dist.kernels.scan import distances
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.predict import UnseenEntity
from mocme_dist.serving.rows import RunRows
from mocme_dist.serving.scorer import Asked, all_scores, rotated
from mocme_dist.serving.unseen import UnseenEntityEncoder
from mocme_dist.train import resolve_paths, train
from mocme_dist.training.build import open_dataset

log = logging.getLogger(__name__)
SPLITS = ("train", "valid", "test")
Triple = tuple[str, str, str]


def read_triples(raw: Path) -> dict[str, list[Triple]]:
    """The triples of each split, as names."""
    found = {}
    for split in SPLITS:
        lines = (raw / f"{split}.txt").read_text(encoding="utf8").splitlines()
        found[split] = [(h, r, t) for h, r, t in (line.split("\t") for line in lines if line.strip())]
    return found


def hold_out(splits: dict[str, list[Triple]], described: set[str], share: float, seed: int) -> set[str]:
    """A seeded share of all entities, out of those that have a modality and two triples in train."""
    degree: dict[str, int] = {}
    for h, _, t in splits["train"]:
        degree[h] = degree.get(h, 0) + 1
        degree[t] = degree.get(t, 0) + 1
    eligible = sorted(name for name, count in degree.items() if count >= 2 and name in described)
    chosen = np.random.default_rng([seed, 77]).permutation(len(eligible))[: round(share * len(degree))]
    return {eligible[at] for at in chosen}


def _copy(path: Path, target: Path) -> None:
    """Pictures behind a link would lie outside the raw folder, which pack refuses."""
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)


def write_raw(raw: Path, target: Path, splits: dict[str, list[Triple]], held_out: set[str]) -> None:
    """The raw folder without the held-out entities: their triples go, and with them their ids."""
    target.mkdir(parents=True, exist_ok=True)
    train = [triple for triple in splits["train"] if not held_out & {triple[0], triple[2]}]
    seen = {name for h, _, t in train for name in (h, t)}
    relations = {r for _, r, _ in train}
    for split in SPLITS:
        kept = [
            x
            for x in splits[split]
            if x[0] in seen and x[2] in seen and x[1] in relations and not held_out & {x[0], x[2]}
        ]
        (target / f"{split}.txt").write_text("".join("\t".join(triple) + "\n" for triple in kept), encoding="utf8")
    for path in raw.iterdir():
        if path.name in ("text.tsv", "numeric.tsv", "images.tsv", "images") and not (target / path.name).exists():
            _copy(path, target / path.name)


def members_of(raw: Path, work: Path, config: Config, names: set[str]) -> dict[str, dict[str, bytes]]:
    """The files of some entities as shards hold them, by packing the whole graph once."""
    whole = raw_without_ids(raw, work / "whole-raw")
    data = DataConfig(**(config.data.model_dump() | {"unseen": "keep", "allow_leakage": True, "raw": None}))
    dataset = pack_folder(whole, work / "whole", data)
    by_id = dict(enumerate(dataset.entity_names()))
    return {
        by_id[sample.id]: dict(sample.members)
        for shard in range(dataset.shards.num_shards)
        for sample in dataset.read_samples(shard, config.encoders.max_member_mb << 20)
        if by_id[sample.id] in names
    }


def raw_without_ids(raw: Path, target: Path) -> Path:
    """A raw folder's files, all but entity2id.txt."""
    target.mkdir(parents=True, exist_ok=True)
    for path in raw.iterdir():
        if path.name not in ("entity2id.txt", "README.md", "SHA256SUMS") and not (target / path.name).exists():
            _copy(path, target / path.name)
    return target


class Task:
    """The held-out facts of one seed, by id of the bundle: held-out source, relation, direction, seen answer."""

    def __init__(self, bundle: Bundle, splits: dict[str, list[Triple]], held_out: list[str]) -> None:
        entity = {name: at for at, name in enumerate(bundle.entities.column.to_pylist())}
        relation = {name: at for at, name in enumerate(bundle.relations.column.to_pylist())}
        place = {name: at for at, name in enumerate(held_out)}
        rows = set()
        for h, r, t in (triple for split in SPLITS for triple in splits[split]):
            if r in relation and h in place and t in entity:
                rows.add((place[h], relation[r], 0, entity[t]))
            if r in relation and t in place and h in entity:
                rows.add((place[t], relation[r], 1, entity[h]))
        self.source, self.relation, self.direction, self.answer = np.array(sorted(rows), np.int64).reshape(-1, 4).T
        self.num_entities = bundle.num_entities

    def ranks(self, scores: Iterator[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Filtered ranks, from the scores (E,) of each fact's question."""
        ranks = np.empty(len(self.source))
        for at, score in enumerate(scores):
            same = (
                (self.source == self.source[at])
                & (self.relation == self.relation[at])
                & (self.direction == self.direction[at])
            )
            wanted = score[self.answer[at]]
            others = np.delete(score, self.answer[same])
            ranks[at] = 1 + (others > wanted).sum() + (others == wanted).sum() / 2
        return ranks

    def model_scores(self, bundle: Bundle, vector_nD: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Scores by the bundle's vectors and those of the held-out entities."""
        asked = Asked(np.full(len(self.source), -1), self.relation, self.direction, vector_nD[self.source])
        query_QD = rotated(bundle, asked)
        for query_D in query_QD:
            yield -np.concatenate([distances(part, query_D[None])[0] for part in bundle.vector_parts])

    def blend_scores(self, bundle: Bundle, entities: list[UnseenEntity]) -> Iterator[NDArray[np.float32]]:
        """Scores by the bundle's blend of the model and the evidence."""
        for start in range(0, len(self.source), 64):
            block = slice(start, start + 64)
            some = [entities[at] for at in self.source[block]]
            units = {
                name: np.stack([one.units.get(name, np.zeros(width, np.float32)) for one in some])
                for name, width in (bundle.evidence.about["spaces"] if bundle.evidence else {}).items()
                if any(name in one.units for one in some)
            }
            vector_QD = np.stack([one.vector_D for one in some])
            asked = Asked(np.full(len(some), -1), self.relation[block], self.direction[block], vector_QD, units)
            parts = [score_Qn for _, score_Qn in all_scores(bundle, asked, rotated(bundle, asked))]
            yield from np.concatenate(parts, axis=1)

    def frequency_scores(self, train_T3: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """How often train has each entity as the answer of the relation in this direction."""
        tables = {}
        for relation, direction in zip(self.relation.tolist(), self.direction.tolist(), strict=True):
            if (relation, direction) not in tables:
                answers = train_T3[train_T3[:, 1] == relation, 2 - 2 * direction]
                tables[relation, direction] = np.bincount(answers, minlength=self.num_entities).astype(np.float32)
            yield tables[relation, direction]


def run_seed(
    args: argparse.Namespace,
    seed: int,
    dropout: float,
    splits: dict[str, list[Triple]],
    members: dict[str, dict[str, bytes]],
) -> None:
    """Train, export, encode the held-out entities, rank, and write the rows."""
    held_out = sorted(hold_out(splits, set(members), args.share, seed))
    work = args.out / f"seed-{seed}"
    write_raw(args.raw, work / "raw", splits, set(held_out))
    run = work / f"run-dropout-{dropout:g}"
    quoted = lambda path: json.dumps(str(path.absolute()))  # noqa: E731
    overrides = [
        f"data.raw={quoted(work / 'raw')}",
        f"data.dataset={quoted(work / 'dataset')}",
        f"run.dir={quoted(run)}",
    ]
    overrides += [
        "launch.mode=local",
        "deepspeed.engine=torch",
        "data.unseen=skip",
        f"train.seed={seed}",
        f"train.structure_dropout={dropout}",
        *args.set,
    ]
    config = resolve_paths(load_config(args.config, overrides))
    started = time.monotonic()
    report = train(config)
    seconds = time.monotonic() - started
    saved = Checkpoints(run).find("auto", best=True)
    assert saved is not None
    export_bundle(RunRows(config, open_dataset(config.data), saved), run / "bundle")
    bundle = Bundle.open(run / "bundle")
    encoder = UnseenEntityEncoder(bundle)
    features = []
    for name in held_out:
        found = {m: encoder.features(members[name], m, strict=False) for m in bundle.modalities if m != "structure"}
        features.append({m: values for m, values in found.items() if values is not None})
    task = Task(bundle, splits, held_out)
    about: dict[str, Any] = {
        "graph": args.raw.name,
        "seed": seed,
        "structure_dropout": dropout,
        "epochs": config.train.epochs,
    }
    about |= {
        "held_out": len(held_out),
        "facts": len(task.source),
        "entities": bundle.num_entities,
        "modalities": bundle.modalities,
    }

    def tell(kind: str, metrics: dict[str, float], **more: Any) -> None:
        figures = {key: round(float(metrics[key]), 4) for key in ("mrr", "hits@1", "hits@10", "mr")}
        line = json.dumps({**about, "kind": kind, **figures, **more})
        print(line, flush=True)
        with (args.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    tell("transductive", report, seconds=round(seconds), valid_mrr=round(report["valid_mrr"], 4))
    tell("frequency", rank_metrics(task.ranks(task.frequency_scores(Dataset.open(work / "dataset").triples("train")))))
    plain, _ = encoder.encode(features, correct=False)
    tell("inductive", rank_metrics(task.ranks(task.model_scores(bundle, plain))))
    corrected, _ = encoder.encode(features)
    tell("inductive_map", rank_metrics(task.ranks(task.model_scores(bundle, corrected))))
    if bundle.evidence is not None:
        for kind, units in (
            ("blend_vector", [{}] * len(features)),
            ("blend", [encoder.units(one) for one in features]),
        ):
            entities = [UnseenEntity(*given) for given in zip(held_out, corrected, units, strict=True)]
            tell(kind, rank_metrics(task.ranks(task.blend_scores(bundle, entities))))


def main() -> None:
    """Parse and run all seeds, dropouts innermost, so that partial results compare."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--share", type=float, default=0.07, help="of the entities that are held out")
    parser.add_argument("--structure-dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--keep", action="store_true", help="keep the runs; only results.jsonl stays otherwise")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    splits = read_triples(args.raw)
    names = {name for split in SPLITS for h, _, t in splits[split] for name in (h, t)}
    members = members_of(args.raw, args.out, load_config(args.config, args.set), names)
    for seed in args.seeds:
        for dropout in args.structure_dropout:
            run_seed(args, seed, dropout, splits, members)
        if not args.keep:
            shutil.rmtree(args.out / f"seed-{seed}")


if __name__ == "__main__":
    main()
