"""Variants of a raw folder for studies: with a modality of noise, or without a modality for a share of the entities."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np

from tools.experiments.names import entity_names

# Numbers per entity of the modality of noise.
_NOISE = 64
# The files that hold a modality, by name of the modality.
_FILES = {
    "text": "text.tsv",
    "numeric": "numeric.tsv",
    "image": "images.tsv",
    "audio": "audio.tsv",
    "video": "video.tsv",
}


def make_variant(raw: Path, folder: Path, variant: str) -> Path:
    """The raw folder of a variant, made where it is not there yet.

    Args:
        raw: the graph.
        folder: where variants are made.
        variant: "" for the graph itself, "noise", or "MODALITY:SHARE".
    """
    if not variant:
        return raw
    target = folder / variant.replace(":", "-")
    if not target.is_dir():
        half_made = target.with_name(f"{target.name}.part")
        shutil.rmtree(half_made, ignore_errors=True)
        shutil.copytree(raw, half_made)
        for path in (half_made, *half_made.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)  # the graph may be read-only
        if variant == "noise":
            _add_noise(half_made)
        else:
            name, _, share = variant.partition(":")
            _drop(half_made / _FILES[name], float(share))
        half_made.rename(target)
    return target


def _add_noise(raw: Path) -> None:
    """Vectors of random numbers as the features of "video"."""
    names = entity_names(raw)
    features = raw / "features"
    features.mkdir(exist_ok=True)
    values = np.random.default_rng(0).standard_normal((len(names), _NOISE)).astype(np.float32)
    np.save(features / "video.npy", values)
    (features / "video.ids").write_text("".join(f"{name}\n" for name in names), encoding="utf8")


def _drop(path: Path, share: float) -> None:
    """Remove the lines of a share of the entities that a file describes."""
    header, *lines = path.read_text(encoding="utf8").splitlines()
    names = sorted({line.split("\t", 1)[0] for line in lines})
    order = np.random.default_rng(1).permutation(len(names))
    gone = {names[at] for at in order[: round(share * len(names))]}
    kept = [line for line in lines if line.split("\t", 1)[0] not in gone]
    path.write_text("\n".join([header, *kept]) + "\n", encoding="utf8")
