"""Extraction that is killed at random moments, actors and drivers, and run again, gives the bytes of an undisturbed
run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.pipeline import extract_features

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS, SHARD_ROWS = 24, 24
KILLS = int(os.environ.get("MOCME_KILLS", "1"))  # runs that lose an actor and then their driver; more make a soak
SETTINGS = {"encoders.text.model": "tiny-random", "encoders.text.random_weights": "true"}
ONE_POOL = {"encoders.actors": "2"}
TWO_POOLS = {"encoders.actors": "1", "encoders.decode_actors": "1"}  # actors that decode, and those that encode
STARTED: list[subprocess.Popen[str]] = []
# Ray by the command's own means, in a folder of this test: paths of sockets may have 107 characters
DRIVER = """
import sys
import ray
folder = sys.argv.pop(1)
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000,
         log_to_driver=False, _temp_dir=folder)
import mocme_dist.commands, mocme_dist.extract
mocme_dist.commands.run_command(mocme_dist.extract.main)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in many small shards, long enough that a run takes seconds."""
    raw = tmp_path_factory.mktemp("kill") / "raw"
    raw.mkdir()
    gen = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    names = [f"e{i}" for i in range(NUM_SHARDS * SHARD_ROWS)]
    (raw / "train.txt").write_text(
        "".join(f"{name}\tnext\t{names[(i + 1) % len(names)]}\n" for i, name in enumerate(names))
    )
    (raw / "valid.txt").write_text(f"{names[0]}\tnext\t{names[5]}\n")
    (raw / "test.txt").write_text(f"{names[1]}\tnext\t{names[6]}\n")
    (raw / "text.tsv").write_text(
        "entity\tlabel\n" + "".join(f"{name}\t{' '.join(gen.choices(words, k=150))}\n" for name in names)
    )
    return pack_folder(raw, raw.parent / "dataset", DataConfig(shard_rows=SHARD_ROWS)).directory


@pytest.fixture(scope="module")
def expected(packed: Path) -> dict[str, bytes]:
    """What an undisturbed run writes, without Ray."""
    copy = Path(shutil.copytree(packed, packed.parent / "undisturbed"))
    encoders = EncodersConfig.model_validate({"text": {"model": "tiny-random", "random_weights": True}})
    extract_features(Dataset.open(copy), encoders, None, ("text",), use_ray=False)
    return parts_of(copy)


@pytest.fixture
def directory(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "dataset"))


@pytest.fixture
def ray_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="mocme-k-")
    yield folder
    while STARTED:  # a test that failed leaves them; their Ray ends with them
        process = STARTED.pop()
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def parts_of(directory: Path) -> dict[str, bytes]:
    """Parts, their records and the manifest; temporary files of killed processes are none of them."""
    folder = directory / "features" / "text"
    return (
        {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        if folder.is_dir()
        else {}
    )


def start(directory: Path, ray_folder: str, pools: dict[str, str] = ONE_POOL) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, ray_folder, str(directory), "--modalities", "text"]
    command += ["--set", *(f"{key}={value}" for key, value in (SETTINGS | pools).items())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment
    )
    STARTED.append(process)
    return process


def wait_for_parts(directory: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many parts are done, or the run has ended by itself."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if done_in(directory) >= count or process.poll() is not None:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} parts within 400 seconds")


def done_in(directory: Path) -> int:
    return len(list(directory.glob("features/text/part-*.json")))


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its actors; Ray names a process after what it runs."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended in this moment
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if "MapWorker" in child.cmdline()[0]:
                    found.append(child)
    return found


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL, then wait until the Ray that it started is gone as well, but for what tries its last words on a dead
    head for minutes.
    """
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    agents = [child for child in family if title(child) in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([child for child in family if child not in agents], timeout=20)
    alive += agents
    for child in alive:  # Ray ends with its driver; on a busy machine not at once
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_row_41_killed_actors_and_drivers_leave_what_an_undisturbed_run_leaves(directory, ray_folder, expected):
    seed = int(os.environ.get("MOCME_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}: repeat with MOCME_SEED={seed}")
    gen = random.Random(seed)
    killed = []
    for _ in range(KILLS):
        process = start(directory, ray_folder, TWO_POOLS)
        wait_for_parts(directory, done_in(directory) + 1, process)
        time.sleep(gen.uniform(0, 0.05))
        if actors := actors_of(process):
            actor = gen.choice(actors)
            killed.append(f"actor {actor.pid}")
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(actor.pid, signal.SIGKILL)
            wait_for_parts(directory, done_in(directory) + gen.randint(1, 3), process)  # an actor takes its place
        if process.poll() is not None:
            finish(process)
            break
        killed.append(f"driver {process.pid}")
        kill_driver(process)
    times = {path.name: path.stat().st_mtime_ns for path in directory.glob("features/text/part-*.json")}
    found = parts_of(directory)
    assert killed and all(found[name] == expected[name] for name in found if name.endswith(".json"))
    report = finish(start(directory, ray_folder))
    assert parts_of(directory) == expected
    assert report["modalities"]["text"]["parts"] == {"done": NUM_SHARDS - len(times), "skipped": len(times)}
    for name, mtime in times.items():  # finished parts are not touched again
        assert (directory / "features" / "text" / name).stat().st_mtime_ns == mtime
    print(killed, f"{len(times)} of {NUM_SHARDS} parts were done before the last run")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_row_41_runs_of_one_pool_and_of_two_survive_their_actors_and_are_harmless_at_once(
    directory, ray_folder, expected
):
    other_folder = tempfile.mkdtemp(prefix="mocme-k-")
    try:
        first, second = start(directory, ray_folder, TWO_POOLS), start(directory, other_folder)
        wait_for_parts(directory, 1, first)
        for process in (first, second):
            if actors := actors_of(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(actors).pid, signal.SIGKILL)
        reports = [finish(process) for process in (first, second)]
    finally:
        shutil.rmtree(other_folder, ignore_errors=True)
    assert parts_of(directory) == expected
    for report in reports:
        assert report["modalities"]["text"]["present"] == NUM_SHARDS * SHARD_ROWS and report["n_skipped"] == 0
