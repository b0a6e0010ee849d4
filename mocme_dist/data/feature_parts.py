"""Feature parts on disk: the features of one shard's entities in one modality.

A part holds the rows of the entities that have the modality, and a presence mask. Absence is a fact, not a vector, so
`present` is stored next to the values. Parts are whole or absent and byte-identical for equal input. A part is complete
when its JSON exists, which is written last.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path, read_json, write_json
from mocme_dist.data.manifests import PartRecord, checked
from mocme_dist.data.tensors import tensor_bytes
from mocme_dist.errors import DataError, ShapeError

FEATURES_FORMAT = 1
# Values are compared in blocks of so many numbers: 16 MiB of float32.
_SCAN = 1 << 22


def part_path(directory: Path, shard: int) -> Path:
    """Return the path of a shard's part inside features/MODALITY; its JSON has the same stem."""
    return directory / f"part-{shard:06d}.safetensors"


def part_files(modality: str, shard: int) -> tuple[str, str]:
    """Return a part's files relative to the data set, in the order in which they are written."""
    path = part_path(Path("features") / modality, shard)
    return str(path), str(path.with_suffix(".json"))


def write_part(directory: Path, shard: int, values: NDArray[Any], present: NDArray[Any], stats: dict[str, Any]) -> None:
    """Write one shard's features, then the JSON that marks the part as complete.

    Args:
        directory: features/MODALITY.
        shard: number of the shard.
        values: (num_present, F) float16 or float32, in order of id.
        present: (rows,) bool or uint8, for every id of the shard.
        stats: `failed` {cause: count}, `examples`, `input_sha256`, `encoder_hash`; `bad_shard`, a message, if the shard
            could not be read and all its entities are absent.

    Raises:
        ShapeError: the arrays do not fit together.
    """
    mask = np.ascontiguousarray(present, dtype=bool)
    if values.ndim != 2 or values.dtype not in (np.float16, np.float32) or mask.ndim != 1 or len(values) != mask.sum():
        raise ShapeError(
            f"write_part: values {values.shape} {values.dtype}, {mask.sum()} of {len(mask)} rows present; expected "
            "(present, F) float16/32"
        )
    path = part_path(directory, shard)
    content = tensor_bytes({"values": values, "present": mask.astype(np.uint8)}, {})
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    counts: dict[str, Any] = {
        "shard": shard,
        "rows": len(mask),
        "present": len(values),
        "absent": len(mask) - len(values),
    }
    # The presence mask is repeated here, so that counting over all parts of a remote data set needs no values.
    counts |= {"width": values.shape[1], "present_bits": b64encode(np.packbits(mask).tobytes()).decode()}
    counts |= constant_columns(values)
    size = sum(piece.nbytes for piece in content)
    record = {**counts, **stats, "sha256": digest.hexdigest(), "bytes": size}
    # Another run may have finished the same part and be reading its JSON; only a JSON of other values is removed first.
    if not _says(path.with_suffix(".json"), record):
        path.with_suffix(".json").unlink(missing_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for piece in content:
            file.write(piece)
    write_json(path.with_suffix(".json"), record)


def read_part_record(directory: Path, shard: int) -> dict[str, Any]:
    """Return the JSON of a finished part.

    Raises:
        DataError: it is missing, or a value has another type than `write_part` gives it.
    """
    path = part_path(directory, shard).with_suffix(".json")
    record = read_json(path)
    again = "delete it and run python -m mocme_dist.extract again"
    checked(PartRecord, record, path, again)
    try:
        bits = b64decode(record.get("present_bits", ""), validate=True)
    except ValueError as error:
        raise DataError(f"{path.absolute()}: present_bits: not base64 ({error}); {again}") from None
    if "present_bits" in record and len(bits) != -(-record["rows"] // 8):
        raise DataError(f"{path.absolute()}: present_bits: {len(bits)} bytes for {record['rows']:,} rows; {again}")
    return dict(record)


def finished_hash(dataset_dir: Path, modality: str) -> str:
    """Return the encoder hash in features/MODALITY/manifest.json; empty if there is none or it is damaged."""
    try:
        manifest = read_json(dataset_dir / "features" / modality / "manifest.json")
    except DataError:
        return ""
    return str(manifest.get("encoder_hash", "")) if isinstance(manifest, dict) else ""


def constant_columns(values: NDArray[Any]) -> dict[str, str]:
    """Return which columns of (n, F) values are equal in all rows, and their values, as entries of a part's JSON."""
    if not len(values):
        return {}
    constant = np.ones(values.shape[1], dtype=bool)
    step = max(1, _SCAN // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        constant &= (values[start : start + step] == values[0]).all(axis=0)
    content = np.packbits(constant).tobytes(), values[0][constant].astype("<f4").tobytes()
    return dict(zip(("constant_bits", "constant_values"), (b64encode(part).decode() for part in content), strict=True))


def count_constant_columns(records: Iterable[dict[str, Any]], width: int) -> int | None:
    """Return the number of columns that are equal for all entities, from the JSON of all parts.

    Returns:
        None if fewer than two entities have features, or a part has no valid entries, as those of earlier versions.
    """
    constant = np.ones(width, dtype=bool)
    common: NDArray[np.float32] | None = None
    rows = 0
    for record in records:
        rows += record["present"]
        if not record["present"]:
            continue
        if "constant_bits" not in record:
            return None
        try:
            here = np.unpackbits(np.frombuffer(b64decode(record["constant_bits"]), dtype=np.uint8))[:width].astype(bool)
            found = np.frombuffer(b64decode(record["constant_values"]), dtype="<f4")
        except ValueError:
            return None
        if len(here) != width or len(found) != here.sum():
            return None
        values = np.zeros(width, dtype=np.float32)
        values[here] = found
        constant &= here if common is None else here & (values == common)
        common = values if common is None else common
    return int(constant.sum()) if rows > 1 else None


def recorded_presence(stats: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Return the presence mask (rows,) stored in a part's JSON; None for a part of an earlier version."""
    if "present_bits" not in stats:
        return None
    bits = np.frombuffer(b64decode(stats["present_bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=stats["rows"]).astype(bool)


def _says(path: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(read_json(path) == record)
    except DataError:
        return False


def part_is_complete(
    directory: Path, shard: int, input_sha256: str, encoder_hash: str, bytes_there: int | None = None
) -> bool:
    """Return whether a part was finished for this input and this encoder, and its file has the recorded size.

    Args:
        bytes_there: size of the remote file if only the JSON is local; None takes the local file's size.
    """
    path = part_path(directory, shard)
    try:
        stats = read_json(path.with_suffix(".json"))
        return (
            stats["input_sha256"] == input_sha256
            and stats["encoder_hash"] == encoder_hash
            and stats["shard"] == shard
            and "bad_shard" not in stats  # its shard could not be read: every run tries again
            and (path.stat().st_size if bytes_there is None else bytes_there) == stats["bytes"]
        )
    except (DataError, OSError, KeyError, TypeError):
        return False
