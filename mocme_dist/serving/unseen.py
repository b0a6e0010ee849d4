"""Encodes entities that are not in the bundle, with the encoders that made the other entities' features.

Their structure is absent, and the weights of the modalities they have are those of any entity without structure. If
export found that it helps, the vector is corrected (structure_imputer.py). Besides export, this is the only part of
serving that needs torch and the libraries of the encoders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mocme_dist.config.encoders import refuse_foreign_code
from mocme_dist.config.load import parse_config
from mocme_dist.encoders.build import build_encoder
from mocme_dist.encoders.encoder import Encoder, decode_safely, encoder_hash
from mocme_dist.encoders.numeric import NumericStatistics
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.evidence.spaces import numeric_sources
from mocme_dist.evidence.units import to_units
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.names import closest
from mocme_dist.serving.predict import UnseenEntity
from mocme_dist.serving.rows import load_model
from mocme_dist.serving.structure_imputer import inputs_of
from mocme_dist.training.build import model_settings

_KEY = re.compile(r"(?:^|,)\s*([^=,]+?)\s*=")
_FILES = ("image", "audio", "video")

Value = str | float | Path | tuple[str, bytes]


class Description(NamedTuple):
    """A new entity.

    Its name, and its files by modality as the shards of a data set hold them ("text.json", "image.0.jpg").
    """

    name: str
    members: dict[str, bytes]


def parse_description(text: str) -> list[tuple[str, Value]]:
    """Read "name=...,text=...,image=photo.jpg,population=12000" into keys and values.

    A comma belongs to the value before it unless a key and "=" follow.

    Raises:
        ConfigError: the text does not begin with a key.
    """
    found = list(_KEY.finditer(text))
    if not found or text[: found[0].start()].strip():
        raise ConfigError(
            f"--new {text!r}: expected key=value,key=value, as in name=Atlantis,text=an island,population=12000"
        )
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(match[1], text[match.end() : end].strip()) for match, end in zip(found, ends, strict=True)]


def describe(
    pairs: Sequence[tuple[str, Value]], columns: Sequence[str], attributes: Sequence[str], modalities: Sequence[str]
) -> Description:
    """Return the description that keys and values give.

    Keys: name; text, or any of the text columns; image, audio, video (a path, or a file name and its content;
    repeatable); every other key is a numeric attribute.

    Args:
        pairs: keys and values.
        columns: text columns of the data set, in order.
        attributes: numeric attributes of the data set.
        modalities: those of the model.

    Raises:
        ConfigError: a key is unknown, a number is malformed, a file cannot be read, or nothing fits the model's
        modalities.
    """
    name = "new entity"
    words: dict[str, str] = {}
    numbers: dict[str, float] = {}
    members: dict[str, bytes] = {}
    for key, value in pairs:
        if key == "name":
            name = str(value)
        elif key == "text" or key in columns:
            words[columns[0] if key == "text" and columns and "text" not in columns else key] = str(value)
        elif key in _FILES:
            file, content = value if isinstance(value, tuple) else (str(value), _read(key, str(value)))
            number = sum(member.startswith(f"{key}.") for member in members)
            members[f"{key}.{number}{Path(file).suffix.lower()}"] = content
        else:
            numbers[key] = _number(key, str(value), columns, attributes)
    if words:
        members["text.json"] = json.dumps(words, ensure_ascii=False).encode(errors="replace")
    if numbers:
        members["numeric.json"] = json.dumps(numbers).encode()
    _check_modalities({member.split(".")[0] for member in members}, modalities)
    return Description(name, members)


def _check_modalities(given: set[str], modalities: Sequence[str]) -> None:
    known = [modality for modality in modalities if modality != "structure"]
    if not given & set(modalities):
        expected = ", ".join(known) or "structure only, which no new entity has"
        raise ConfigError(f"--new: nothing that this model knows is given; it knows {expected}")
    if extra := sorted(given - set(modalities)):
        raise ConfigError(f"--new: {', '.join(extra)} given, but this model was trained with {', '.join(modalities)}")


def _read(key: str, value: str) -> bytes:
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise ConfigError(f"--new: {key}={value}: {Path(value).absolute()} cannot be read: {error.strerror}") from None


def _number(key: str, value: str, columns: Sequence[str], attributes: Sequence[str]) -> float:
    if key not in attributes:
        close = closest(key, [*attributes, "name", "text", "image", *columns])
        hint = (
            f"did you mean {close}?"
            if close
            else f"keys are name, text, image, {', '.join([*columns, *attributes][:20])}"
        )
        raise ConfigError(f"--new: {' '.join(key.split())}: unknown key; {hint}")
    try:
        # A comma may separate decimals or thousands, and Python alone reads 1_000: neither is guessed at.
        number = float("" if set(value) & {",", "_"} else value)
    except ValueError:
        raise ConfigError(
            f"--new: {key}={value!r}: expected a number with a point for decimals and nothing between thousands, as"
            " 12000.5"
        ) from None
    if not np.isfinite(number):
        raise ConfigError(f"--new: {key}={value}: expected a finite number")
    return number


class UnseenEntityEncoder:
    """The encoders and the dense model of a bundle, loaded once for any number of unseen entities.

    Args:
        bundle: an open bundle.
        trust_encoders: whether an encoder that the bundle names as `module:function` may be imported, which runs its
            code.

    Raises:
        ConfigError: the bundle names such an encoder, and `trust_encoders` is False.
    """

    def __init__(self, bundle: Bundle, trust_encoders: bool = False) -> None:
        self.bundle = bundle
        self.config = parse_config(bundle.manifest["config"])
        if not trust_encoders:
            refuse_foreign_code(self.config.encoders, str(bundle.directory))
        self.columns = tuple(self.config.data.text_columns or ())
        statistics = bundle.manifest["features"].get("numeric", {}).get("statistics")
        self.statistics = None if statistics is None else NumericStatistics.from_json(statistics)
        self.attributes = (
            [] if self.statistics is None else [attribute.name for attribute in self.statistics.attributes]
        )
        state = {name: torch.from_numpy(np.array(value)) for name, value in bundle.dense.items()}
        raw_widths = dict(bundle.manifest["raw_widths"])
        self.model = load_model(raw_widths, bundle.num_relations, model_settings(self.config, len(raw_widths)), state)
        self._encoders: dict[str, Encoder] = {}
        self.matrix = bundle.structure_imputer if bundle.manifest["structure_imputer"].get("used") else None

    def describe(self, given: str | Mapping[str, Any]) -> Description:
        """Return the description that a mapping, or a text as of `parse_description`, gives; see `describe`.

        A value of a mapping may be a list: several pictures, for example.
        """
        if isinstance(given, str):
            pairs = parse_description(given)
        else:
            pairs = [
                (key, value)
                for key, values in given.items()
                for value in (values if isinstance(values, list) else [values])
            ]
        return describe(pairs, self.columns, self.attributes, self.bundle.modalities)

    def entity(self, given: str | Mapping[str, Any]) -> UnseenEntity:
        """Return a described entity with its vector and its units in the spaces of evidence; see `describe`."""
        return self.entity_of(self.describe(given))[0]

    def entity_of(self, description: Description) -> tuple[UnseenEntity, dict[str, float]]:
        """Return a described entity, and the weights of the modalities that it has.

        Raises:
            ConfigError: a file cannot be decoded, or nothing of the description can be encoded.
        """
        features = self.features_of(description)
        z_1D, weight_1M = self.encode([features])
        weights = zip(self.bundle.modalities, weight_1M[0].tolist(), strict=True)
        entity = UnseenEntity(description.name, z_1D[0], self.units(features))
        return entity, {name: weight for name, weight in weights if weight > 0}

    def units(self, features: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Return the unit vectors of an entity in the spaces of evidence that its features give."""
        if self.bundle.evidence is None:
            return {}
        spaces = self.bundle.evidence.about["spaces"]
        units = {
            name: to_units((features[name].astype(np.float64) - mean_F)[None])[0].astype(np.float32)
            for name, mean_F in self.bundle.evidence_means.items()
            if name in features
        }
        statistics = self.bundle.manifest["features"].get("numeric", {}).get("statistics")
        if statistics is None or "numeric" not in features:
            return units
        values_1F = torch.from_numpy(features["numeric"])[None]

        def gather(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return values_1F[rows], torch.ones(len(rows), dtype=torch.bool)

        for source in numeric_sources(gather, statistics, (0.0, 0.0)):
            if source.name in spaces:
                units[source.name] = source.fill(0, 1, torch.device("cpu")).unit_rF[0].float().numpy()
        return units

    def _encoder(self, modality: str) -> Encoder:
        if modality not in self._encoders:
            pinned = self.bundle.manifest["features"][modality]
            if "imported" in pinned:
                raise ConfigError(
                    f"--new: {modality} given, but this model's features of it were imported ({pinned['imported']!r})"
                    " and no encoder here makes them; leave it out"
                )
            encoder = build_encoder(modality, self.config.encoders, self.columns, self.statistics, "cpu")
            found = encoder_hash(modality, encoder.settings, self.config.encoders)
            if found != pinned["encoder_hash"]:
                raise DataError(
                    f"{modality}: the encoder here has hash {found[:12]}, that of the bundle's features"
                    f" {pinned['encoder_hash'][:12]}; settings or weights have changed since: use those of then, or"
                    " extract, train and export again"
                )
            self._encoders[modality] = encoder
        return self._encoders[modality]

    def features(self, members: Mapping[str, bytes], modality: str, strict: bool = True) -> NDArray[np.float32] | None:
        """Return the (F,) features of a modality as extraction would store them, or None if the entity has no file of
        it.

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
        """Return vectors (n, D) and modality weights (n, M) of entities, given the features of their modalities.

        Args:
            correct: apply the structure imputer if the bundle has one.
        """
        raw, present = {}, []
        for modality in self.bundle.modalities:
            width = self.bundle.manifest["raw_widths"][modality]
            absent = np.zeros(width, np.float32)
            raw[modality] = torch.from_numpy(
                np.stack([np.asarray(entity.get(modality, absent), np.float32) for entity in entities])
            )
            present.append(torch.tensor([modality in entity for entity in entities]))
        with torch.no_grad():
            fused = self.model.encode(raw, torch.stack(present))
        z_nD, weight_nM = fused.z_VD.numpy(), fused.inter_VM.float().numpy()
        if correct and self.matrix is not None:
            structure = self.bundle.modalities.index("structure")
            present_Mn = torch.stack(present).numpy()
            z_nD = (inputs_of(fused.modal_MVD.float().numpy(), present_Mn, structure) @ self.matrix).astype(np.float32)
        return z_nD, weight_nM

    def features_of(self, description: Description) -> dict[str, NDArray[np.float32]]:
        """Return the features of a described entity, by modality.

        Raises:
            ConfigError: a file cannot be decoded, or nothing of the description can be encoded.
        """
        found = {}
        for modality in self.bundle.modalities:
            values = self.features(description.members, modality) if modality != "structure" else None
            if values is not None:
                found[modality] = values
        if not found:
            raise ConfigError("--new: nothing of what is given can be encoded; give a text, an image or a number")
        return found
