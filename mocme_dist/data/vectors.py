"""Vectors that were computed elsewhere: features/MODALITY.npy, .safetensors, .pt or .pth in a raw folder.

A row is an entity's vector. Which entity, MODALITY.ids beside the file says, one name a line; without it the rows follow
the ids of entity2id.txt, of which there must be as many. A .pt may instead be a dictionary of name to vector. Nothing is
unpickled but tensors: .npy without objects, .pt with weights_only. Files are mapped, rows read one at a time; only a .pt in
torch's format from before 1.6 has to be read whole. A row of zeros is how releases mark an absent entity: it is counted and
left out. Rows with NaN or infinity are packed as they are, and extraction counts them as failures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import sha256_file
from mocme_dist.data.layouts import decode, find_file
from mocme_dist.errors import DataError

log = logging.getLogger(__name__)

FOLDER = "features"
SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
_ABSENT = -1


@dataclass(frozen=True)
class VectorFile:
    """An open file of vectors; `row(i)` is one of them in any number type, `names` are those that a dictionary brings."""

    path: Path
    num_rows: int
    width: int
    row: Callable[[int], NDArray[Any]]
    names: Sequence[str] | None = None

    @property
    def label(self) -> str:
        """The file's name in messages."""
        return f"{FOLDER}/{self.path.name}"


class Vectors:
    """The vectors of one modality by entity.

    Attributes:
        facts: file, sha256, width: what pins them.
        counts: rows of the file, rows of entities outside the graph, and how the rows are named.
    """

    def __init__(self, file: VectorFile, row_of: NDArray[np.int64], outside_graph: int, named_by: str) -> None:
        self._file, self._row_of = file, row_of
        self.facts = {"file": file.path.name, "sha256": sha256_file(file.path), "width": file.width}
        self.counts: dict[str, Any] = {"rows": file.num_rows, "named_by": named_by, "outside_graph": outside_graph}

    @property
    def label(self) -> str:
        """The file's name in messages."""
        return self._file.label

    def entities(self, first: int, last: int) -> list[int]:
        """Ids in [first, last) that have a row."""
        return (first + np.flatnonzero(self._row_of[first:last] != _ABSENT)).tolist()

    def read(self, entity: int) -> NDArray[np.float32] | None:
        """(F,) float32 of an entity that has a row; None when it holds zeros only."""
        with np.errstate(over="ignore"):
            row = np.ascontiguousarray(self._file.row(int(self._row_of[entity])), dtype="<f4")
        return row if row.any() else None


def find_vectors(raw: Path, modality: str) -> Path | None:
    """The file of vectors of a modality, if there is one.

    Raises:
        DataError: there are several.
    """
    found = [path for suffix in SUFFIXES if (path := raw / FOLDER / f"{modality}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{(raw / FOLDER).absolute()}: holds {' and '.join(path.name for path in found)}; delete all but one")
    return found[0] if found else None


def open_vectors(raw: Path, modality: str, ids: Mapping[bytes, int]) -> Vectors | None:
    """The vectors of a modality, their rows matched to the graph's entities; None where there are none.

    Args:
        raw: raw folder.
        modality: such as "image".
        ids: id of every entity of the graph.

    Raises:
        DataError: the file is none of the kinds above, or names and rows do not fit.
    """
    path = find_vectors(raw, modality)
    if path is None:
        return None
    file = _open(path)
    names = find_file(raw / FOLDER, f"{modality}.ids")
    if file.names is not None and names is not None:
        raise DataError(f"{file.label}: is a dictionary by name, and {FOLDER}/{names.label} names rows as well; delete the latter")
    row_of = np.full(len(ids), _ABSENT, dtype=np.int64)
    if file.names is not None:
        given = [(ids.get(name.encode()), row) for row, name in enumerate(file.names)]
        outside, named_by = _place(row_of, given), "its own names"
    elif names is not None:
        outside, named_by = _by_names(row_of, file, raw, modality, ids), names.label
    else:
        outside, named_by = _by_entity_file(row_of, file, raw, modality, ids), "entity2id.txt"
    return Vectors(file, row_of, outside, named_by)


# -- which entity a row belongs to


def _place(row_of: NDArray[np.int64], given: Sequence[tuple[int | None, int]]) -> int:
    """Enter (entity, row) pairs; how many belong to no entity of the graph."""
    for entity, row in given:
        if entity is not None:
            row_of[entity] = row
    return sum(entity is None for entity, _ in given)


def _by_names(row_of: NDArray[np.int64], file: VectorFile, raw: Path, modality: str, ids: Mapping[bytes, int]) -> int:
    table = find_file(raw / FOLDER, f"{modality}.ids")
    assert table is not None
    row, outside = 0, 0
    for row, (number, name) in enumerate(table.lines(), 1):
        if b"\t" in name:
            table.fail(number, "expected one entity name a line, got fields with tabs between")
        entity = ids.get(name)
        if entity is None:
            outside += 1
        elif row_of[entity] != _ABSENT:
            table.fail(number, f"entity '{decode(table, number, name, 'entity')}' is there twice")
        else:
            row_of[entity] = row - 1
    if row != file.num_rows:
        raise DataError(f"{FOLDER}/{table.label}: {row:,} names, {file.label} has {file.num_rows:,} rows; expected a name for each row")
    return outside


def _by_entity_file(row_of: NDArray[np.int64], file: VectorFile, raw: Path, modality: str, ids: Mapping[bytes, int]) -> int:
    """Rows in the order of published ids; packing has read and checked the file already."""
    table = find_file(raw, "entity2id.txt")
    pairs = [line.split(b"\t") for _, line in table.lines()] if table is not None else []
    pairs = [pair for pair in pairs if len(pair) == 2]  # a first line may hold the count
    if len(pairs) != file.num_rows:
        there = f"entity2id.txt has {len(pairs):,} names" if table is not None else "there is no entity2id.txt"
        raise DataError(
            f"{file.label}: {file.num_rows:,} rows without names; {there}: "
            f"expected {FOLDER}/{modality}.ids with an entity name a line, or as many names in entity2id.txt"
        )
    return _place(row_of, [(ids.get(name), int(number)) for name, number in pairs])


# -- the kinds of file


def _open(path: Path) -> VectorFile:
    try:
        return {".npy": _open_npy, ".safetensors": _open_safetensors}.get(path.suffix, _open_pt)(path)
    except DataError:
        raise
    # each reader has its own kinds: headers, zip, types that are not allowed
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path.absolute()}: no vectors can be read: {reason[:300]}; expected {_expected(path)}; nothing in the file was run"
        ) from None


def _expected(path: Path) -> str:
    if path.suffix == ".npy":
        return "a 2-d array of numbers, saved by numpy.save with allow_pickle=False"
    if path.suffix == ".safetensors":
        return "one 2-d tensor"
    return "a 2-d tensor, or a dictionary of name to 1-d tensor, saved by torch.save"


def _checked(path: Path, shape: Sequence[int], is_number: bool, kind: str) -> tuple[int, int]:
    if len(shape) != 2 or not is_number or shape[1] < 1:
        raise DataError(f"{path.absolute()}: shape {tuple(shape)} of {kind}; expected {_expected(path)}")
    return int(shape[0]), int(shape[1])


def _open_npy(path: Path) -> VectorFile:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    is_number = np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)
    rows, width = _checked(path, values.shape, is_number, str(values.dtype))
    return VectorFile(path, rows, width, lambda row: np.asarray(values[row]))


def _open_safetensors(path: Path) -> VectorFile:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")  # torch's: numpy has no bfloat16
    names = list(file.keys())
    if len(names) != 1:
        raise DataError(f"{path.absolute()}: holds {len(names)} tensors ({', '.join(sorted(names)[:5])}); expected one 2-d tensor")
    values = file.get_slice(names[0])
    rows, width = _checked(path, values.get_shape(), values.get_dtype() not in ("BOOL", "C64"), values.get_dtype())
    return VectorFile(path, rows, width, lambda row: values[row : row + 1][0].float().numpy())


def _open_pt(path: Path) -> VectorFile:
    import torch

    try:
        made = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        log.warning("%s/%s: saved in torch's old format, it is read into memory whole", FOLDER, path.name)
        made = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(made, torch.Tensor):
        table = made.detach()
        rows, width = _checked(path, table.shape, not table.is_complex() and table.dtype != torch.bool, str(table.dtype))
        return VectorFile(path, rows, width, lambda row: table[row].float().numpy())
    if not isinstance(made, dict) or not made:
        raise DataError(f"{path.absolute()}: holds {type(made).__name__}; expected {_expected(path)}")
    shapes = {tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__ for value in made.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or not isinstance(shape, tuple) or len(shape) != 1 or not all(isinstance(name, str) for name in made):
        found = ", ".join(map(str, list(shapes)[:3]))
        raise DataError(f"{path.absolute()}: a dictionary of {found}; expected name to 1-d tensor, all of one length")
    vectors = list(made.values())
    return VectorFile(path, len(vectors), int(shape[0]), lambda row: vectors[row].detach().float().numpy(), list(made))
