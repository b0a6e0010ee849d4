"""The shape of the package: which way imports run, who owns a heavy library, what no file may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mocme_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each may import those on lines above its own, and itself; `model` and `parallel` less than that.
LAYERS = [
    {"errors", "environment", "memory"},
    {"partition", "kernels", "console", "prefetch"},
    {"config"},
    {"data"},
    {"importers"},
    {"ray_loss"},
    {"cluster"},
    {"encoders", "batching", "model", "parallel"},
    {"evidence"},
    {"evaluation"},
    {"training"},
    {"observe"},
    {"runs"},
    {"serving"},
    {"commands"},
]
ONLY = {
    "kernels": {"errors", "environment"},
    "model": {"errors", "kernels"},
    "parallel": {"errors", "environment", "partition", "kernels"},
}
# The environment's variables: all reads and writes, and one write before torch is imported.
ENVIRONMENT = {"environment.py", "__init__.py"}
OWNERS = {
    "pyoxigraph": "importers/rdf.py",
    "faiss": "serving/export_formats.py",
    "webdataset": "data/shards.py",
    "ray.data": "encoders/pools.py",
    "torchvision": "encoders/image.py",
    "transformers": "encoders/pretrained.py",
    "PIL": "encoders/image_files.py observe/heat_map.py",  # decodes; draws
    "soundfile": "encoders/audio_files.py",
    "av": "encoders/video_files.py",
    "deepspeed": "training/deepspeed_engine.py",
    "fastapi": "serving/service.py serving/service_routes.py",
    "uvicorn": "serving/service.py",
    "prometheus_client": "serving/service_guard.py",
    "ray.serve": "serving/service_replicas.py",
    "ray.train": "runs/launch.py runs/ranks_on_ray.py",  # a class of it, and what makes one
    "tensorboard": "observe/log.py",
    "torch.utils.tensorboard": "observe/log.py",
    "matplotlib": "serving/report.py",
}
UNSAFE = {
    "pickle": r"^\s*(import|from)\s+(c?pickle|cloudpickle|dill|marshal|shelve)\b",
    "yaml.load": r"\byaml\.(unsafe_|full_)?load(_all)?\(",
    "unpickling": r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True",
    "torch.load": r"\btorch\.load\((?!.*weights_only\s*=\s*True)",
    "extraction": r"\.extractall\(|\.extract\(",
    "shell": r"shell\s*=\s*True|\bos\.system\(|\beval\(|\bexec\(",
}


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    # `python -m mocme_dist.config` is a command, whatever package it lies in.
    return parts[-1] if parts[-1] == "__main__" else parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Full names that a file imports anywhere, with their lines; `from a import b` gives a and a.b."""
    here = ("mocme_dist", *path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*(here[: len(here) - node.level] if node.level else ()), *([node.module] if node.module else [])]
            )
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(package: str) -> int:
    """Place in LAYERS; the top-level modules that are no layer of their own are commands."""
    return next((place for place, names in enumerate(LAYERS) if package in names), len(LAYERS) - 1)


def test_imports_run_downwards_only():
    wrong = []
    for path in FILES:
        mine = package_of(path)
        for line, name in imported(path):
            parts = name.split(".")
            if parts[0] != "mocme_dist" or len(parts) < 2 or parts[1] in (mine, "__version__"):
                continue
            theirs = parts[1]
            allowed = theirs in ONLY[mine] if mine in ONLY else layer_of(theirs) < layer_of(mine)
            if not allowed and not (layer_of(mine) == layer_of(theirs) == len(LAYERS) - 1):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {mine} imports {name}")
    assert wrong == []


def test_environment_variables_are_read_and_set_in_one_module():
    pattern = re.compile(r"\bos\.(environb?|getenvb?|putenv|unsetenv)\b|from os import .*env")
    users = {str(path.relative_to(PACKAGE)) for path in FILES if pattern.search(path.read_text(encoding="utf8"))}
    assert users == ENVIRONMENT


def test_the_package_holds_no_links():
    """A link becomes a plain file where a tree is copied without links, and what needs it breaks there."""
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("configs", "tools", "tests"))]
    assert [path for folder in folders for path in folder.rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_is_imported_in_its_one_file(library):
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for _, name in imported(path)
        if name == library or name.startswith(f"{library}.")
    }
    assert users <= set(OWNERS[library].split())


@pytest.mark.parametrize("what", UNSAFE)
def test_no_file_loads_or_runs_what_it_is_given(what):
    pattern = re.compile(UNSAFE[what])
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1)
        if pattern.search(line) and not re.search(r"\.eval\(\)", line)
    ]
    assert found == []


def test_torch_distributed_is_known_to_parallel_and_the_engine_only():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for _, name in imported(path)
        if name.startswith("torch.distributed")
    }
    assert {user for user in users if not user.startswith("parallel/")} <= {"training/deepspeed_engine.py"}


def test_every_module_class_and_public_function_has_a_docstring():
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf8"))
        if path.read_text(encoding="utf8").strip() and ast.get_docstring(tree) is None:
            missing.append(f"{path.relative_to(PACKAGE)}")
        for node in ast.walk(tree):
            named = isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if named and ast.get_docstring(node) is None and not _is_inner(tree, node):
                missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert missing == []


def _is_inner(tree: ast.Module, wanted: ast.AST) -> bool:
    """Whether it stands inside a function or a private class."""
    outer = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.ClassDef) and node.name.startswith("_"))
    ]
    return any(wanted in ast.walk(node) for node in outer if node is not wanted)


def test_functions_stay_under_eighty_lines_and_files_under_four_hundred_and_fifty():
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf8")
        long += [f"{path.relative_to(PACKAGE)}: {text.count(chr(10))} lines"] if text.count("\n") > 450 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert long == []


@pytest.mark.parametrize(
    "module, forbidden",
    [
        (
            "mocme_dist.model.mocme",
            ("ray", "deepspeed", "transformers", "tensorboard", "torchvision", "webdataset", "pyarrow", "pydantic"),
        ),
        ("mocme_dist", ("torch", "numpy", "pandas", "pyarrow", "pydantic")),
        ("mocme_dist.serving.predict", ("torch", "ray", "transformers", "pandas", "pydantic", "pyarrow")),
        ("mocme_dist.data.packing", ("torch", "ray", "deepspeed", "transformers", "tensorboard")),
        ("mocme_dist.training.loop", ("ray", "deepspeed", "transformers", "tensorboard", "torchvision", "webdataset")),
        ("mocme_dist.evaluation.ranking", ("ray", "deepspeed", "transformers", "tensorboard", "torchvision")),
    ],
)
def test_a_module_brings_only_what_it_needs(module, forbidden):
    code = f"import sys, {module}; print(*[name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
