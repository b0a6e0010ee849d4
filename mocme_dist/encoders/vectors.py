"""Vectors computed elsewhere take the place of an encoder: they are checked and stored, not computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mocme_dist.encoders.encoder import Decoded, Failure


def vector_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What pins imported features: the content of the file they came from."""
    return {"model": f"imported from {facts['file']}", "imported": facts["sha256"], "width": facts["width"]}


class VectorEncoder:
    """Packed vectors to features as they are; see `encoders.encoder.Encoder` for the contract."""

    chunk = 4096

    def __init__(self, modality: str, facts: Mapping[str, Any]) -> None:
        self.modality, self.settings, self.width = modality, vector_settings(facts), int(facts["width"])

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """(F,) float32 of an entity; a failure when its numbers are not finite."""
        content = members.get(f"{self.modality}.f32")
        if content is None:
            return Decoded()
        if len(content) != 4 * self.width:
            return Decoded(failures=[Failure("wrong length", f"{len(content)} bytes, expected {4 * self.width}")])
        vector = np.frombuffer(content, dtype="<f4")
        wrong = self.width - int(np.isfinite(vector).sum())
        if wrong:
            return Decoded(failures=[Failure("not finite", f"{wrong} of {self.width} numbers are NaN or infinite")])
        return Decoded([vector])

    def collate(self, pieces: list[np.ndarray]) -> np.ndarray:
        """(n, F) float32."""
        return np.stack(pieces)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        """The same."""
        return batch
