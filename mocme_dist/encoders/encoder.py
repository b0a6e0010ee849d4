"""What every frozen encoder is to the pipeline, whatever its modality.

An entity's files are decoded to pieces (a text, a picture, a sound, a film: one file is one piece), pieces are
collated to batches, batches are encoded, and the pipeline averages an entity's pieces. Decoding and collating run
in a background thread, encoding in the main one. A file that cannot be decoded is a `Failure`, not an exception.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mocme_dist.config.schema import EncodersConfig


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
    """SHA-256 that pins a feature part: modality, settings that change the values (all but "model"), type on disk, limit."""
    settings = {k: v for k, v in settings.items() if k != "model"}
    pinned = {"modality": modality, "dtype": config.dtype, "max_member_mb": config.max_member_mb, "settings": settings}
    return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode("utf8")).hexdigest()
