"""The interface between frozen encoders and the pipeline.

An entity's files are decoded to pieces (one per text, image, audio or video file), pieces are collated to batches,
batches are encoded, and the pipeline averages an entity's pieces. Decoding and collating need no network: they run in a
background thread, or on actors of their own; encoding runs in the main thread. A file that cannot be decoded is a
`Failure`, not an exception.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mocme_dist.config.schema import EncodersConfig
from mocme_dist.errors import MocmeError


class BadFile(ValueError):
    """A file that cannot be decoded; reports count the `cause`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Failure:
    """Reason why a file gave no piece: a short cause that is counted, and a line of explanation."""

    cause: str
    message: str


@dataclass
class Decoded:
    """The pieces of one entity, none if it has no file of the modality, and the failed files."""

    pieces: list[Any] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Decoder(Protocol):
    """The half of an encoder that needs no network: from files to batches in host memory.

    Attributes:
        modality: members of a sample whose name starts with "MODALITY." are its files.
        chunk: number of pieces per call of `collate` and `encode`; fixed, so that batches do not depend on the
            process that runs the shard.
    """

    modality: str
    chunk: int

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return the pieces of one entity from its members, by name without the key ("image.0.png")."""

    def collate(self, pieces: list[Any]) -> Any:
        """Return up to `chunk` pieces of any entities as the input of `encode`; it can be pickled."""


class Encoder(Decoder, Protocol):
    """A frozen encoder of one modality.

    Attributes:
        width: F, the length of a feature vector.
        settings: everything that changes the values (hash of the weights, sizes, pooling), and "model", a name for
            readers.
    """

    width: int
    settings: dict[str, Any]

    def encode(self, batch: Any) -> np.ndarray:
        """Return (n, F) float32, one row per piece, in their order."""


def encoder_hash(modality: str, settings: Mapping[str, Any], config: EncodersConfig) -> str:
    """Return the SHA-256 over all that determines a feature part.

    Modality, settings but "model", type on disk, size limit.

    Causes of rounding differences are not included: threads, batch size, device, versions of libraries. An extraction
    that was begun on one kind of machine can be finished on another.
    """
    settings = {k: v for k, v in settings.items() if k != "model"}
    pinned = {"modality": modality, "dtype": config.dtype, "max_member_mb": config.max_member_mb, "settings": settings}
    return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode("utf8")).hexdigest()


def decode_files(members: Mapping[str, bytes], decode: Callable[[bytes], Any]) -> Decoded:
    """Return one piece per file of an entity, in the order of their numbers; a `BadFile` becomes a failure."""
    decoded = Decoded()
    for name in sorted(members, key=_member_order):
        try:
            decoded.pieces.append(decode(members[name]))
        except BadFile as error:
            decoded.failures.append(Failure(error.cause, f"{name}: {error}"))
    return decoded


def decode_safely(decoder: Decoder, members: Mapping[str, bytes]) -> Decoded:
    """Return `decoder.decode(members)`; an unexpected error of a library becomes a failure of these members."""
    try:
        return decoder.decode(members)
    except MocmeError:
        raise
    except Exception as error:  # decoders raise any kind of error on hostile files
        names = ", ".join(sorted(members))
        # addresses in memory would make reports of reruns differ
        message = re.sub(r"0x[0-9a-fA-F]+", "0x...", str(error).splitlines()[0]) if str(error) else ""
        return Decoded(failures=[Failure("undecodable", f"{names}: {type(error).__name__}: {message}")])


def printable(text: str) -> str:
    """Return the text with lone surrogates, which JSON accepts and UTF-8 does not, as escapes."""
    return text.encode("utf8", "backslashreplace").decode("utf8")


def _member_order(name: str) -> tuple[int, str]:
    """image.10.png comes after image.9.png."""
    number = name.split(".")[1]
    return (int(number) if number.isdigit() else 0, name)
