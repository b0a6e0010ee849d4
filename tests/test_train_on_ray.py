"""From raw files to metrics under a local Ray with two workers and ZeRO-1, undisturbed.

Test_faults_on_ray.py disturbs it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "WDS_SECURE": "1",
}
SETTINGS = """
modalities: [structure, text, numeric]
compile: "off"
encoders: {text: {model: tiny-random, random_weights: true}}
experts: {width: 8, num_experts: 2}
mine: {hidden: 4}
rotate: {gamma: 4}
negatives: {count: 16, chunk_size: 16}
train: {batch_size: 64, epochs: 6, eval_every: 3, checkpoint_every: 3, log_every: 9, learning_rate: 0.01}
entities: {learning_rate: 0.05}
deepspeed: {engine: deepspeed, stage: 1}
launch: {workers: 2, max_failures: 0}
"""
METRICS = ("mrr", "hits@1", "hits@3", "hits@10", "mr", "head", "tail", "num_queries")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Command:
    """A command in a process of its own."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ENVIRONMENT
        folder.mkdir(exist_ok=True)
        self.errors = folder / "stderr.txt"
        command = [sys.executable, "-m", *map(str, arguments)]
        # When each of its lines came, and the line, after the start.
        self.heard = [(time.monotonic(), "")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
        self.listener = threading.Thread(target=self._listen, args=(self.process.stderr,))
        self.listener.start()

    def _listen(self, stream: IO[str]) -> None:
        with self.errors.open("w") as errors:
            for line in stream:
                self.heard.append((time.monotonic(), line))
                errors.write(line)
                errors.flush()

    def end(self, timeout_s: float = 400) -> tuple[int, str]:
        """Exit code and the last line of its output."""
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        self.process.wait(timeout_s)
        self.listener.join(timeout_s)
        self.heard.append((time.monotonic(), ""))
        self.output = output
        return self.process.returncode, output.strip().splitlines()[-1] if output.strip() else ""


def tensors(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").glob("step_*/MANIFEST.json")).parent
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.fixture(scope="module")
def first_run(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command on raw files, undisturbed."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "tiny.yaml").write_text(SETTINGS)
    run_dir = folder / "run"
    command = Command(
        folder,
        "mocme_dist.train",
        "--config",
        folder / "tiny.yaml",
        "--set",
        f"data.raw={tiny_raw}",
        f"run.dir={run_dir}",
    )
    listening: dict[str, set[str]] = {}
    watching = threading.Thread(target=watch, args=(command.process, listening))
    watching.start()
    try:
        code, last = command.end()
    finally:
        command.process.kill()
        watching.join()
    assert code == 0, command.errors.read_text()[-3000:]
    (folder / "report.json").write_text(last)
    (folder / "stdout.txt").write_text(command.output)
    (folder / "heard.json").write_text(json.dumps(command.heard))
    (folder / "listening.json").write_text(json.dumps({name: sorted(found) for name, found in listening.items()}))
    return run_dir


def test_nothing_but_our_lines_and_no_long_silence(first_run):
    heard = json.loads((first_run.parent / "heard.json").read_text())
    foreign = [line for _, line in heard if line and not re.match(r"\d\d:\d\d:\d\d \S", line)]
    assert foreign == [] and not any("\x1b" in line for _, line in heard)
    assert len((first_run.parent / "stdout.txt").read_text().splitlines()) == 1
    silences = [(now - before, line) for (before, _), (now, line) in itertools.pairwise(heard)]
    # On a machine with other work everything, the signs of life too, comes so much later.
    slower = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert max(silences)[0] <= 10 * slower, max(silences)


def watch(process: subprocess.Popen[str], listening: dict[str, set[str]]) -> None:
    """Add the addresses on which the command and its descendants listen while it runs, by the names of processes."""
    while process.poll() is None:
        with suppress(psutil.Error):
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with suppress(psutil.Error):
                    title = " ".join(each.cmdline())[:60]
                    found = [one.laddr.ip for one in each.net_connections("tcp") if one.status == "LISTEN"]
                    listening.setdefault(title, set()).update(address.removeprefix("::ffff:") for address in found)
        time.sleep(1)


def test_while_it_trains_nothing_of_it_listens_beyond_loopback(first_run):
    listening = json.loads((first_run.parent / "listening.json").read_text())
    ranks = [addresses for title, addresses in listening.items() if "RayTrainWorker" in title]
    assert ranks and all(ranks), listening.keys()
    assert {title: found for title, found in listening.items() if set(found) - {"127.0.0.1", "::1"}} == {}
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or token.stat().st_mode & 0o777 == 0o600


def test_the_command_packs_extracts_trains_and_prints_one_json_object(first_run):
    report = json.loads((first_run.parent / "report.json").read_text())
    assert report == json.loads((first_run / "metrics.json").read_text())
    assert {*METRICS, "split", "valid_mrr", "step"} <= report.keys() and report["num_queries"] == 72
    assert (first_run / "dataset" / "manifest.json").is_file()
    assert {path.name for path in (first_run / "dataset" / "features").iterdir()} == {"text", "numeric"}
    # Ray's own watcher complains where another Ray runs on the machine.
    lines = [
        line
        for line in (first_run.parent / "stderr.txt").read_text().splitlines()
        if "PlacementGroupCleaner" not in line
    ]
    assert any("2 rank(s) on cpu, DeepSpeedEngine ZeRO-1" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
    assert {"rows-00000.safetensors", "rows-00001.safetensors", "dense.safetensors"} == tensors(first_run).keys()


def test_one_process_without_ray_gets_the_metrics_of_two_workers(first_run, tmp_path):
    command = Command(
        tmp_path, "mocme_dist.evaluate", first_run, "--set", "launch.mode=local", "deepspeed.engine=torch"
    )
    code, last = command.end()
    assert code == 0, command.errors.read_text()[-3000:]
    report, before = json.loads(last), json.loads((first_run.parent / "report.json").read_text())
    assert "ray: " not in command.errors.read_text() and report["step"] == before["step"]
    for name in METRICS:
        assert report[name] == pytest.approx(before[name], abs=1e-9), name
