"""Fixtures that several parts share.

A small real-shaped raw folder, its packed twin, and the data sets beside the checkout.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny_run

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
INSTRUCTION_SETS = ("DEFAULT", "AVX2", "AVX512")


@pytest.fixture(autouse=True)
def limit_of_pixels() -> Iterator[None]:
    """Undo the limit that extraction in this process gives to Pillow for as long as the process lives."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


def make_raw(folder: Path, num_entities: int = 60, seed: int = 0) -> Path:
    """Write a multi-modal raw folder: every entity in train, a few without text, numbers, pictures or all of them.

    Entities are "item 00" ...; "item 00" to "item 02" have no modality at all. Relations: near, after, kind, part_of.
    """
    from PIL import Image

    gen = np.random.default_rng(seed)
    names = [f"item {index:02d}" for index in range(num_entities)]
    pairs: set[tuple[int, int]] = {(index, (index + 1) % num_entities) for index in range(num_entities)}
    while len(pairs) < 6 * num_entities:
        head, tail = (int(x) for x in gen.integers(num_entities, size=2))
        # One direction only: no inverse leakage, no self loops.
        if head != tail and (tail, head) not in pairs:
            pairs.add((head, tail))
    ordered = sorted(pairs, key=lambda pair: (pair[1] != (pair[0] + 1) % num_entities, pair))
    relations = ("near", "after", "kind", "part_of")
    triples = [(names[head], relations[index % 4], names[tail]) for index, (head, tail) in enumerate(ordered)]
    # The ring comes first and stays in train, so valid and test show nothing new.
    rest = [triples[num_entities + int(index)] for index in gen.permutation(len(triples) - num_entities)]
    tenth = len(triples) // 10
    folder.mkdir(parents=True)
    for split, part in (
        ("test", rest[:tenth]),
        ("valid", rest[tenth : 2 * tenth]),
        ("train", triples[:num_entities] + rest[2 * tenth :]),
    ):
        (folder / f"{split}.txt").write_text("".join("\t".join(triple) + "\n" for triple in part), encoding="utf8")

    def has(share: float) -> list[str]:
        return [name for name in names[3:] if gen.random() < share]

    text = [f"{name}\tlabel of {name}\t{'a longer text ' * int(gen.integers(0, 3))}\n" for name in has(0.8)]
    (folder / "text.tsv").write_text("entity\tlabel\tdescription\n" + "".join(text), encoding="utf8")
    numbers = [f"{name}\t{attribute}\t{gen.normal():.4f}\n" for attribute in ("size", "year") for name in has(0.6)]
    (folder / "numeric.tsv").write_text("entity\tattribute\tvalue\n" + "".join(numbers), encoding="utf8")
    (folder / "images").mkdir()
    rows = []
    for name in has(0.7):
        for number in range(1 + (gen.random() < 0.3)):
            file = f"images/{name.replace(' ', '_')}_{number}.png"
            Image.fromarray(gen.integers(0, 256, size=(12, 10, 3), dtype=np.uint8)).save(folder / file)
            rows.append(f"{name}\t{file}\tdrawn\n")
    (folder / "images.tsv").write_text("entity\tfile\tsource\n" + "".join(rows), encoding="utf8")
    return folder


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder of 60 entities with text, numbers and pictures; read only, use `raw_copy` to edit one."""
    return make_raw(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture
def raw_copy(tiny_raw: Path, tmp_path: Path) -> Path:
    """An own copy of `tiny_raw`."""
    return Path(shutil.copytree(tiny_raw, tmp_path / "raw"))


@pytest.fixture(scope="session")
def tiny_dataset(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_raw` packed in shards of 16 ids; read only, copy it to extract features into it."""
    from mocme_dist.config.schema import DataConfig
    from mocme_dist.data.packing import pack_folder

    return pack_folder(tiny_raw, tmp_path_factory.mktemp("packed") / "dataset", DataConfig(shard_rows=16)).directory


@pytest.fixture
def dataset_copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    """An own copy of `tiny_dataset`."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))


@pytest.fixture(scope="session")
def featured_dataset(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dataset` with the features of its numbers; read only."""
    from mocme_dist.config.schema import EncodersConfig
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.encoders.pipeline import extract_features

    path = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("featured") / "dataset"))
    extract_features(Dataset.open(path), EncodersConfig(), ("label",), ["numeric"], use_ray=False)
    return path


@pytest.fixture(scope="session")
def finished_run(featured_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with structure and numbers, to its end; read only, copy it to go on."""
    path = tmp_path_factory.mktemp("finished") / "run"
    from mocme_dist.train import train

    train(tiny_run.tiny_config(featured_dataset, path, "modalities=[structure, numeric]"))
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """An own copy of `finished_run`."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data(name)`: a data set folder beside the checkout, or a skip that says why."""

    def folder(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_dir():
            pytest.skip(f"no data set {name} at ../shared/data: it is not part of the repository")
        return path

    return folder


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world, body, *args)`: `body(comm, *args)` on so many gloo ranks.

    Their results by rank (see ranks.py).
    """
    return ranks.run


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs on loopback with an own folder, ended with the tests; mark its tests `ray`."""
    # read when ray is imported: without it every listener binds to all interfaces
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    # not pytest's folder: paths of sockets may have 107 characters
    folder = tempfile.mkdtemp(prefix="mocme-ray-")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Any:
    """The library of count.cpp in every form that this CPU can run."""
    from mocme_dist.kernels import builder, counting

    here = INSTRUCTION_SETS.index(builder.instruction_set())
    if builder.compiler() is None or INSTRUCTION_SETS.index(request.param) > here:
        pytest.skip(f"no compiler, or this CPU has no {request.param}")
    found = counting.native_kernels(request.param)
    assert found is not None
    return found
