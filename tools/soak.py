"""Disturbs a run repeatedly at random and verifies that nothing is lost: `python -m tools.soak --kills 20 --seed 1`.

A planted graph is trained once undisturbed, and once while ranks, the driver and the raylet get SIGKILL, SIGSTOP and
SIGTERM at random moments: during the start, between steps, while a checkpoint is written, in the final evaluation. A
command that has ended is started again, as a user would do; a stopped driver is continued after a few seconds.

Checked after each fault: the newest checkpoint loads, is not older than the one before, and at most one interval of
steps is repeated. Checked at the end: the tensors of the last checkpoint and of the blend, the loss of each step, the
metrics, the exported bundle and its answers are those of the undisturbed run, bit for bit. One export is killed, too.

Prints a line per fault and one JSON line; the exit code is 1 if a check fails, and the folder is kept then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.heartbeat import RankStatus, read_statuses
from mocme_dist.serving.bundle_format import MANIFEST
from mocme_dist.training import checkpoint

INTERVAL = 25
SETTINGS = (
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
    "evidence.spaces=all",
    "launch.max_failures=1000",
    "launch.wait_s=20",
)
# Ray Train looks at its workers five times per second, and their priority is that of this process (Ray lowers it by 15,
# which on a busy machine would measure the other load). All other settings are those of the package.
VARIABLES = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
WORKER, DRIVER, RAYLET = "worker", "driver", "raylet"
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
# Exit codes of a driver that a user would answer by starting the command again: lost Ray, preempted, killed.
AGAIN = (70, 75, -signal.SIGKILL)
# Longest time until the run makes steps again after any fault (seconds).
LIMIT_S = 900.0
ENTITIES, TRIPLES, RELATIONS = 300, 2400, 16
# Number of questions that both bundles are asked.
QUESTIONS = 50


class SoakError(Exception):
    """A promise that did not hold."""


@dataclass
class Fault:
    """One signal to one process.

    Attributes:
        stage: "start" without steps of the attempt, "steps", or "end" once the final evaluation has begun.
        reached: last step of metrics.jsonl before the signal.
        resumed: step from which the run went on; `reached` if it did not restart.
        recovery_s: time until ranks made steps again or the run ended; None if nothing had to recover.
    """

    victim: str
    signal: str
    stage: str
    reached: int
    resumed: int = 0
    recovery_s: float | None = None


class Run:
    """The disturbed run: its command, which is started again whenever it ends early, and all its processes."""

    def __init__(self, command: list[str], run_dir: Path, log: Path) -> None:
        self.command, self.run_dir, self.log = command, run_dir, log
        self.starts = self.newest = self.redone = 0
        self.known: dict[int, psutil.Process] = {}
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command."""
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=environment())

    def keep_going(self) -> bool:
        """Start the command again if a fault ended it; returns whether it has reached its end.

        Raises:
            SoakError: it ended with an exit code that no fault explains.
        """
        code = self.process.poll()
        if code is not None and code in AGAIN:
            self.process = self.start()
        elif code:
            raise SoakError(f"the command ended with exit code {code}; see {self.log}")
        return code == 0

    def descendants(self) -> list[psutil.Process]:
        """Return the living descendants of the command; all are remembered, because orphans change their parent."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        self.known |= {process.pid: process for process in below}
        return below

    def ranks(self) -> list[RankStatus]:
        """Return the heartbeats of the ranks of the newest attempt."""
        folders = sorted(self.run_dir.glob("ray/train-*/ranks"), key=lambda path: path.stat().st_mtime_ns)
        return read_statuses(folders[-1]) if folders else []

    def steps(self) -> list[tuple[int, float]]:
        """Return (step, loss) of each line of metrics.jsonl that has a loss; the last line may be half written."""
        found = []
        try:
            for line in (self.run_dir / "metrics.jsonl").read_text().splitlines():
                if "train/loss" in line:
                    row = json.loads(line)
                    found.append((int(row["step"]), float(row["train/loss"])))
        except (OSError, ValueError):
            pass
        return found

    def progress(self) -> int:
        """Return the last step that was logged."""
        return max((step for step, _ in self.steps()), default=0)

    def wait_for(self, step: int) -> bool:
        """Wait until the run is at `step`; returns False if it reached its end first."""
        deadline = time.monotonic() + LIMIT_S
        while self.progress() < step:
            if self.keep_going():
                return False
            if time.monotonic() > deadline:
                raise SoakError(f"no progress to step {step} in {LIMIT_S:g} s; see {self.log}")
            time.sleep(0.05)
        return True

    def strike(self, victim: str, number: signal.Signals, chance: random.Random) -> Fault | None:
        """Send a signal to a victim and wait until the run has recovered; None if there is no such victim now."""
        ranks = self.ranks()
        pid = self._pid(victim, ranks, chance)
        if pid is None:
            return None
        ended = any(status.ended for status in ranks)
        made = [status.step for status in ranks if status.step is not None]
        fault = Fault(victim, number.name, "end" if ended else "steps" if made else "start", self.progress())
        begun, resumptions = time.monotonic(), len(self._resumptions())
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return None
        if victim == DRIVER and number == signal.SIGSTOP:
            time.sleep(chance.uniform(1, 6))
            os.kill(pid, signal.SIGCONT)
            self._check(fault, None)
            return fault
        before = {status.pid for status in ranks}
        while not self._recovered(before):
            if time.monotonic() - begun > LIMIT_S:
                raise SoakError(f"{fault}: no steps again within {LIMIT_S:g} s; see {self.log}")
            time.sleep(0.05)
        fault.recovery_s = round(time.monotonic() - begun, 1)
        self._check(fault, resumptions)
        return fault

    def _pid(self, victim: str, ranks: list[RankStatus], chance: random.Random) -> int | None:
        if victim == DRIVER:
            return self.process.pid if self.process.poll() is None else None
        below = self.descendants()
        if victim == RAYLET:
            return next((process.pid for process in below if _name(process) == "raylet"), None)
        alive = {process.pid for process in below}
        working = [status.pid for status in ranks if status.pid in alive]
        return chance.choice(working) if working else None

    def _recovered(self, before: set[int]) -> bool:
        """Return whether new processes make steps, or the run has ended."""
        if self.keep_going():
            return True
        self.descendants()
        now = self.ranks()
        fresh = bool(now) and not before & {status.pid for status in now}
        return fresh and len(now) == now[0].world_size and all(status.step is not None for status in now)

    def _resumptions(self) -> list[int]:
        """Return the step of each resumption in the log."""
        return [int(step) for step in re.findall(r"resuming from step (\d+) of", self.log.read_text(errors="replace"))]

    def _check(self, fault: Fault, restarted: int | None) -> None:
        """Verify the newest checkpoint, and how many steps were repeated.

        Args:
            restarted: number of resumptions before the fault, None if the fault restarts nothing.

        Raises:
            SoakError: it is older than before, or the run went on too far behind the step that it had reached.
        """
        saved = Checkpoints(self.run_dir).find("auto")
        newest = 0 if saved is None else saved.step
        if saved is not None:
            checkpoint.load_dense(saved)
        resumed = self._resumptions()
        if restarted is None or self.process.poll() == 0:
            fault.resumed = fault.reached
        else:
            fault.resumed = resumed[-1] if len(resumed) > restarted else 0
        if newest < self.newest or fault.reached - fault.resumed > INTERVAL:
            raise SoakError(f"{fault}: checkpoints were at step {self.newest} before, now at {newest}; see {self.log}")
        self.newest = newest
        self.redone = max(self.redone, fault.reached - fault.resumed)

    def clean_up(self) -> None:
        """End every process that the run has started, stopped ones too."""
        self.descendants()
        self.process.kill()
        self.process.wait()
        for process in self.known.values():
            try:
                process.kill()  # psutil compares start times: never a stranger with a reused id
            except psutil.NoSuchProcess:
                continue


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def environment() -> dict[str, str]:
    """Return the variables of the commands; no cluster of somebody else is joined."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | VARIABLES


def call(log: Path, *arguments: object) -> None:
    """Run a module of Python to its end.

    Raises:
        SoakError: its exit code is not 0.
    """
    with log.open("ab") as file:
        code = subprocess.run([sys.executable, "-m", *map(str, arguments)], stdout=file, stderr=file, env=environment())
    if code.returncode:
        raise SoakError(f"{arguments[0]}: exit code {code.returncode}; see {log}")


def deck(kills: int, chance: random.Random) -> list[tuple[str, signal.Signals]]:
    """Return `kills` faults in random order; each kind appears as often as the others, give or take one."""
    kinds = [(victim, number) for victim in (WORKER, DRIVER, RAYLET) for number in SIGNALS]
    found: list[tuple[str, signal.Signals]] = []
    while len(found) < kills:
        found += chance.sample(kinds, len(kinds))
    return found[:kills]


def disturb(run: Run, faults: list[tuple[str, signal.Signals]], last: int, chance: random.Random) -> list[Fault]:
    """Send all faults at random moments, and wait for the end of the run; returns what happened."""
    done: list[Fault] = []
    # The last fault hits the final evaluation; one in five comes a few seconds after the one before, in the start.
    targets = sorted(chance.randrange(1, last - INTERVAL) for _ in faults[1:])
    for (victim, number), target in zip(faults, [*targets, last], strict=True):
        deadline = time.monotonic() + LIMIT_S
        early = target != last and chance.random() < 0.2
        if not early and not run.wait_for(target):
            raise SoakError(f"the run ended before {len(faults)} faults; use more --epochs")
        time.sleep(chance.uniform(0, 6) if early else chance.uniform(0, 0.3))
        while (fault := run.strike(victim, number, chance)) is None:
            if run.keep_going() or time.monotonic() > deadline:
                raise SoakError(f"found no {victim} to disturb; see {run.log}")
            time.sleep(0.05)
        done.append(fault)
        print(f"fault {len(done)} of {len(faults)}: {json.dumps(asdict(fault))}", flush=True)
    deadline = time.monotonic() + LIMIT_S
    while not run.keep_going():
        if time.monotonic() > deadline:
            raise SoakError(f"no end within {LIMIT_S:g} s after the last fault; see {run.log}")
        time.sleep(0.1)
    return done


def tensors(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor file of the newest checkpoint, and of the blend."""
    newest = max((run_dir / "checkpoints").glob("step_*/MANIFEST.json")).parent
    files = [*sorted(newest.glob("*.safetensors")), run_dir / "blend.safetensors"]
    return {f"{path.parent.name if path.parent == newest else ''}/{path.name}": _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(run_dir: Path) -> dict[str, Any]:
    """Return the metrics of the report without the times, and the loss of each step."""
    report = json.loads((run_dir / "metrics.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    return {"metrics": {key: value for key, value in report.items() if "second" not in key}, "losses": losses}


def bundle(folder: Path, run_dir: Path, name: str, chance: random.Random | None) -> dict[str, str]:
    """Export a run and ask its bundle; returns the SHA-256 of each file of the bundle and of the answers.

    Args:
        chance: given, the first export is killed after up to three seconds, and the same command continues it.
    """
    place, log = folder / "bundle", folder / f"{name}.log"
    shutil.rmtree(place, ignore_errors=True)
    if chance is not None:
        with log.open("ab") as file:
            command = [sys.executable, "-m", "mocme_dist.export", str(run_dir), str(place)]
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
        time.sleep(chance.uniform(0.5, 3))
        process.kill()
        process.wait()
    call(log, "mocme_dist.export", run_dir, place)
    questions, answers = folder / "questions.tsv", folder / f"{name}.jsonl"
    questions.write_text("".join(f"e{number}\tr{number % RELATIONS}\t?\n" for number in range(QUESTIONS)))
    call(log, "mocme_dist.query", place, "--queries", questions, "--output", answers)
    found = {path.name: _sha256(path) for path in sorted(place.rglob("*")) if path.is_file()}
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["metrics"].pop("seconds")  # the time since the last start
    return {**found, MANIFEST: json.dumps(manifest, sort_keys=True), "answers": _sha256(answers)}


def compare(what: str, disturbed: Any, undisturbed: Any) -> None:
    """Raise SoakError, and name the keys, if two results differ."""
    if disturbed != undisturbed or not disturbed:
        keys = [key for key in {**disturbed, **undisturbed} if disturbed.get(key) != undisturbed.get(key)]
        raise SoakError(f"{what} differ from those of the undisturbed run: {', '.join(keys) or 'nothing was written'}")


def median(faults: list[Fault], victim: str, number: signal.Signals) -> float | None:
    """Return the median recovery of one kind of fault at any stage but the start (seconds)."""
    times = [
        fault.recovery_s
        for fault in faults
        if (fault.victim, fault.signal) == (victim, number.name) and fault.stage != "start" and fault.recovery_s
    ]
    return round(statistics.median(times), 1) if times else None


def soak(folder: Path, kills: int, seed: int, workers: int, epochs: int) -> dict[str, Any]:
    """Train twice in `folder`, compare everything, and return figures.

    Raises:
        SoakError: a promise did not hold.
    """
    chance = random.Random(seed)
    run_dir, whole = folder / "run", folder / "undisturbed"
    sizes = ("--entities", ENTITIES, "--triples", TRIPLES, "--relations", RELATIONS)
    call(folder / "graph.log", "tools.make_synthetic", folder / "graph", *sizes, "--packed", "--modalities", "text")
    settings = [*SETTINGS, f"train.epochs={epochs}", f"launch.workers={workers}"]
    settings += [f"data.dataset={folder / 'graph'}", f"run.dir={run_dir}"]
    arguments = ["mocme_dist.train", "--set", *settings]
    begun = time.monotonic()
    call(folder / "undisturbed.log", *arguments)
    undisturbed_s = time.monotonic() - begun
    expected = tensors(run_dir), results(run_dir), bundle(folder, run_dir, "undisturbed", None)
    run_dir.rename(whole)  # both runs have the same path, which their records contain
    last = expected[1]["losses"][-1][0]
    begun = time.monotonic()
    run = Run([sys.executable, "-m", *arguments], run_dir, folder / "run.log")
    try:
        faults = disturb(run, deck(kills, chance), last, chance)
    finally:
        run.clean_up()
    seconds = time.monotonic() - begun
    compare("tensors", tensors(run_dir), expected[0])
    compare("metrics and losses", results(run_dir), expected[1])
    compare("bundle and answers", bundle(folder, run_dir, "run", chance), expected[2])
    return {
        "kills": len(faults),
        "survived": len(faults),
        "seed": seed,
        "workers": workers,
        "steps": last,
        "starts": run.starts,
        "faults": dict(Counter(f"{fault.victim} {fault.signal}" for fault in faults)),
        "stages": dict(Counter(fault.stage for fault in faults)),
        "most_steps_repeated": run.redone,
        "interval": INTERVAL,
        "exact": True,
        "recovery_p50_worker_killed_s": median(faults, WORKER, signal.SIGKILL),
        "recovery_p50_worker_hung_s": median(faults, WORKER, signal.SIGSTOP),
        "recovery_longest_s": max((fault.recovery_s or 0.0 for fault in faults), default=0.0),
        "undisturbed_s": round(undisturbed_s, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parse the command line, disturb a run, and print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of faults; default 20")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments; default 0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--epochs",
        type=int,
        default=120,
        help="68 steps each; a stopped raylet lets the run make 2,000 more; default 120",
    )
    parser.add_argument("--folder", type=Path, help="work there, and keep it; default: a temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mocme-soak-")) if args.folder is None else args.folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, in {folder}", flush=True)
    try:
        figures = soak(folder, args.kills, args.seed, args.workers, args.epochs)
    except SoakError as error:
        sys.exit(f"not survived: {error}")
    if args.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
