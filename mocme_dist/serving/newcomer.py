"""Entities that were never seen: from what is known of one to its fused vector, by the encoders that made the others'.

Its structure is absent, and the weights of the modalities it has are those of any entity without structure; where
export found it to help, the vector is corrected (newcomer_map.py). This is the one part of serving, besides export,
that needs torch and the encoders' libraries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mocme_dist.config.load import parse_config
from mocme_dist.data.tensors import map_tensors
from mocme_dist.encoders.build import build_encoder
from mocme_dist.encoders.encoder import Encoder, decode_safely, encoder_hash
from mocme_dist.encoders.numeric import NumericStatistics
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.names import closest
from mocme_dist.serving.newcomer_map import inputs_of
from mocme_dist.serving.rows import load_model

_KEY = re.compile(r"(?:^|,)\s*([^=,]+?)\s*=")


class Description(NamedTuple):
    """What is known of a new entity: its files by modality as a data set's shards hold them ("text.json", "image.0.jpg")."""

    name: str
    members: dict[str, bytes]


def parse_description(text: str, columns: Sequence[str], attributes: Sequence[str], modalities: Sequence[str]) -> Description:
    """Read "name=...,text=...,image=photo.jpg,population=12000".

    A comma belongs to the value before it unless a key and "=" follow. Keys: name; text, or any of the text columns;
    image, audio, video (a file, repeatable); everything else is a number of that attribute.

    Args:
        columns: text columns of the data set, in order.
        attributes: names of its numbers.
        modalities: what the model knows.

    Raises:
        ConfigError: a key is unknown or no number, a file cannot be read, or the model knows none of what is given.
    """
    found = list(_KEY.finditer(text))
    if not found or text[: found[0].start()].strip():
        raise ConfigError(f"--new {text!r}: expected key=value,key=value, as in name=Atlantis,text=an island,population=12000")
    pairs = [
        (match[1], text[match.end() : found[at + 1].start() if at + 1 < len(found) else len(text)].strip())
        for at, match in enumerate(found)
    ]
    name = "new entity"
    words: dict[str, str] = {}
    numbers: dict[str, float] = {}
    members: dict[str, bytes] = {}
    for key, value in pairs:
        if key == "name":
            name = value
        elif key == "text" or key in columns:
            words[columns[0] if key == "text" and "text" not in columns else key] = value
        elif key in ("image", "audio", "video"):
            number = sum(member.startswith(f"{key}.") for member in members)
            members[f"{key}.{number}{Path(value).suffix.lower()}"] = _read(key, value)
        else:
            numbers[key] = _number(key, value, columns, attributes)
    if words:
        members["text.json"] = json.dumps(words, ensure_ascii=False).encode()
    if numbers:
        members["numeric.json"] = json.dumps(numbers).encode()
    given = {member.split(".")[0] for member in members}
    if not given & set(modalities):
        known = ", ".join(modality for modality in modalities if modality != "structure") or "structure only, which no new entity has"
        raise ConfigError(f"--new: nothing that this model knows is given; it knows {known}")
    if extra := sorted(given - set(modalities)):
        raise ConfigError(f"--new: {', '.join(extra)} given, but this model was trained with {', '.join(modalities)}")
    return Description(name, members)


def _read(key: str, value: str) -> bytes:
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise ConfigError(f"--new: {key}={value}: {Path(value).absolute()} cannot be read: {error.strerror}") from None


def _number(key: str, value: str, columns: Sequence[str], attributes: Sequence[str]) -> float:
    if key not in attributes:
        close = closest(key, [*attributes, "name", "text", "image", *columns])
        hint = f"did you mean {close}?" if close else f"keys are name, text, image, {', '.join([*columns, *attributes][:20])}"
        raise ConfigError(f"--new: {key}: unknown key; {hint}")
    try:
        number = float(value.replace(",", "").replace("_", ""))
    except ValueError:
        raise ConfigError(f"--new: {key}={value}: expected a number") from None
    if not np.isfinite(number):
        raise ConfigError(f"--new: {key}={value}: expected a finite number")
    return number


class NewEntityEncoder:
    """The encoders and the dense model of a bundle, kept for any number of new entities."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.config = parse_config(bundle.manifest["config"])
        self.columns = tuple(self.config.data.text_columns)
        numeric = bundle.manifest["features"].get("numeric")
        self.statistics = None if numeric is None else NumericStatistics.from_json(numeric["statistics"])
        self.attributes = [] if self.statistics is None else [attribute.name for attribute in self.statistics.attributes]
        state = {name: torch.from_numpy(np.array(value)) for name, value in map_tensors(bundle.directory / "dense.safetensors").items()}
        self.model = load_model(dict(bundle.manifest["raw_widths"]), self.config, bundle.num_relations, state)
        self._encoders: dict[str, Encoder] = {}
        corrected = bundle.directory / "newcomers.safetensors"
        self.matrix = np.array(map_tensors(corrected)["matrix"]) if bundle.manifest["newcomers"].get("used") else None

    def describe(self, text: str) -> Description:
        """`parse_description` with this bundle's columns and attributes."""
        return parse_description(text, self.columns, self.attributes, self.bundle.modalities)

    def _encoder(self, modality: str) -> Encoder:
        if modality not in self._encoders:
            pinned = self.bundle.manifest["features"][modality]
            encoder = build_encoder(modality, self.config.encoders, self.columns, self.statistics, "cpu")
            found = encoder_hash(modality, encoder.settings, self.config.encoders)
            if found != pinned["encoder_hash"]:
                raise DataError(
                    f"{modality}: the encoder here has hash {found[:12]}, that of the bundle's features {pinned['encoder_hash'][:12]}; "
                    "settings or weights have changed since: use those of then, or extract, train and export again"
                )
            self._encoders[modality] = encoder
        return self._encoders[modality]

    def features(self, members: Mapping[str, bytes], modality: str, strict: bool = True) -> NDArray[np.float32] | None:
        """(F,) features of one modality as extraction would store them; None when the entity has no file of it.

        Raises:
            ConfigError: `strict` and a file cannot be decoded.
        """
        own = {name: content for name, content in members.items() if name.startswith(f"{modality}.")}
        if not own:
            return None
        encoder = self._encoder(modality)
        decoded = decode_safely(encoder, own)
        if decoded.failures and strict:
            raise ConfigError(f"--new: {modality}: {decoded.failures[0].cause}: {decoded.failures[0].message}")
        if not decoded.pieces:
            return None
        values = encoder.encode(encoder.collate(decoded.pieces)).mean(axis=0, dtype=np.float32)
        return values.astype(self.bundle.manifest["features"][modality]["dtype"]).astype(np.float32)

    def encode(
        self, entities: Sequence[Mapping[str, NDArray[np.float32]]], correct: bool = True
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors (n, D) and modality weights (n, M) of entities given by the features of the modalities they have.

        Args:
            correct: apply the map of newcomer_map.py where the bundle has one.
        """
        raw, present = {}, []
        for modality in self.bundle.modalities:
            width = self.bundle.manifest["raw_widths"][modality]
            absent = np.zeros(width, np.float32)
            raw[modality] = torch.from_numpy(np.stack([np.asarray(entity.get(modality, absent), np.float32) for entity in entities]))
            present.append(torch.tensor([modality in entity for entity in entities]))
        with torch.no_grad():
            fused = self.model.encode(raw, torch.stack(present))
        z_nD, weight_nM = fused.z_VD.numpy(), fused.inter_VM.float().numpy()
        if correct and self.matrix is not None:
            structure = self.bundle.modalities.index("structure")
            present_Mn = torch.stack(present).numpy()
            z_nD = (inputs_of(fused.modal_MVD.float().numpy(), present_Mn, structure) @ self.matrix).astype(np.float32)
        return z_nD, weight_nM

    def encode_one(self, description: Description) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Vector (D,) of a described entity, and the weights of the modalities it has.

        Raises:
            ConfigError: a file cannot be decoded, or nothing is left of what was given.
        """
        found = {}
        for modality in self.bundle.modalities:
            values = self.features(description.members, modality) if modality != "structure" else None
            if values is not None:
                found[modality] = values
        if not found:
            raise ConfigError("--new: nothing of what is given can be encoded; give a text, a picture or a number")
        z_1D, weight_1M = self.encode([found])
        return z_1D[0], {name: float(weight_1M[0, m]) for m, name in enumerate(self.bundle.modalities) if weight_1M[0, m] > 0}
