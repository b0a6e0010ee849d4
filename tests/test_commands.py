"""The commands as a user meets them.

Help at once, one block and the right code for a mistake, and one run at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocme_dist import commands
from mocme_dist.config import load_config
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.train import resolve_paths

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("pack", "extract", "train", "evaluate")
HEAVY = ("torch", "ray", "deepspeed", "transformers", "tensorboard", "torchvision", "pyarrow", "webdataset")
TINY = [
    "--set",
    "launch.mode=local",
    "compile=off",
    "deepspeed.engine=torch",
    "experts.width=8",
    "train.epochs=1",
    "modalities=[structure]",
]


def run(*arguments: object, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process of its own, and the CPU seconds that it took: the wall clock says more of the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "MASTER_ADDR")
    } | environment
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fails(code: int, message: str, *arguments: object, within_s: float = 5) -> None:
    """`train` ends with `code` in less than five seconds of CPU, with `message` in its last line and
    nothing after it.
    """
    done, seconds = run("mocme_dist.train", *arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert re.search(message, last), last
    assert last.startswith("error: ") and "Traceback" not in done.stderr and done.stdout == ""
    assert seconds < within_s


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once_and_says_enough_to_work_from(command):
    done, seconds = run(f"mocme_dist.{command}", "--help")
    assert done.returncode == 0 and done.stderr == "" and seconds < 2
    for words in (
        "--config FILE",
        "--set KEY.PATH=VALUE",
        "exit codes: 0 done, 2 configuration",
        "`mocme config` prints all settings",
    ):
        assert words in done.stdout
    for name in {
        "pack": ("RAW_DIR", "--shard-rows", "--seed"),
        "train": ("--resume",),
        "evaluate": ("RUN_DIR", "--split"),
    }.get(command, ()):
        assert name in done.stdout


def test_parsing_a_command_line_imports_nothing_heavy():
    code = (
        "import sys, runpy\n"
        f"for name in {COMMANDS!r}:\n"
        "    sys.argv = [name, '--help']\n"
        "    try: runpy.run_module(f'mocme_dist.{name}', run_name='__main__')\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout[-200:] + done.stderr


def test_settings_that_are_wrong_leave_with_2_before_anything_is_made(tmp_path):
    where = f"run.dir={tmp_path / 'run'}"
    wrong = ["train.gradient_cliping=1", "train.epochs=0"]
    fails(2, r"train.gradient_cliping: unknown key; did you mean gradient_clipping\?", "--set", where, *wrong)
    fails(2, r"train.epochs: .* greater than or equal to 1, got 0", "--set", where, *wrong)
    fails(2, r"none.yaml: configuration file cannot be read", "--config", tmp_path / "none.yaml", "--set", where)
    fails(2, r"neither data.raw nor data.dataset is set", "--set", where)
    fails(2, r"run.resume: expected auto, none, or the step", "--set", where, "--resume", "last")
    done, _ = run("mocme_dist.train", "--confg", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def train_raw(raw: Path, tmp_path: Path, *overrides: str) -> list[object]:
    return [*TINY, f"data.raw={raw}", f"run.dir={tmp_path / 'run'}", *overrides]


def test_a_missing_raw_file_leaves_with_3(raw_copy, tmp_path):
    (raw_copy / "test.txt").unlink()
    fails(3, r"raw/?.*test\.txt", *train_raw(raw_copy, tmp_path))
    fails(3, r"nowhere", *train_raw(tmp_path / "nowhere", tmp_path))
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3) and "nowhere" in status["error"]
    fails(3, r"empty|dataset", *TINY, f"data.dataset={tmp_path / 'empty'}", f"run.dir={tmp_path / 'run'}")


def test_a_wrong_number_of_columns_leaves_with_3_and_the_line(raw_copy, tmp_path):
    with (raw_copy / "train.txt").open("a") as file:
        file.write("item 01 near item 02\n")
    fails(3, r"train\.txt:289: expected 3 tab-separated fields .*, got 1", *train_raw(raw_copy, tmp_path))


def test_too_many_entities_without_any_modality_leave_with_3(raw_copy, tmp_path):
    # All is packed before it is known.
    fails(3, r"of 60 .*data.max_missing", *train_raw(raw_copy, tmp_path, "data.max_missing=0.01"), within_s=15)


def test_a_relation_that_train_never_shows_leaves_with_3_and_its_name(raw_copy, tmp_path):
    with (raw_copy / "test.txt").open("a") as file:
        file.write("item 01\tmarried to\titem 05\n")
    fails(3, r"married to", *train_raw(raw_copy, tmp_path))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_empty_split_leaves_with_3(raw_copy, tmp_path, split):
    (raw_copy / f"{split}.txt").write_text("")
    fails(3, rf"{split}", *train_raw(raw_copy, tmp_path))


def test_a_modality_that_the_data_set_lacks_leaves_with_3_before_ray_starts(tiny_dataset, raw_copy, tmp_path):
    (raw_copy / "images.tsv").unlink()
    arguments = train_raw(raw_copy, tmp_path, "modalities=[structure, image]", "launch.mode=ray")
    done, _ = run("mocme_dist.train", *arguments)
    assert (
        done.returncode == 3
        and "no image in this data set; it has structure" in done.stderr
        and "ray:" not in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_evaluation_of_what_is_no_run_leaves_with_its_code(tmp_path, tiny_dataset):
    done, _ = run("mocme_dist.evaluate", tmp_path)
    assert done.returncode == 2 and "not a run directory: no config.yaml in it" in done.stderr
    done, _ = run("mocme_dist.evaluate", tmp_path, "--step", "last")
    assert (
        done.returncode == 2 and "expected a step number, got 'last'" in done.stderr and "Traceback" not in done.stderr
    )
    (tmp_path / "config.yaml").write_text(f"data: {{dataset: {tiny_dataset}}}\nmodalities: [structure]\n")
    done, _ = run("mocme_dist.evaluate", tmp_path, *TINY)
    assert done.returncode == 4 and "no checkpoint; train first" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_of_something_else_is_left_untouched(tiny_dataset, tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    fails(2, r"not empty and not a run directory", *TINY, f"data.dataset={tiny_dataset}", f"run.dir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_folder_leaves_with_7(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    fails(
        7, r"file/run: cannot be created", *TINY, f"data.dataset={tiny_dataset}", f"run.dir={tmp_path / 'file' / 'run'}"
    )


def test_a_second_run_is_turned_away_and_a_dead_ones_lock_is_taken_over(tiny_dataset, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*TINY, f"data.dataset={tiny_dataset}", f"run.dir={run_dir}"]
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("of the first\n")
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2024-02-03 04:05:06"}
    (run_dir / "lock").write_text(json.dumps(lock))
    fails(
        6,
        rf"locked by process {os.getpid()} on \S+ since 2024-02-03 04:05:06; use another run.dir",
        *arguments,
        "train.seed=1",
    )
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "lock"]
    assert (run_dir / "config.yaml").read_text() == "of the first\n"
    # The same number, another process: as after a container's restart.
    (run_dir / "lock").write_text(json.dumps({**lock, "started": "1"}))
    done, _ = run("mocme_dist.train", *arguments)
    assert done.returncode == 0, done.stderr
    holder = rf"the lock of process {os.getpid()} on {re.escape(socket.gethostname())} since .*"
    assert re.search(rf"{holder}, which has ended, is taken over", done.stderr)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((run_dir / "metrics.json").read_text())
    assert not (run_dir / "lock").exists()


def test_a_signal_saves_a_checkpoint_and_leaves_with_75(tiny_dataset, tmp_path):
    overrides = [
        *TINY,
        f"data.dataset={tiny_dataset}",
        "train.epochs=400",
        "train.eval_every=400",
        "train.log_every=1",
        "negatives.chunk_size=16",
    ]
    overrides += ["train.batch_size=64", "train.checkpoint_every=400"]
    command = [sys.executable, "-m", "mocme_dist.train", *overrides, f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 200
        curve = tmp_path / "run" / "metrics.jsonl"
        while not (curve.exists() and curve.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    found = re.search(
        r"error: Preempted: stopped at step (\d+) of 3600; checkpoint saved; run the same command to continue", errors
    )
    assert found and "SIGTERM: saving a checkpoint after this step" in errors
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, int(found[1]))
    assert not (tmp_path / "run" / "lock").exists() and not (tmp_path / "run" / "stop").exists()
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{int(found[1]):010d}"
    assert (checkpoint / "MANIFEST.json").is_file()
    # A torn checkpoint and no other: nothing starts from scratch in silence.
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    next((tmp_path / "torn" / "checkpoints").glob("step_*/dense.safetensors")).write_bytes(b"")
    fails(
        4,
        r"no valid checkpoint: .*dense.safetensors has size 0",
        *overrides,
        f"run.dir={tmp_path / 'torn'}",
        within_s=30,
    )


@pytest.mark.slow
def test_processes_of_torchrun_share_one_run_and_one_of_them_reports(tiny_raw, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mocme_dist.train"]
    done, _ = run(*launcher, *TINY, f"data.raw={tiny_raw}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line)["num_queries"] for line in done.stdout.splitlines()] == [72]
    parts = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*/*.safetensors")}
    assert parts == {"rows-00000.safetensors", "rows-00001.safetensors", "dense.safetensors"}
    # One process reads what two wrote.
    done, _ = run("mocme_dist.evaluate", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["num_queries"] == 72


def test_errors_of_the_program_itself_keep_their_trace_and_leave_with_70(capsys):
    def broken() -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(SystemExit) as end:
        commands.run_command(broken)
    text = capsys.readouterr().err
    assert end.value.code == 70 and "Traceback" in text
    assert text.strip().splitlines()[-1].startswith("error: internal: ZeroDivisionError: by zero; ")


def test_errors_of_the_user_are_one_line(capsys):
    def broken() -> None:
        raise DataError("train.txt:3: expected 3 fields, got 2")

    with pytest.raises(SystemExit) as end:
        commands.run_command(broken)
    assert (
        end.value.code == 3 and capsys.readouterr().err == "error: DataError: train.txt:3: expected 3 fields, got 2\n"
    )


def test_an_interrupt_leaves_with_75(capsys):
    def broken() -> None:
        raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as end:
        commands.run_command(broken)
    for number, handler in previous.items():  # it leaves its own, which end the process with the same code
        assert signal.signal(number, handler) is not handler
    assert end.value.code == 75 and "run the same command again" in capsys.readouterr().err


@pytest.fixture
def in_a_job(tmp_path, monkeypatch) -> Path:
    """A driver of `ray job submit --working-dir`, in Ray's copy of the folder.

    The environment is that of a real one.
    """
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0a62fe48"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    about = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0a62fe48.zip"}, "metadata": {"job_submission_id": "x"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "module, arguments, refused",
    [
        ("train", ["--config", "{configs}/demo.yaml"], "run.dir=runs/demo"),
        ("train", ["--set", "run.dir=/data/run", "data.dataset=packed"], "data.dataset=packed"),
        ("train", ["--set", "run.dir=/data/run", "data.raw=raw"], "data.raw=raw"),
        ("train", ["--set", "run.dir=s3://bucket/run", "data.raw=raw", "--plan"], "data.raw=raw"),
        ("pack", ["raw", "/data/packed"], "RAW_DIR=raw"),
        ("pack", ["/data/raw", "packed"], "DATASET_DIR=packed"),
        ("extract", ["packed"], "DATASET_DIR=packed"),
        ("evaluate", ["runs/demo"], "RUN_DIR=runs/demo"),
        ("export", ["/data/run", "bundle"], "BUNDLE_DIR=bundle"),
    ],
)
def test_a_relative_path_in_a_job_of_ray_is_refused_before_anything_starts(
    module, arguments, refused, in_a_job, monkeypatch
):
    words = [word.format(configs=ROOT / "configs") for word in arguments]
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(ConfigError) as failed:
        importlib.import_module(f"mocme_dist.{module}").main()
    key, _, value = refused.partition("=")
    assert str(failed.value).startswith(
        f"{refused}: a relative path in a Ray job is one in a copy of the uploaded folder"
    )
    assert f"as in {key}=$PWD/{value} where you submit" in str(failed.value)
    assert list(in_a_job.iterdir()) == []


def test_a_job_without_an_uploaded_folder_is_told_the_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config([], ["run.dir=run", "data.dataset=/data/packed"])
    assert resolve_paths(config).run.dir == str(tmp_path / "run")  # in a shell
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {}}')
    with pytest.raises(ConfigError, match=rf"^run\.dir=run: .*, as in run\.dir={tmp_path}/run, or a URL$"):
        resolve_paths(config)
    there = load_config([], ["run.dir=s3://bucket/run", "data.dataset=/data/packed"])
    assert resolve_paths(there).run.dir == "s3://bucket/run"


def test_a_positional_argument_that_set_took_is_told(capsys):
    from mocme_dist.commands import command_parser

    parser = command_parser("evaluate", "")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--set", "compile=off", "runs/demo"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "RUN_DIR; --set and --config take every word up to the next option: put other arguments before them" in said


def test_an_unknown_level_of_the_log_is_a_mistake_of_configuration():
    done, _ = run("mocme_dist.config", MOCME_LOG="LOUD")
    assert done.returncode == 2
    assert done.stderr == "error: ConfigError: MOCME_LOG=LOUD: expected one of DEBUG, INFO, WARNING, ERROR\n"


@pytest.mark.parametrize("place", ["http://127.0.0.1:1/x", "https://127.0.0.1:1/x"])
def test_a_web_address_is_no_folder(place):
    with pytest.raises(ConfigError, match=r"run\.dir=https?://.*: web pages cannot be listed"):
        commands.absolute("run.dir", place)
