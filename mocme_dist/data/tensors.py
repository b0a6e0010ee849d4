"""Safetensors and .npy files by numpy alone: memory-mapped for reading, with tensors aligned to 64 bytes.

Commands that answer queries must start quickly, so nothing here imports torch.
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
    "I16": np.dtype("<i2"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGN = 64  # rows of a multiple of 16 floats are then aligned to cache lines
_LONGEST_HEADER = 1 << 20


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset of the data, and its size in bytes.

    Raises:
        ValueError: the file does not begin with a safetensors header.
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


def map_array(path: Path) -> NDArray[Any]:
    """Return a read-only map of a .npy file.

    Raises:
        ValueError: the file is not a whole array of plain numbers; nothing in it was unpickled.
        OSError: it cannot be read.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # numpy parses the header as Python text: it may end in a ValueError, SyntaxError, TokenError, TypeError, ...
    except Exception as error:
        raise ValueError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'cut'}"[:200]
        ) from None
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return array


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return read-only maps of the tensors in a safetensors file; only touched pages are read.

    Raises:
        ValueError, KeyError, TypeError: the file is truncated or holds an unsupported type.
    """
    header, begin, size = _read_header(path)
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        (start, stop) = entry["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= size:
            raise ValueError(f"tensor {name} claims bytes {start} to {stop}")
        # An empty tensor cannot be mapped.
        tensors[name] = np.memmap(path, dtype, "r", begin + start, shape) if stop > start else np.empty(shape, dtype)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata that `write_tensors` stored with the tensors; empty if there is none.

    Raises:
        ValueError: the file does not begin with a safetensors header.
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
    """Return the content of a safetensors file in pieces, without copying contiguous tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header, sort_keys=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    start = memoryview(len(text).to_bytes(8, "little") + text)
    return [start, *(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data for value in tensors.values())]
