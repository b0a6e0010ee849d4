"""Short runs on the small data set: one configuration, and what of a run two runs must have in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mocme_dist.config import Config, load_config
from mocme_dist.train import resolve_paths

# 576 queries: 9 steps an epoch, the last one of 64.
TINY = (
    "launch.mode=local",
    "deepspeed.engine=torch",
    "compile=off",
    "experts.width=8",
    "experts.num_experts=2",
    "experts.residual=false",
    "projection.structure=mlp",
    "negatives.weighting=entropy",
    "mine.every=1",
    "mine.hidden=4",
    "rotate.gamma=4",
    "negatives.count=16",
    "negatives.chunk_size=16",
    "train.batch_size=64",
    "train.epochs=3",
    "train.eval_every=1",
    "train.checkpoint_every=1",
    "train.log_every=3",
    "train.learning_rate=0.01",
    "entities.learning_rate=0.05",
    "evaluation.tile_rows=16",
    "evaluation.query_block=16",
    "evaluation.encode_rows=16",
    "evidence.spaces=[]",
)
STEPS_PER_EPOCH = 9


def tiny_config(dataset: Path, run_dir: Path, *overrides: str) -> Config:
    """The configuration of a tiny local run; later overrides win."""
    paths = (f"data.dataset={json.dumps(str(dataset))}", f"run.dir={json.dumps(str(run_dir))}")
    return resolve_paths(load_config([], [*TINY, *paths, *overrides]))


def final_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint; files of equal content hold equal bits."""
    folder = run_dir / "checkpoints" / f"step_{step:010d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, read as strict JSON."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; a step that stands twice is an error."""
    lines = [line for line in curve(run_dir) if "train/loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), [line["step"] for line in lines]
    return {line["step"]: line["train/loss"] for line in lines}
