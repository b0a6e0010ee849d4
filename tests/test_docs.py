"""The documentation builds without a warning, and its page of settings names every setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from mocme_dist.config import Config
from tools.docs_hooks import settings_tables

ROOT = Path(__file__).resolve().parents[1]


def names(section: type[BaseModel], path: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += names(inner, f"{path}{name}.")
        else:
            found.append(f"{path}{name}")
    return found


def test_the_page_of_settings_names_every_setting_with_a_description():
    rows = [line.split(" | ") for line in settings_tables(Config) if line.startswith("| `")]
    listed = {row[0].strip("|` "): row[2].strip("| ") for row in rows}
    assert sorted(listed) == sorted(names(Config))
    assert [name for name, text in listed.items() if not text] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "configuration" / "index.html").read_text(encoding="utf8")
    assert "fusion.estimator" in page
    assert "owner-computes.svg" in (tmp_path / "site" / "architecture" / "index.html").read_text(encoding="utf8")
