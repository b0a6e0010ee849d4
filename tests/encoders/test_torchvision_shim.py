"""torchvision loads beside a CPU-only torch in programs that know nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOOK = ROOT / "tools" / "torchvision.pth"


@pytest.mark.slow
def test_the_environment_imports_what_it_installs(tmp_path):
    """In a process of its own, outside of the checkout, with the file that `make env` puts into the environment."""
    assert "cp tools/torchvision.pth" in (ROOT / "Makefile").read_text()
    (tmp_path / HOOK.name).write_bytes(HOOK.read_bytes())
    code = f"""
import site, sys
site.addsitedir({str(tmp_path)!r})
assert "torch" not in sys.modules and "torchvision" not in sys.modules
import importlib.util
assert importlib.util.find_spec("torchvision") is not None and "torch" not in sys.modules
import pykeen.pipeline, torchvision, transformers
from transformers import BertModel, CLIPModel
print(torchvision.models.resnet18().fc.out_features)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1000"]


def test_an_environment_without_the_package_starts_in_silence(tmp_path):
    (tmp_path / HOOK.name).write_bytes(HOOK.read_bytes())
    code = f"import site; site.addsitedir({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
