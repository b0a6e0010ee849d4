"""Vectors computed elsewhere reach the entity they belong to, whatever their file; nothing in a file is run."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import ConfigError, DataError

NAMES = [f"item {number:02d}" for number in range(60)]
WIDTH = 5


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


SUFFIXES = {"npy": ".npy", "float16 npy by columns": ".npy", "safetensors": ".safetensors"}  # of the other kinds: .pt


def pack(raw: Path, out: Path) -> Dataset:
    return pack_folder(raw, out, DataConfig(shard_rows=16))


def vectors_of(dataset: Dataset, modality: str) -> dict[str, np.ndarray]:
    names = dataset.entity_names()
    return {
        names[sample.id]: np.frombuffer(sample.members[f"{modality}.f32"], "<f4")
        for shard in range(dataset.shards.num_shards)
        for sample in dataset.read_samples(shard, 1 << 20)
        if f"{modality}.f32" in sample.members
    }


def write(raw: Path, kind: str, values: np.ndarray, names: list[str], modality: str = "image") -> Path:
    """The vectors in one of the kinds; all but dictionaries get an ids file."""
    folder = raw / "features"
    folder.mkdir(exist_ok=True)
    path = folder / f"{modality}{SUFFIXES.get(kind, '.pt')}"
    table = torch.from_numpy(values)
    if kind == "npy":
        np.save(path, values)
    elif kind == "float16 npy by columns":
        np.save(path, np.asfortranarray(values.astype(np.float16)))
    elif kind == "safetensors":
        save_file({"anything": table.to(torch.bfloat16)}, path)
    elif kind == "dictionary":
        torch.save({name: table[row].clone() for row, name in enumerate(names)}, path)
    else:
        torch.save(
            torch.nn.Parameter(table) if kind == "parameter" else table,
            path,
            _use_new_zipfile_serialization=kind != "old format",
        )
    if kind != "dictionary":
        (folder / f"{modality}.ids").write_text("".join(f"{name}\n" for name in names), encoding="utf8")
    return path


def some_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Numbers that half precision and bfloat16 hold exactly."""
    return np.random.default_rng(seed).integers(1, 100, (count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(
    "kind", ["npy", "float16 npy by columns", "safetensors", "tensor", "parameter", "old format", "dictionary"]
)
def test_every_kind_of_file_gives_every_entity_its_own_row(raw_copy, tmp_path, kind):
    names = [NAMES[i] for i in np.random.default_rng(1).permutation(60)[:40]] + ["nobody", "no one"]
    values = some_vectors(42)
    path = write(raw_copy, kind, values, names)
    dataset = pack(raw_copy, tmp_path / "out")
    found = vectors_of(dataset, "image")
    assert set(found) == set(names[:40])
    for name, row in zip(names, values, strict=True):
        assert name not in found or np.array_equal(found[name], row)
    facts = dataset.modalities["image"]
    assert facts["entities"] == 40 and facts["vectors"]["file"] == path.name and facts["vectors"]["width"] == WIDTH
    report = dataset.manifest["report"]["vectors"]["image"]
    assert (report["rows"], report["outside_graph"], report["all_zero"], report["instead_of"]) == (
        42,
        2,
        0,
        "images.tsv",
    )
    assert report["named_by"] == ("its own names" if kind == "dictionary" else "image.ids")


@pytest.mark.parametrize("counted", [False, True])
def test_without_names_rows_follow_the_published_ids(raw_copy, tmp_path, counted):
    order = np.random.default_rng(2).permutation(60)
    lines = "".join(f"{NAMES[i]}\t{order[i]}\n" for i in range(60))
    (raw_copy / "entity2id.txt").write_text(("60\n" if counted else "") + lines)
    values = some_vectors(60)
    write(raw_copy, "tensor", values, [])
    (raw_copy / "features" / "image.ids").unlink()
    dataset = pack(raw_copy, tmp_path / "out")
    found = vectors_of(dataset, "image")
    assert all(np.array_equal(found[NAMES[i]], values[order[i]]) for i in range(60))
    assert dataset.manifest["report"]["vectors"]["image"]["named_by"] == "entity2id.txt"


def test_vectors_win_over_raw_files_and_leave_texts_readable(raw_copy, tmp_path, caplog):
    caplog.set_level("INFO")
    for modality in ("image", "text", "audio"):
        write(raw_copy, "npy", some_vectors(2), NAMES[:2], modality)
    dataset = pack(raw_copy, tmp_path / "out")
    members = {name for shard in range(4) for sample in dataset.read_samples(shard, 1 << 20) for name in sample.members}
    assert members == {"text.json", "text.f32", "numeric.json", "image.f32", "audio.f32"}
    assert {name: dataset.modalities[name]["entities"] for name in ("image", "text", "audio")} == {
        "image": 2,
        "text": 2,
        "audio": 2,
    }
    assert "features/image.npy: imported, not computed; images.tsv plays no part in the features" in caplog.text
    assert (
        "audio.npy: imported" not in caplog.text
        and dataset.manifest["report"]["vectors"]["audio"]["instead_of"] is None
    )
    assert dataset.fingerprint == pack(raw_copy, tmp_path / "again").fingerprint


def test_rows_of_zeros_are_absent_and_counted(raw_copy, tmp_path):
    values = some_vectors(6)
    values[[1, 4]] = 0
    write(raw_copy, "npy", values, NAMES[:6])
    dataset = pack(raw_copy, tmp_path / "out")
    assert set(vectors_of(dataset, "image")) == {NAMES[i] for i in (0, 2, 3, 5)}
    assert (
        dataset.manifest["report"]["vectors"]["image"]["all_zero"] == 2 and dataset.modalities["image"]["entities"] == 4
    )


def test_another_file_of_vectors_is_another_source(raw_copy, tmp_path):
    path = write(raw_copy, "npy", some_vectors(6), NAMES[:6])
    pack(raw_copy, tmp_path / "out")
    pack(raw_copy, tmp_path / "out")
    np.save(path, some_vectors(6, seed=3))
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, tmp_path / "out")
    np.save(path, some_vectors(6))
    (path.parent / "image.ids").write_text("".join(f"{name}\n" for name in reversed(NAMES[:6])))
    with pytest.raises(ConfigError, match="other raw files"):
        pack(raw_copy, tmp_path / "out")


@pytest.mark.parametrize(
    "names, message",
    [
        (NAMES[:5], r"features/image.ids: 5 names, features/image.npy has 6 rows; expected a name for each row"),
        (NAMES[:7], r"features/image.ids: 7 names, features/image.npy has 6 rows"),
        ([*NAMES[:5], NAMES[0]], r"image.ids:6: entity 'item 00' is there twice"),
        ([*NAMES[:5], "item 05\t5"], r"image.ids:6: expected one entity name a line"),
        (None, r"features/image.npy: 6 rows without names; there is no entity2id.txt: expected features/image.ids"),
    ],
)
def test_names_that_do_not_fit_the_rows_are_refused(raw_copy, tmp_path, names, message):
    write(raw_copy, "npy", some_vectors(6), names or [])
    if names is None:
        (raw_copy / "features" / "image.ids").unlink()
    with pytest.raises(DataError, match=message):
        pack(raw_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_files_or_two_kinds_of_names_are_refused(raw_copy, tmp_path):
    path = write(raw_copy, "dictionary", some_vectors(2), NAMES[:2])
    (path.parent / "image.ids").write_text("item 00\nitem 01\n")
    with pytest.raises(
        DataError, match=r"features/image.pt: is a dictionary by name, and features/image.ids names rows as well"
    ):
        pack(raw_copy, tmp_path / "out")
    np.save(path.with_suffix(".npy"), some_vectors(2))
    with pytest.raises(DataError, match=r"features: holds image.npy and image.pt; delete all but one"):
        pack(raw_copy, tmp_path / "out")
    path.unlink()
    path.with_suffix(".npy").unlink()
    (raw_copy / "entity2id.txt").write_text("".join(f"{name}\t{number}\n" for number, name in enumerate(NAMES)))
    (path.parent / "image.ids").unlink()
    np.save(path.with_suffix(".npy"), some_vectors(59))
    with pytest.raises(DataError, match=r"59 rows without names; entity2id.txt has 60 names"):
        pack(raw_copy, tmp_path / "out")


def bad_files(sentinel: Path) -> dict[str, object]:
    """Content by name: bytes, or what saves it."""
    whole = some_vectors(6)
    payload = np.empty(1, dtype=object)
    payload[0] = Payload(sentinel)
    return {
        "objects.npy": lambda path: np.save(path, payload, allow_pickle=True),
        "pickle.npy": pickle.dumps(Payload(sentinel)),
        "pickle.pt": pickle.dumps(Payload(sentinel)),
        "payload.pt": lambda path: torch.save({"a": Payload(sentinel)}, path),
        "old_payload.pth": lambda path: torch.save(Payload(sentinel), path, _use_new_zipfile_serialization=False),
        "torn.npy": lambda path: (np.save(path, whole), path.write_bytes(path.read_bytes()[:-8])),
        "torn.pt": lambda path: (torch.save(torch.from_numpy(whole), path), path.write_bytes(path.read_bytes()[:200])),
        "torn.safetensors": lambda path: (
            save_file({"a": torch.from_numpy(whole)}, path),
            path.write_bytes(path.read_bytes()[:-8]),
        ),
        "flat.npy": lambda path: np.save(path, whole[0]),
        "text.npy": lambda path: np.save(path, np.array([["a", "b"]] * 6)),
        "two.safetensors": lambda path: save_file({"a": torch.from_numpy(whole), "b": torch.ones(2, 2)}, path),
        "flat.safetensors": lambda path: save_file({"a": torch.from_numpy(whole[0])}, path),
        "uneven.pt": lambda path: torch.save({"item 00": torch.ones(3), "item 01": torch.ones(4)}, path),
        "numbers.pt": lambda path: torch.save({"item 00": 3.0}, path),
        "list.pt": lambda path: torch.save([torch.ones(3)], path),
        "empty.npy": b"",
        "empty.pt": b"",
        "empty.safetensors": b"",
        "garbage.safetensors": b"<html>404</html>" * 9,
    }


@pytest.mark.parametrize("name", bad_files(Path("unused")))
def test_what_is_no_table_of_numbers_is_refused_by_name_and_never_run(raw_copy, tmp_path, name):
    sentinel = tmp_path / "sentinel"
    content = bad_files(sentinel)[name]
    path = raw_copy / "features" / f"image{Path(name).suffix}"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    (path.parent / "image.ids").write_text("".join(f"{name}\n" for name in NAMES[:6]))
    with pytest.raises(DataError, match=rf"features/image\{path.suffix}: ") as caught:
        pack(raw_copy, tmp_path / "out")
    assert "expected" in str(caught.value) and not sentinel.exists() and not (tmp_path / "out").exists()


def test_a_malicious_file_ends_the_command_with_exit_code_3(raw_copy, tmp_path):
    (raw_copy / "features").mkdir()
    torch.save({"a": Payload(tmp_path / "sentinel")}, raw_copy / "features" / "image.pt")
    command = [sys.executable, "-m", "mocme_dist.pack", str(raw_copy), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 3 and "image.pt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sentinel").exists()
