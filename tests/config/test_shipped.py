"""Every shipped configuration packs, extracts, plans and trains on a cut of its own graph.

The defaults download nothing.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
from pathlib import Path

import pytest

from mocme_dist.config import load_config
from mocme_dist.config.encoders import ImageEncoderConfig, TextEncoderConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.encoders.image import build_backbone
from mocme_dist.encoders.text import text_settings
from mocme_dist.errors import ConfigError
from mocme_dist.train import prepare_data, refuse_what_cannot_fit, resolve_paths, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FOLDERS = {
    "db15k": "DB15K",
    "emojikg": "emojikg",
    "fb15k_237": "FB15K-237",
    "kvc16k": "KVC16K",
    "mkg_w": "MKG-W",
    "mkg_y": "MKG-Y",
    "stampkg": "stampkg",
    "tiva": "TIVA",
    "worldfacts": "worldfacts",
}
SMALL = (
    "encoders.text.model=tiny-random",
    "encoders.text.random_weights=true",
    "encoders.image.model=torchvision:squeezenet1_1",
    "encoders.image.random_weights=true",
    "encoders.image.size=32",
    "launch.mode=local",
)
ONE_EPOCH = (
    "train.epochs=1",
    "blend.steps=20",
    "experts.width=16",
    "compile=off",
    "deepspeed.engine=torch",
    "train.projector=0",
)
FORMS = ("paper", "recommended")  # before and after the file of a data set
BENCHMARKS = ("db15k", "fb15k_237", "kvc16k", "mkg_w", "mkg_y", "tiva")


def rows_of(path: Path) -> list[list[str]]:
    packed = path.with_name(f"{path.name}.gz")
    text = gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else path.read_text(encoding="utf8")
    return [line.split("\t") for line in text.splitlines()]


def write(path: Path, rows: list[list[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf8")


def cut(source: Path, out: Path) -> Path:
    """A raw folder of 30 test and 30 valid facts, a few train facts of each of their entities, and the tables' rows."""
    splits = {split: rows_of(source / f"{split}.txt") for split in ("train", "valid", "test")}
    held_out = {split: splits[split][:30] for split in ("valid", "test")}
    wanted = dict.fromkeys((end for facts in held_out.values() for head, _, tail in facts for end in (head, tail)), 3)
    wanted |= dict.fromkeys((relation for facts in held_out.values() for _, relation, _ in facts), 1)
    train = []
    for fact in splits["train"]:
        if any(wanted.get(name, 0) for name in fact):
            train.append(fact)
            wanted |= {name: wanted[name] - 1 for name in fact if wanted.get(name, 0)}
    seen = {name for fact in train for name in fact}
    out.mkdir()
    write(out / "train.txt", train)
    for split, facts in held_out.items():
        write(out / f"{split}.txt", [fact for fact in facts if seen.issuperset(fact)])
    for table in source.glob("*.tsv"):
        header, *rows = rows_of(table)
        rows = [row for row in rows if row[0] in seen]
        write(out / table.name, [header, *rows])
        for row in rows if header[:2] == ["entity", "file"] else ():
            (out / row[1]).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / row[1], out / row[1])
    return out


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in FORMS])
def test_a_shipped_configuration_fits_its_graph(name, shared_data, tiny_raw, tmp_path):
    raw = tiny_raw if name == "demo" else cut(shared_data(FOLDERS[name]), tmp_path / "raw")
    paths = (f"data.raw={json.dumps(str(raw))}", f"run.dir={json.dumps(str(tmp_path / 'run'))}")
    config = resolve_paths(load_config([CONFIGS / f"{name}.yaml"], [*SMALL, *paths]))
    prepare_data(config)
    refuse_what_cannot_fit(config)
    dataset = Dataset.open(str(config.data.dataset))
    made = {modality for modality in dataset.modalities if (dataset.directory / "features" / modality).is_dir()}
    assert config.modalities != "auto" and made == set(config.modalities) - {"structure"}
    there = (*SMALL, *ONE_EPOCH, "data.raw=null", f"data.dataset={json.dumps(str(config.data.dataset))}")
    runs = [[name], *([["paper", name], [name, "recommended"]] if name in BENCHMARKS else [])]
    for number, files in enumerate(runs):
        place = f"run.dir={json.dumps(str(tmp_path / f'run{number}'))}"
        chosen = resolve_paths(load_config([CONFIGS / f"{file}.yaml" for file in files], [*there, place]))
        assert 0 < train(chosen)["mrr"] <= 1
        assert (chosen.fusion.normalize, chosen.mine.bounded) == (("paper" not in files,) * 2)
        assert (chosen.negatives.weighting == "entropy") == ("paper" in files)


def test_the_default_encoders_ask_no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a default asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^encoders\.text\.model: package 'gt_all.*' is not installed; pip install [^\n]*$"
    ):
        text_settings(TextEncoderConfig(), ("label",))
    with pytest.raises(
        ConfigError, match=r"^encoders\.image\.model: package 'eff.*' is not installed; pip install [^\n]*$"
    ):
        build_backbone(ImageEncoderConfig())
