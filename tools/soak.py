"""Kills a run again and again at random and shows that nothing is lost: `python -m tools.soak --kills 20 [--local] [--seed N]`.

A tiny planted graph is trained once undisturbed and once with a rank or the driver killed (SIGKILL) at random points,
some of them while it starts. After each kill the newest checkpoint must verify and load, and must not be older than the
one before it; after each resumption at most one interval of steps is made again; the tensors of the last checkpoint must
be the undisturbed run's, bit for bit. Ends with one JSON line; exit code 1 when a law is broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mocme_dist.training import checkpoint
from mocme_dist.training.pulse import read_signs

INTERVAL = 25
SETTINGS = [
    "compile=off",
    "modalities=[structure, text]",
    "experts.width=16",
    "experts.num_experts=2",
    "mine.hidden=8",
    "negatives.count=16",
    "negatives.chunk_size=16",
    "train.batch_size=64",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.checkpoint_every=1000",
    f"train.checkpoint_steps={INTERVAL}",
    "launch.max_failures=1000",
]
HEALTH = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1"}


class Soak:
    """The disturbed run: its command, started as often as it is killed, and what is known of its past."""

    def __init__(self, command: list[str], run_dir: Path, log: Path) -> None:
        self.command, self.run_dir, self.log = command, run_dir, log
        self.starts = self.newest = self.redone = 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The same command, once more."""
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env={**os.environ, **HEALTH})

    def progress(self) -> int:
        """Last step of metrics.jsonl."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines if "train/loss" in line), default=0)
        except (OSError, ValueError):
            return 0

    def ranks(self) -> list[int]:
        """Process ids of the ranks at work; none without Ray, where the driver is the rank."""
        folders = sorted(self.run_dir.glob("ray/train-*/ranks"), key=lambda path: path.stat().st_mtime_ns)
        return [sign.pid for sign in read_signs(folders[-1])] if folders else []

    def wait_until(self, step: int, deadline_s: float = 300) -> None:
        """Until the run stands at `step`."""
        deadline = time.monotonic() + deadline_s
        while self.progress() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the run ended or stood still before step {step}; see {self.log}")
            time.sleep(0.02)

    def kill(self, victim: int) -> None:
        """One process, and the command anew when it was the driver."""
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return
        if victim == self.process.pid:
            self.process.wait()

    def check(self, reached: int) -> None:
        """The newest checkpoint loads, is not older than the one before, and is not far behind."""
        saved = checkpoint.find(self.run_dir / "checkpoints", "auto")
        step = 0 if saved is None else saved.step
        if saved is not None:
            checkpoint.load_dense(saved)
        if step < self.newest or reached - step > INTERVAL:
            sys.exit(f"newest checkpoint: step {step}; it was {self.newest} before, and the run had reached {reached}")
        self.newest, self.redone = step, max(self.redone, reached - step)


def hashes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the tensors of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.glob("*.safetensors"))}


def main() -> None:
    """Parse, train twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--local", action="store_true", help="one process without Ray")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mocme-soak-") as name:
        print(json.dumps(soak(Path(name), args.kills, args.seed, args.epochs, 0 if args.local else args.workers)))


def soak(folder: Path, kills: int, seed: int, epochs: int, workers: int) -> dict[str, object]:
    """Both runs in `folder`; `workers` 0 is one process without Ray. What happened, in figures."""
    chance = random.Random(seed)
    graph = ["--entities", "300", "--triples", "2400", "--packed", "--modalities", "text"]
    subprocess.run([sys.executable, "-m", "tools.make_synthetic", str(folder / "graph"), *graph], check=True, stdout=subprocess.DEVNULL)
    launch = [f"launch.workers={workers}"] if workers else ["launch.mode=local", "deepspeed.engine=torch"]
    base = [
        sys.executable,
        "-m",
        "mocme_dist.train",
        "--set",
        *SETTINGS,
        f"train.epochs={epochs}",
        f"data.dataset={folder / 'graph'}",
        *launch,
    ]
    with (folder / "undisturbed.log").open("wb") as log:
        subprocess.run([*base, f"run.dir={folder / 'undisturbed'}"], check=True, stdout=log, stderr=log, env={**os.environ, **HEALTH})
    last = max(int(path.name.removeprefix("step_")) for path in (folder / "undisturbed" / "checkpoints").glob("step_*"))
    run, started, drivers = Soak([*base, f"run.dir={folder / 'run'}"], folder / "run", folder / "run.log"), time.monotonic(), 0
    for number, target in enumerate(sorted(chance.randrange(1, last - 1) for _ in range(kills)), 1):
        early = chance.random() < 0.2
        if early:
            time.sleep(chance.uniform(0, 6))
        else:
            run.wait_until(target)
            time.sleep(chance.uniform(0, 0.2))
        victim = chance.choice([run.process.pid, *run.ranks()] if workers else [run.process.pid])
        reached = run.progress()
        run.kill(victim)
        run.check(reached)
        drivers += victim == run.process.pid
        who = "driver" if victim == run.process.pid else "a rank"
        print(f"kill {number}: {who} {'early' if early else ''} at step {reached}, newest checkpoint {run.newest}", flush=True)
        if victim == run.process.pid:
            run.process = run.start()
    code = run.process.wait(timeout=600)
    if code != 0 or hashes(folder / "run") != hashes(folder / "undisturbed"):
        sys.exit(f"exit code {code}; last tensors {'differ from' if code == 0 else 'were not reached as in'} the undisturbed run's")
    return {
        "kills": kills,
        "drivers": drivers,
        "seed": seed,
        "workers": workers or 1,
        "steps": last,
        "most_steps_redone": run.redone,
        "interval": INTERVAL,
        "exact": True,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    main()
