"""The wheel alone, installed outside the checkout, takes a raw folder to answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANYWHERE = shutil.ignore_patterns("*.egg-info", "__pycache__")
AT_THE_TOP = {".git", ".venv", "runs", "bundles", "tests", "build"}


def left_out(folder: str, names: list[str]) -> set[str]:
    """Names that are not copied; `runs` is a folder of results at the top and a package in `mocme_dist`."""
    return ANYWHERE(folder, names) | (AT_THE_TOP & set(names) if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # setuptools writes into the tree that it builds: a copy.
    source = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=left_out))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed in this environment: no wheel can be built")
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_carries_configurations_kernels_and_type_hints(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"mocme_dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    sources = {
        str(path.relative_to(ROOT))
        for ending in ("*.cpp", "*.h", "*.py", "page/*.*")
        for path in (ROOT / "mocme_dist").rglob(ending)
    }
    assert shipped | sources | {"mocme_dist/py.typed", "mocme_dist/importers/mmkg.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


@pytest.mark.slow
def test_the_installed_wheel_goes_from_raw_files_to_answers(wheel, tiny_raw, tmp_path):
    """An environment with the wheel; its dependencies are those of the environment that runs the tests."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    places = dict.fromkeys(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text("\n".join(places), encoding="utf8")
    outside = tmp_path / "outside"
    outside.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def mocme(*arguments: object) -> str:
        command = [str(home / "bin" / "python"), "-m", "mocme_dist.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=outside, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = [
        "launch.mode=local",
        "modalities=[structure, numeric]",
        "experts.width=16",
        "train.epochs=1",
        "compile=off",
    ]
    batch = ["train.batch_size=128", "negatives.chunk_size=64", "negatives.count=16", "deepspeed.engine=torch"]
    mocme("pack", tiny_raw, "packed")
    mocme("extract", "packed", "--local", "--modalities", "numeric")
    mocme("train", "--config", "worldfacts", "--set", "data.dataset=packed", "run.dir=run", *small, *batch)
    mocme("export", "run", "bundle")
    answers = json.loads(mocme("query", "bundle", "--head", "item 05", "--relation", "near", "--json", "--top", "3"))
    assert answers
    where = subprocess.run(
        [str(home / "bin" / "python"), "-c", "import mocme_dist; print(mocme_dist.__file__)"],
        capture_output=True, text=True, cwd=outside, env=environment, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
