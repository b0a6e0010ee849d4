"""Rows 13, 48 and 50 of the fault matrix: full and read-only disks, oddly named places, and packages
that are missing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fault_harness import ROOT, fill
from kill_points import tree
from raw_edits import pack
from tiny_run import final_hashes, tiny_config

from mocme_dist import environment, export
from mocme_dist.data.dataset import Dataset
from mocme_dist.encoders import extractor
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import ConfigError, DataError, MocmeError, StorageError
from mocme_dist.train import config_of_run, train

BOTH = "modalities=[structure, numeric]"


def exported(run_dir: Path, target: Path, monkeypatch: Any) -> None:
    """The export command in this process."""
    monkeypatch.setattr(sys, "argv", ["export", str(run_dir), str(target)])
    export.main()


def test_row_13_a_full_disk_stops_an_extraction_which_keeps_its_finished_parts(
    tiny_dataset, small_disk, encoders, monkeypatch
):
    folder = small_disk("disk", 8192) / "dataset"
    dataset = Dataset.open(Path(shutil.copytree(tiny_dataset, folder)))
    extract_features(dataset, encoders, ("label",), ("text",), use_ray=False)
    expected = tree(folder / "features")
    shutil.rmtree(folder / "features")
    original, ballast = extractor.extract_shard, folder.parent / "ballast"

    def extract_shard(encoder: Any, packed: Any, shard: int, *rest: Any) -> Any:
        if shard == 2:
            fill(ballast)
        return original(encoder, packed, shard, *rest)

    monkeypatch.setattr(extractor, "extract_shard", extract_shard)
    with pytest.raises(
        StorageError, match=r"features/text/part-000002\S* cannot be written: No space left.*bytes"
    ) as error:
        extract_features(dataset, encoders, ("label",), ("text",), use_ray=False)
    assert error.value.exit_code == 7
    left = tree(folder / "features")
    assert {name: expected[name] for name in left} == left and any("part-000001" in name for name in left)
    monkeypatch.undo()
    ballast.unlink()
    report = extract_features(dataset, encoders, ("label",), ("text",), use_ray=False)
    assert report["modalities"]["text"]["parts"] == {"done": len(dataset.entries) - 2, "skipped": 2}
    assert tree(folder / "features") == expected


def test_row_48_unusual_names_of_places_change_nothing(featured_dataset, finished_run, tiny_raw, tmp_path, monkeypatch):
    """Spaces, letters of other scripts, links and relative paths, from raw files to a bundle."""
    real, link = tmp_path / "übung 図 [1] # %41", tmp_path / "a link"
    real.mkdir()
    link.symlink_to(real)
    raw = Path(shutil.copytree(tiny_raw, link / "roh daten"))
    pack(raw, link / "dät ä")
    shutil.copytree(featured_dataset / "features", link / "dät ä" / "features")
    monkeypatch.chdir(link)
    train(tiny_config(Path("dät ä"), Path("a run"), BOTH))
    assert final_hashes(real / "a run", 27) == final_hashes(finished_run, 27) != {}
    exported(link / "a run", link / "bündel", monkeypatch)
    assert (real / "bündel" / "bundle.json").is_file()


@pytest.mark.parametrize("command", ["pack", "extract", "train", "resume", "export"])
def test_row_48_a_read_only_place_is_named_with_its_path(
    featured_dataset, finished_run, tiny_raw, small_disk, encoders, monkeypatch, command
):
    disk = small_disk("read only", 16384)
    shutil.copytree(featured_dataset, disk / "dataset")
    shutil.copytree(finished_run, disk / "run")
    before = tree(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
    calls = {
        "pack": lambda: pack(tiny_raw, disk / "packed"),
        "extract": lambda: extract_features(
            Dataset.open(disk / "dataset"), encoders, ("label",), ("text",), use_ray=False
        ),
        "train": lambda: train(tiny_config(featured_dataset, disk / "new", BOTH)),
        "resume": lambda: train(tiny_config(featured_dataset, disk / "run", BOTH, "train.epochs=4")),
        "export": lambda: exported(disk / "run", disk / "bundle", monkeypatch),
    }
    with pytest.raises(MocmeError, match=rf"{re.escape(str(disk))}\S*.*[Rr]ead-only") as error:
        calls[command]()
    assert error.value.exit_code in (2, 7) and "\n" not in str(error.value)
    assert tree(disk) == before


def test_row_48_what_is_not_there_is_named_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("data.dataset", "data.raw"):
        with pytest.raises(DataError, match=rf"{tmp_path}/no/where"):
            train(tiny_config(Path("no/where"), Path("run"), BOTH, f"{key}=no/where"))
    with pytest.raises(ConfigError, match=r"no/where: not a run directory"):
        config_of_run("no/where")


def test_row_48_a_submitted_folder_leaves_data_and_runs_at_home():
    script = (ROOT / "cluster" / "local.sh").read_text()
    (excluded,) = re.findall(r"--runtime-env-json '(\{.*\})'", script)
    assert {"runs/", "*.tar", "*.safetensors", ".venv/"} <= set(json.loads(excluded)["excludes"])


def test_row_50_packages_of_too_old_a_version_are_named(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"torch": "2.9.1+cpu", "ray": "2.60.0"}.__getitem__)
    assert environment.outdated().startswith("torch 2.9.1+cpu is installed for ")
    assert environment.outdated().endswith("expected 2.10 or later: pip install -U 'torch>=2.10'")
    monkeypatch.setattr(metadata, "version", {"torch": "2.13.0", "ray": "3.0.0.dev0"}.__getitem__)
    assert environment.outdated() == ""
