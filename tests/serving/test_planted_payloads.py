"""Every file of a data set, a run and a bundle in turn holds code as a pickle, and nothing of it runs.

The manifests are changed to fit, as an attacker would: hashes do not protect against the author of a file. A reader may
refuse the file in one line, or not need it.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import MocmeError
from mocme_dist.evidence.blend import load_blend
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.heartbeat import read_statuses
from mocme_dist.runs.lock import parse
from mocme_dist.serving.bundle import Bundle
from mocme_dist.training import checkpoint
from mocme_dist.training.checkpoint import Saved

MODALITIES = ("text", "image", "numeric")


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def header(metadata: dict[str, str]) -> bytes:
    """A safetensors file without tensors."""
    text = json.dumps({"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


def table_with(payload: bytes) -> bytes:
    """A Parquet file whose metadata and extension type hold the payload; old pyarrow unpickles the latter."""
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pa.schema([pa.field("name", pa.string(), metadata=extension)], metadata={b"pandas": payload})
    table = pa.table([pa.array([f"item {number:02d}" for number in range(60)])], schema=schema)
    return saved(lambda buffer: pyarrow.parquet.write_table(table, buffer))


def tar_with(payload: bytes) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in ("0000000000.text.pyd", "0000000000.text.pkl", "0000000001.image.pth"):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))

    return saved(write)


def contents(sentinel: Path, suffix: str) -> list[bytes]:
    """Forms in which a payload may come in a file with this suffix."""
    payload = Payload(sentinel)
    plain = pickle.dumps(payload)
    objects = np.empty(3, dtype=object)
    objects[:] = [payload] * 3
    own = {
        ".npy": lambda: saved(lambda buffer: np.save(buffer, objects, allow_pickle=True)),
        ".safetensors": lambda: header({"pickle": plain.hex(), "settings": plain.decode("latin-1")}),
        ".parquet": lambda: table_with(plain),
        ".tar": lambda: tar_with(plain),
        ".json": lambda: json.dumps({"__reduce__": ["pathlib.Path.touch", [str(sentinel)]]}).encode(),
        ".yaml": lambda: f"!!python/object/apply:pathlib.Path.touch [{sentinel}]".encode(),
    }
    forms = [
        plain,
        pickle.dumps(payload, 0),
        saved(lambda buffer: torch.save({"rows": payload}, buffer)),
        saved(lambda buffer: np.savez(buffer, rows=objects)),
    ]
    return [*([own[suffix]()] if suffix in own else []), *forms]


def make_fit(folder: Path, path: Path) -> None:
    """Write size and hash of a file into every manifest that names it."""
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def update(value: Any) -> None:
        if isinstance(value, dict):
            named = value.get(path.name)
            for fitting in (named, value if value.get("name") == path.name else None):
                if isinstance(fitting, dict) and "sha256" in fitting:
                    fitting.update(entry)
            if path.suffix == ".npy" and "present_bits" in value and manifest.stem == path.stem:
                value.update(entry)
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            update(each)

    places = [place for place in path.parents if place == folder or folder in place.parents]
    for manifest in [found for place in places for found in place.glob("*.json")]:
        if manifest != path:
            read = json.loads(manifest.read_text())
            update(read)
            manifest.write_text(json.dumps(read))


def restore(whole: Path, folder: Path, name: Path) -> None:
    """Undo `make_fit`; readers may have moved damaged checkpoints aside."""
    for place in (name, *(found.relative_to(whole) for found in whole.rglob("*.json"))):
        if not (folder / place).is_file() or (folder / place).read_bytes() != (whole / place).read_bytes():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / place, folder / place)


def dataset_readers(folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: [Dataset.open(folder).triples(split).sum() for split in ("train", "valid", "test")]
    yield lambda: [Dataset.open(folder).entity_names(), Dataset.open(folder).relation_labels()]
    yield lambda: [Dataset.open(folder).known(name) for name in ("train", "all")]
    yield lambda: [list(Dataset.open(folder).read_samples(shard, 1 << 20)) for shard in range(4)]
    for modality in MODALITIES:
        yield lambda name=modality: FeatureStore.open(folder, name, 0, 60).gather(torch.arange(60))


def run_readers(folder: Path) -> Iterator[Callable[[], object]]:
    directory = RunDirectory(folder)

    def newest() -> Saved:
        found = Checkpoints(folder).find("auto")
        assert found is not None
        return found

    yield lambda: checkpoint.load_dense(newest())
    yield lambda: checkpoint.read_rows(newest(), 0, 60)
    yield directory.read_config
    yield directory.read_status
    yield directory.read_report
    yield lambda: load_blend(directory.blend)
    yield lambda: parse((folder / "lock").read_bytes())
    yield lambda: [read_statuses(path) for path in folder.rglob("ranks")]


def bundle_readers(folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: Bundle.open(folder, verify=True).predict("item 00", "near")
    yield lambda: Bundle.open(folder).explain("item 00", "near", "item 01")
    yield lambda: Bundle.open(folder).predict_new({"text": "a", "name": "b"}, "near", trust_encoders=True)
    yield lambda: Bundle.open(folder).facts("item 01")


READERS = {"dataset": dataset_readers, "run": run_readers, "bundle": bundle_readers}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_no_file_of_ours_can_hold_code(blended_run, answered_run, tmp_path, kind, monkeypatch):
    from tiny_bundle import rows_of

    from mocme_dist.serving.export import export_bundle

    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    whole = {"dataset": answered_run.parent / "dataset", "run": blended_run, "bundle": tmp_path / "made"}[kind]
    if kind == "bundle":
        export_bundle(rows_of(blended_run), whole)
    folder, sentinel = tmp_path / "copy", tmp_path / "sentinel"
    shutil.copytree(whole, folder)
    for reader in READERS[kind](folder):  # all of them read the whole one
        try:
            reader()
        except (MocmeError, FileNotFoundError) as error:
            pytest.fail(f"{kind}: {error}") if kind != "run" else None
    refused = 0
    for name in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        if "tensorboard" in name.parts:
            continue  # we only write them
        if (number := re.search(r"\d{5}", name.name)) and int(number[0]) > 0:
            continue  # the other parts are read as the first one is
        for content in contents(sentinel, name.suffix):
            (folder / name).write_bytes(content)
            make_fit(folder, folder / name)
            for reader in READERS[kind](folder):
                try:
                    reader()
                except MocmeError as error:
                    assert "\n" not in str(error), (name, error)
                    refused += 1
                except FileNotFoundError:
                    continue
                assert not sentinel.exists(), (name, content[:40])
        restore(whole, folder, name)
    assert refused > 10 and not sentinel.exists()
