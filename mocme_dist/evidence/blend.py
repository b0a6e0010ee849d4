"""The fitted blend as a file: a table of weights with frequency, a table without it, and the data of the fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.tensors import map_tensors, read_metadata, write_tensors
from mocme_dist.errors import CheckpointError

FILE = "blend.safetensors"
_FORMAT = 1


class Blend(NamedTuple):
    """Weights of a checkpoint's blend.

    Attributes:
        terms: their names, in the order of the columns; the model's blocks first.
        weight_PF: (places, F) float32, place 2 * relation + direction.
        without_frequency_PF: the same, fitted without the term "frequency".
        step: of the checkpoint whose vectors they were fitted to.
        settings: of the evidence and of the fit.
        fitted: on which split, on how many queries, and the MRR there.
    """

    terms: tuple[str, ...]
    weight_PF: NDArray[np.float32]
    without_frequency_PF: NDArray[np.float32]
    step: int
    settings: dict[str, Any]
    fitted: dict[str, Any]

    def fits(self, terms: Sequence[str], places: int, step: int, settings: dict[str, Any]) -> bool:
        """Whether it is of these terms, of this checkpoint and of these settings."""
        same = self.terms == tuple(terms) and self.weight_PF.shape == (places, len(terms))
        return same and self.step == step and self.settings == settings


def save_blend(path: Path, blend: Blend) -> None:
    """Write the file, whole or not at all."""
    about = {"format": _FORMAT, "terms": list(blend.terms), "step": blend.step}
    about |= {"settings": blend.settings, "fitted": blend.fitted}
    tables = {"weights": blend.weight_PF, "without_frequency": blend.without_frequency_PF}
    write_tensors(path, tables, {"blend": json.dumps(about, sort_keys=True)})


def load_blend(path: Path) -> Blend:
    """Read a file of `save_blend`.

    Raises:
        CheckpointError: it is missing, torn, or of another format.
    """
    try:
        about = json.loads(read_metadata(path)["blend"])
        if about["format"] != _FORMAT:
            raise CheckpointError(f"{path}: a blend of format {about['format']}, expected {_FORMAT}; fit it again")
        tensors = {name: np.array(value) for name, value in map_tensors(path).items()}
        tables = [tensors[name] for name in ("weights", "without_frequency")]
        if any(
            table.shape != (len(tables[0]), len(about["terms"])) or not np.isfinite(table).all() or (table < 0).any()
            for table in tables
        ):
            raise ValueError("a table has another shape or a weight that is negative")
        return Blend(
            tuple(about["terms"]),
            tables[0],
            tables[1],
            int(about["step"]),
            dict(about["settings"]),
            dict(about["fitted"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the blend cannot be read ({error}); delete it and run evaluate") from None
