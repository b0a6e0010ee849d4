"""Vectors computed elsewhere: features/MODALITY.npy, .safetensors, .pt or .pth in a raw folder.

A row is an entity's vector. MODALITY.ids next to the file names the entity of each row, one name per line; without it
the rows follow the ids of entity2id.txt, and their numbers must match. A .pt may instead be a dictionary of name to
vector. Nothing but tensors is unpickled: .npy without objects, .pt with weights_only. Files are memory-mapped and rows
read one at a time; only a .pt in torch's format from before 1.6 is read whole. Releases mark an absent entity by a row
of zeros, which is counted and left out. Rows with NaN or infinity are packed unchanged, and extraction counts them as
failures.
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
from mocme_dist.data.tensors import map_array
from mocme_dist.data.tsv import decode, find_file
from mocme_dist.errors import DataError

log = logging.getLogger(__name__)

FOLDER = "features"
SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
_ABSENT = -1


@dataclass(frozen=True)
class VectorFile:
    """An open file of vectors; `row(i)` returns one in any number type, `names` are the keys of a dictionary."""

    path: Path
    num_rows: int
    width: int
    row: Callable[[int], NDArray[Any]]
    names: Sequence[str] | None = None

    @property
    def label(self) -> str:
        """Return the file's name for messages."""
        return f"{FOLDER}/{self.path.name}"


class Vectors:
    """The vectors of one modality by entity.

    Attributes:
        facts: file, sha256 and width, which identify the vectors.
        counts: rows of the file, rows of entities outside the graph, and the source of the rows' names.
    """

    def __init__(self, file: VectorFile, row_of: NDArray[np.int64], outside_graph: int, named_by: str) -> None:
        self._file = file
        self._row_of = row_of
        self.facts = {"file": file.path.name, "sha256": sha256_file(file.path), "width": file.width}
        self.counts: dict[str, Any] = {"rows": file.num_rows, "named_by": named_by, "outside_graph": outside_graph}

    @property
    def label(self) -> str:
        """Return the file's name for messages."""
        return self._file.label

    def entities(self, first: int, last: int) -> list[int]:
        """Return ids in [first, last) that have a row."""
        return (first + np.flatnonzero(self._row_of[first:last] != _ABSENT)).tolist()

    def read(self, entity: int) -> NDArray[np.float32] | None:
        """Return (F,) float32 of an entity that has a row; None if the row is all zeros."""
        with np.errstate(over="ignore"):
            row = np.ascontiguousarray(self._file.row(int(self._row_of[entity])), dtype="<f4")
        return row if row.any() else None


def find_vectors(raw: Path, modality: str) -> Path | None:
    """Return the file of vectors of a modality, or None.

    Raises:
        DataError: there are several.
    """
    found = [path for suffix in SUFFIXES if (path := raw / FOLDER / f"{modality}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(
            f"{(raw / FOLDER).absolute()}: holds {' and '.join(path.name for path in found)}; delete all but one"
        )
    return found[0] if found else None


def open_vectors(raw: Path, modality: str, ids: Mapping[bytes, int]) -> Vectors | None:
    """Return the vectors of a modality, with rows matched to the graph's entities; None if there are none.

    Args:
        raw: raw folder.
        modality: for example "image".
        ids: id of every entity of the graph.

    Raises:
        DataError: the file is of no supported kind, or names and rows do not match.
    """
    path = find_vectors(raw, modality)
    if path is None:
        return None
    file = _open(path)
    names = find_file(raw / FOLDER, f"{modality}.ids")
    if file.names is not None and names is not None:
        raise DataError(
            f"{file.label}: is a dictionary by name, and {FOLDER}/{names.label} names rows as well; delete the latter"
        )
    row_of = np.full(len(ids), _ABSENT, dtype=np.int64)
    if file.names is not None:
        given = [(ids.get(name.encode()), row) for row, name in enumerate(file.names)]
        outside = _place(row_of, given)
        named_by = "its own names"
    elif names is not None:
        outside = _by_names(row_of, file, raw, modality, ids)
        named_by = names.label
    else:
        outside = _by_entity_file(row_of, file, raw, modality, ids)
        named_by = "entity2id.txt"
    return Vectors(file, row_of, outside, named_by)


# -- entities of the rows


def _place(row_of: NDArray[np.int64], given: Sequence[tuple[int | None, int]]) -> int:
    """Enter (entity, row) pairs; return how many belong to no entity of the graph."""
    for entity, row in given:
        if entity is not None:
            row_of[entity] = row
    return sum(entity is None for entity, _ in given)


def _by_names(row_of: NDArray[np.int64], file: VectorFile, raw: Path, modality: str, ids: Mapping[bytes, int]) -> int:
    table = find_file(raw / FOLDER, f"{modality}.ids")
    assert table is not None
    row = 0
    outside = 0
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
        raise DataError(
            f"{FOLDER}/{table.label}: {row:,} names, {file.label} has {file.num_rows:,} rows; expected a name for each "
            "row"
        )
    return outside


def _by_entity_file(
    row_of: NDArray[np.int64], file: VectorFile, raw: Path, modality: str, ids: Mapping[bytes, int]
) -> int:
    """Assign rows in the order of the ids in entity2id.txt, which packing has checked already."""
    table = find_file(raw, "entity2id.txt")
    pairs = [line.split(b"\t") for _, line in table.lines()] if table is not None else []
    pairs = [pair for pair in pairs if len(pair) == 2]  # the first line may hold the count
    if len(pairs) != file.num_rows:
        there = f"entity2id.txt has {len(pairs):,} names" if table is not None else "there is no entity2id.txt"
        raise DataError(
            f"{file.label}: {file.num_rows:,} rows without names; {there}: expected {FOLDER}/{modality}.ids with an "
            "entity name a line, or as many names in entity2id.txt"
        )
    return _place(row_of, [(ids.get(name), int(number)) for name, number in pairs])


# -- file formats


def _open(path: Path) -> VectorFile:
    try:
        return {".npy": _open_npy, ".safetensors": _open_safetensors}.get(path.suffix, _open_pt)(path)
    except DataError:
        raise
    # Each reader has its own kinds of error: headers, zip, types that are not allowed.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if type(error).__name__ == "UnpicklingError":  # torch's own message explains how to unpickle it all the same
            reason = "it holds something other than tensors"
        raise DataError(
            f"{path.absolute()}: no vectors can be read: {reason[:300]}; expected {_expected(path)}; "
            "nothing in the file was run"
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
    values = map_array(path)
    is_number = np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)
    rows, width = _checked(path, values.shape, is_number, str(values.dtype))
    return VectorFile(path, rows, width, lambda row: np.asarray(values[row]))


def _open_safetensors(path: Path) -> VectorFile:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")  # torch's: numpy has no bfloat16
    names = list(file.keys())
    if len(names) != 1:
        raise DataError(
            f"{path.absolute()}: holds {len(names)} tensors ({', '.join(sorted(names)[:5])}); expected one 2-d tensor"
        )
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
    tensors = [made] if isinstance(made, torch.Tensor) else list(made.values()) if isinstance(made, dict) else []
    if not tensors:
        raise DataError(f"{path.absolute()}: holds {type(made).__name__}; expected {_expected(path)}")
    if others := [value for value in tensors if not _is_plain(value)]:
        raise DataError(f"{path.absolute()}: holds {_kind(others[0])}; expected {_expected(path)}")
    # A view may claim more numbers than the file stores: a row repeated 10^9 times is a file of 1 kB.
    if (claimed := sum(value.numel() * value.element_size() for value in tensors)) > path.stat().st_size:
        raise DataError(
            f"{path.absolute()}: {claimed:,} bytes of numbers in a file of {path.stat().st_size:,}; save a copy of the "
            "tensor (tensor.clone()), not an expanded view"
        )
    if isinstance(made, torch.Tensor):
        table = made.detach()
        is_number = not table.is_complex() and table.dtype != torch.bool
        rows, width = _checked(path, table.shape, is_number, str(table.dtype))
        return VectorFile(path, rows, width, lambda row: table[row].float().numpy())
    shapes = {tuple(value.shape) for value in tensors}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 1 or not all(isinstance(name, str) for name in made):
        found = ", ".join(map(str, list(shapes)[:3]))
        raise DataError(f"{path.absolute()}: a dictionary of {found}; expected name to 1-d tensor, all of one length")
    return VectorFile(path, len(tensors), int(shape[0]), lambda row: tensors[row].detach().float().numpy(), list(made))


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor in memory with ordinary numbers."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def _kind(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
    return f"a tensor of {value.dtype} that is {kind.removeprefix('torch.')} on device {value.device.type}"
