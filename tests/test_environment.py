"""A Python without the packages: one line that says which environment to activate, whatever the command."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocme_dist import environment

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("pack", "extract", "train", "evaluate", "export", "query")
# What a command imports before it reads its arguments, with what these import.
FIRST = ("numpy", "numpy.libs", "pydantic", "pydantic_core", "yaml", "typing_extensions", "annotated_types")
FIRST += ("typing_inspection",)


def bare(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python without its site-packages; the checkout is found, and what lies in `path`."""
    found = ":".join(map(str, [ROOT, *([path] if path else [])]))
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, env={"PYTHONPATH": found}, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_forgotten_environment_is_one_line_with_the_remedy(command):
    done = bare("-m", f"mocme_dist.{command}", "some", "words")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ConfigError: numpy, pydantic, pydantic_core, ")
    assert ", yaml are not installed for " in done.stderr
    assert done.stderr.count("\n") == 1 and ".venv/bin/activate" in done.stderr


def test_a_package_that_is_met_later_is_named_as_well(tiny_raw, tiny_dataset, tmp_path):
    """Such as torch, which no command imports before it has read its arguments."""
    for name in FIRST:
        spec = importlib.util.find_spec(name) if "." not in name else None
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin)
            source = source.parent if source.name == "__init__.py" else source
            (tmp_path / source.name).symlink_to(source)
        elif "." in name:
            (tmp_path / name).symlink_to(Path(str(importlib.util.find_spec("numpy").origin)).parents[1] / name)  # type: ignore[union-attr]
    arguments = {
        "pack": ("pyarrow", [str(tiny_raw), str(tmp_path / "out")]),
        # Names are read, by pyarrow, only from a data set that was not verified before.
        "extract": ("(torch|pyarrow)", [str(tiny_dataset), "--local"]),
        "train": ("torch", ["--set", f"data.raw={tiny_raw}", f"run.dir={tmp_path / 'run'}"]),
    }
    for command, (package, words) in arguments.items():
        done = bare("-m", f"mocme_dist.{command}", *words, path=tmp_path)
        assert done.returncode == 2, (command, done.stderr)
        last = done.stderr.splitlines()[-1]
        assert re.match(f"error: ConfigError: {package} is not installed for ", last), (command, last)
        assert "Traceback" not in done.stderr and "report" not in done.stderr, (command, done.stderr)


def test_the_remedy_fits_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.remedy(["torch"]).endswith("pip install mocme-dist")
    (tmp_path / "Makefile").touch()
    assert f"make -C {tmp_path} env && . {tmp_path}/.venv/bin/activate" in environment.remedy(["torch"])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert (
        environment.remedy(["torch", "ray"])
        == f"torch, ray are not installed for {sys.executable}; activate the environment: ."
        f" {tmp_path}/.venv/bin/activate"
    )


def test_a_library_that_wants_the_package_only_is_left_alone():
    done = bare("-c", "import mocme_dist; print(mocme_dist.__version__)")
    assert done.returncode == 0 and done.stderr == ""


def test_the_readme_names_the_compiler_and_what_happens_without():
    """Beside the two commands, and in the words of the program."""
    section = (ROOT / "README.md").read_text().split("\n## Two commands\n", 1)[1].split("\n## ", 1)[0]
    section = " ".join(section.split())
    assert "apt install g++ python3-dev" in section and "Without the compiler" in section
    assert (
        "about a hundred times" in section
        and "about a hundred times slower" in (ROOT / "mocme_dist" / "training" / "build.py").read_text()
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_command_imports_its_modules_ends_it_with_75(name):
    command = "import os, signal, sys; from mocme_dist import environment; "
    command += "sys.orig_argv = ['python', '-m', 'mocme_dist.train']; environment.end_on_signals(); "
    command += f"os.kill(os.getpid(), signal.{name})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 75 and done.stderr == f"error: interrupted ({name}); run the same command again\n"


def test_another_program_that_imports_the_package_keeps_its_signals():
    command = "import signal, mocme_dist; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("soft, hard, code", [(16, 16, 2), (64, 4096, 0)])
def test_a_low_limit_of_open_files_is_raised_or_named(soft, hard, code):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"
    command = [sys.executable, "-c", f"{limit}; from mocme_dist.environment import few_open_files as f; print(f())"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("may open 16 files, expected 512 or more; raise the limit: ulimit -n 512" in done.stdout) == bool(code)


def test_a_cache_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    """For compiled kernels, mirrors and the record of verified files alike."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in (("~/cache", tmp_path / "cache"), ("", tmp_path / ".cache" / "mocme_dist")):
        monkeypatch.setenv("MOCME_CACHE", value)
        assert environment.cache_folder() == folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOCME_CACHE", "here")
    assert environment.cache_folder() == tmp_path / "here"
