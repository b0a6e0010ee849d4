"""Safetensors files by numpy alone: mapped for reading, written with their numbers at multiples of 64 bytes.

What answers queries must start in a moment, so nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGN = 64  # a row of a multiple of 16 floats then never straddles a cache line it need not
_LONGEST_HEADER = 1 << 20


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the numbers start, and how many bytes there are.

    Raises:
        ValueError: the file does not start as a safetensors file does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"header of {length} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header, 8 + length, size - 8 - length


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only maps of the tensors in a safetensors file; only touched pages are read.

    Raises:
        ValueError, KeyError, TypeError: the file is torn or holds a type that is not used here.
    """
    header, begin, size = _read_header(path)
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= size:
            raise ValueError(f"tensor {name} claims bytes {start} to {stop}")
        # An empty tensor cannot be mapped.
        tensors[name] = np.memmap(path, dtype, "r", begin + start, shape) if stop > start else np.empty(shape, dtype)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that `write_tensors` kept beside the tensors; empty for a file that has none.

    Raises:
        ValueError: the file does not start as a safetensors file does.
    """
    return dict(_read_header(path)[0].get("__metadata__", {}))


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; the first tensor starts at a multiple of 64 bytes.

    Raises:
        StorageError: it cannot be written.
    """
    content = tensor_bytes(tensors, metadata)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(content)


def tensor_bytes(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> list[memoryview]:
    """What `write_tensors` writes, in pieces and without a copy of contiguous tensors, for those who hash it as well."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, value in tensors.items():
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header, sort_keys=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    start = memoryview(len(text).to_bytes(8, "little") + text)
    return [start, *(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data for value in tensors.values())]
