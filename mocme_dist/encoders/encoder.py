"""What every frozen encoder is to the pipeline, whatever its modality.

An entity's files are decoded to pieces (a text, a picture, a sound, a film: one file is one piece), pieces are
collated to batches, batches are encoded, and the pipeline averages an entity's pieces. Decoding and collating run
in a background thread, encoding in the main one. A file that cannot be decoded is a `Failure`, not an exception.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.errors import ConfigError, MocmeError


class BadFile(ValueError):
    """A file that cannot be decoded; `cause` is what is counted."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Failure:
    """Why one file gave no piece: a short cause that is counted, and one line for a person."""

    cause: str
    message: str


@dataclass
class Decoded:
    """The pieces of one entity, none when it has no file of the modality, and the files that failed."""

    pieces: list[Any] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Encoder(Protocol):
    """A frozen encoder of one modality.

    Attributes:
        modality: members of a sample whose name starts with "MODALITY." are its files.
        width: F, the length of a feature vector.
        chunk: how many pieces one call of `collate` and `encode` gets; fixed, so that batches never depend on who
            runs the shard.
        settings: all that changes the values (weights' hash, sizes, pooling); what it holds beside is "model", a
            name for people.
    """

    modality: str
    width: int
    chunk: int
    settings: dict[str, Any]

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Pieces of one entity from its members, by name without the key ("image.0.png")."""

    def collate(self, pieces: list[Any]) -> Any:
        """Up to `chunk` pieces, of any entities, as the input of `encode`."""

    def encode(self, batch: Any) -> np.ndarray:
        """(n, F) float32, a row for each piece, in their order."""


def encoder_hash(modality: str, settings: Mapping[str, Any], config: EncodersConfig) -> str:
    """SHA-256 that pins a feature part: modality, settings that change the values (all but "model"), type on disk, limit.

    What changes them by rounding alone is not pinned: threads, batch size, device, versions of libraries. A data set
    that is begun on one kind of machine can be finished on another.
    """
    settings = {k: v for k, v in settings.items() if k != "model"}
    pinned = {"modality": modality, "dtype": config.dtype, "max_member_mb": config.max_member_mb, "settings": settings}
    return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode("utf8")).hexdigest()


def decode_files(members: Mapping[str, bytes], decode: Callable[[bytes], Any]) -> Decoded:
    """One piece for each file of an entity, in the order of their numbers; a `BadFile` becomes a failure."""
    decoded = Decoded()
    for name in sorted(members, key=_member_order):
        try:
            decoded.pieces.append(decode(members[name]))
        except BadFile as error:
            decoded.failures.append(Failure(error.cause, f"{name}: {error}"))
    return decoded


def decode_safely(encoder: Encoder, members: Mapping[str, bytes]) -> Decoded:
    """What `encoder.decode` gives; an error that no decoder foresaw costs these members, not the job."""
    try:
        return encoder.decode(members)
    except MocmeError:
        raise
    except Exception as error:  # decoders meet whatever people find on the web, and raise whatever they like
        names = ", ".join(sorted(members))
        # an address in memory would make reports of reruns differ
        message = re.sub(r"0x[0-9a-fA-F]+", "0x...", str(error).splitlines()[0]) if str(error) else ""
        return Decoded(failures=[Failure("undecodable", f"{names}: {type(error).__name__}: {message}")])


def printable(text: str) -> str:
    """The text with lone surrogates, which JSON lets pass and files do not, written as escapes."""
    return text.encode("utf8", "backslashreplace").decode("utf8")


def _member_order(name: str) -> tuple[int, str]:
    """image.10.png comes after image.9.png."""
    number = name.split(".")[1]
    return (int(number) if number.isdigit() else 0, name)


def network_from_function(setting: str, model: str, needed: Sequence[str], described_in: str) -> Any:
    """The nn.Module that FUNCTION of 'MODULE:FUNCTION' returns.

    Args:
        setting: the configuration key, for messages.
        model: its value.
        needed: attributes that the module must have.
        described_in: file that says what is asked of it.

    Raises:
        ConfigError: there is no such function, or what it returns is no such module.
    """
    module, _, function = model.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: {model}: {error}; {described_in} lists what can stand here") from None
    missing = [name for name in needed if not hasattr(made, name)]
    if missing or not isinstance(made, nn.Module):
        raise ConfigError(
            f"{setting}: {model} returned {type(made).__name__} without {', '.join(missing) or 'forward'}; see {described_in}"
        )
    return made
