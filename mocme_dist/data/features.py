"""Feature parts on disk, and the store that gives a rank the features of its rows.

A part belongs to one shard: the rows of the entities that have the modality, and who they are. Absent is a fact, not a
vector: `present` travels beside the values. Parts are whole or absent, byte-identical for equal input, and a part is
done when its JSON is there, which is written last.
"""

from __future__ import annotations

import hashlib
import logging
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocme_dist.data.files import atomic_path, read_json, sha256_file, write_json
from mocme_dist.data.tensors import map_tensors, tensor_bytes
from mocme_dist.errors import DataError, ShapeError
from mocme_dist.partition import ShardPartition

log = logging.getLogger(__name__)

FEATURES_FORMAT = 1
_TORCH = {np.dtype("<f2"): torch.float16, np.dtype("<f4"): torch.float32}
# Values are scanned for NaN in blocks of so many numbers: 16 MiB of float32.
_SCAN = 1 << 22
# Numbers of a block that is gathered at once: half a MiB of float16.
_BLOCK = 1 << 18


def part_path(directory: Path, shard: int) -> Path:
    """File of a shard's part inside features/MODALITY; its JSON has the same stem."""
    return directory / f"part-{shard:06d}.safetensors"


def part_files(modality: str, shard: int) -> tuple[str, str]:
    """A part's files inside the data set, in the order in which they are written."""
    path = part_path(Path("features") / modality, shard)
    return str(path), str(path.with_suffix(".json"))


def write_part(directory: Path, shard: int, values: NDArray[Any], present: NDArray[Any], stats: dict[str, Any]) -> None:
    """Write one shard's features, then the JSON that says the part is complete.

    Args:
        directory: features/MODALITY.
        shard: number of the shard.
        values: (num_present, F) float16 or float32, in order of id.
        present: (rows,) bool or uint8, one for every id of the shard.
        stats: `failed` {cause: count}, `examples`, `input_sha256`, `encoder_hash`; `bad_shard`, a message, where the shard
            could not be read and all its entities are absent.

    Raises:
        ShapeError: the arrays do not fit together.
    """
    mask = np.ascontiguousarray(present, dtype=bool)
    if values.ndim != 2 or values.dtype not in _TORCH or mask.ndim != 1 or len(values) != mask.sum():
        raise ShapeError(
            f"write_part: values {values.shape} {values.dtype}, {mask.sum()} of {len(mask)} rows present; expected (present, F) float16/32"
        )
    path = part_path(directory, shard)
    content = tensor_bytes({"values": values, "present": mask.astype(np.uint8)}, {})
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    counts: dict[str, Any] = {"shard": shard, "rows": len(mask), "present": len(values), "absent": len(mask) - len(values)}
    # Who is present, also here: whoever counts over all parts of a remote data set need not fetch their values.
    counts |= {"width": values.shape[1], "present_bits": b64encode(np.packbits(mask).tobytes()).decode()}
    size = sum(piece.nbytes for piece in content)
    record = {**counts, **stats, "sha256": digest.hexdigest(), "bytes": size}
    # Another run may have finished this very part, and read its JSON now; only that of other values must go before them.
    if not _says(path.with_suffix(".json"), record):
        path.with_suffix(".json").unlink(missing_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for piece in content:
            file.write(piece)
    write_json(path.with_suffix(".json"), record)


def recorded_presence(stats: dict[str, Any]) -> NDArray[np.bool_] | None:
    """(rows,) who is present, by the JSON of a part; None in one of before it said so."""
    if "present_bits" not in stats:
        return None
    bits = np.frombuffer(b64decode(stats["present_bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=stats["rows"]).astype(bool)


def _says(path: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(read_json(path) == record)
    except DataError:
        return False


def part_is_complete(directory: Path, shard: int, input_sha256: str, encoder_hash: str, bytes_there: int | None = None) -> bool:
    """Whether a part was finished for this input and this encoder, and its file still has the size it had.

    Args:
        bytes_there: size of the file where it lies elsewhere and only its JSON is here; None looks at the file.
    """
    path = part_path(directory, shard)
    try:
        stats = read_json(path.with_suffix(".json"))
        return (
            stats["input_sha256"] == input_sha256
            and stats["encoder_hash"] == encoder_hash
            and stats["shard"] == shard
            and "bad_shard" not in stats  # left out for want of a good shard: tried again by every run
            and (path.stat().st_size if bytes_there is None else bytes_there) == stats["bytes"]
        )
    except (DataError, OSError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class _Part:
    """The rows of one part that a store wants: memory-mapped values, who has a row in them, and who counts as present."""

    values: NDArray[Any]
    stored: NDArray[np.bool_]
    present: NDArray[np.bool_]


class FeatureStore:
    """Features of the entities [first, last) in one modality.

    Residency "host" holds them in host memory, "device" on the device, "mmap" leaves them on disk and reads the rows
    that are asked for. All three give equal results.

    Attributes:
        modality: its name.
        width: F, numbers per entity.
        num_rows: last - first.
    """

    def __init__(self, modality: str, width: int, parts: list[_Part], residency: str, device: str) -> None:
        self.modality = modality
        self.width = width
        self._device = torch.device(device)
        self._residency = residency
        present = np.concatenate([part.present for part in parts] or [np.zeros(0, bool)])
        stored = np.concatenate([part.stored for part in parts] or [np.zeros(0, bool)])
        self.num_rows = len(present)
        home = self._device if residency == "device" else torch.device("cpu")
        self._present = torch.from_numpy(present).to(home)
        # Where each row's values lie among those that are stored; rows without values point at a neighbour.
        self._index = (torch.from_numpy(np.cumsum(stored, dtype=np.int64)) - 1).clamp_(min=0).to(home)
        self._maps = [part.values for part in parts] if residency == "mmap" else []
        self._starts = np.cumsum([0] + [len(part.values) for part in parts])
        self._values = torch.empty((0, width))
        if residency != "mmap":
            dtype = _TORCH[parts[0].values.dtype] if parts else torch.float32
            self._values = torch.empty((int(self._starts[-1]), width), dtype=dtype, device=home)
            for start, part in zip(self._starts, parts, strict=False):
                # Part by part: at no time are two copies of everything in host memory.
                self._values[start : start + len(part.values)] = torch.from_numpy(np.array(part.values))

    @classmethod
    def open(
        cls,
        dataset_dir: Path,
        modality: str,
        first: int,
        last: int,
        residency: str = "host",
        device: str = "cpu",
        on_bad_feature: str = "error",
    ) -> FeatureStore:
        """Open the parts that overlap ids [first, last).

        Args:
            dataset_dir: packed data set with features/MODALITY in it.
            modality: such as "text".
            first, last: id range, as a rank's `RowPartition.bounds`.
            residency: "host", "device" or "mmap".
            device: where `gather` puts its results.
            on_bad_feature: what values that are not finite do: "error" stops, "mask" makes their entities absent and warns.

        Raises:
            DataError: features are missing, of other rows or another encoder, torn, or hold values that are not finite.
        """
        directory = Path(dataset_dir) / "features" / modality
        manifest = _checked_manifest(Path(dataset_dir), directory)
        partition = ShardPartition(manifest["num_rows"], manifest["shard_rows"])
        if not 0 <= first <= last <= partition.num_rows:
            raise ShapeError(f"FeatureStore: rows [{first}, {last}) of {partition.num_rows}")
        parts = [
            _open_part(directory, shard, partition.bounds(shard), (start, stop), manifest, on_bad_feature)
            for shard, start, stop in partition.overlapping(first, last)
        ]
        return cls(modality, manifest["width"], parts, residency, device)

    def present(self) -> Tensor:
        """(num_rows,) bool: which rows have this modality."""
        return self._present

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features of some rows.

        Args:
            rows: (U,) int64 local rows in [0, num_rows), any order, repeats allowed.

        Returns:
            values (U, F) float32 with zeros where absent, and present (U,) bool, on the store's device.

        Raises:
            ShapeError: a row lies outside the range.
        """
        rows = rows.to(self._present.device)
        # On a GPU this test would make the host wait for the device; indexing asserts there.
        if rows.device.type == "cpu" and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.num_rows):
            raise ShapeError(
                f"FeatureStore.gather: rows {int(rows.min())} to {int(rows.max())} of {self.modality}, expected [0, {self.num_rows})"
            )
        # Not by brackets, which take several threads: mapped rows are gathered beside a step, and a second team of threads on
        # the same cores makes OpenMP put those of the step to sleep between any two operations.
        present, index = self._present.index_select(0, rows), self._index.index_select(0, rows)
        if self._starts[-1] == 0:
            values = torch.zeros((len(rows), self.width), device=rows.device)
        elif self._residency == "mmap":
            values = self._gather_mapped(index.numpy(), present.numpy())
        elif rows.device.type == "cpu":
            values = self._gather_held(index, present)
        else:
            values = self._values[index].float().masked_fill_(~present[:, None], 0)
        return values.to(self._device), present.to(self._device)

    def _gather_held(self, index: Tensor, present: Tensor) -> Tensor:
        """Rows as float32, block by block: a block's own type stays in the cache until it is converted."""
        values = torch.empty((len(index), self.width), dtype=torch.float32)
        step = max(1, _BLOCK // max(1, self.width))
        block = torch.empty((min(step, len(index)), self.width), dtype=self._values.dtype)
        for start in range(0, len(index), step):
            some = index[start : start + step]
            found = torch.index_select(self._values, 0, some, out=block[: len(some)])
            values[start : start + step] = found.masked_fill_(~present[start : start + step, None], 0)
        return values

    def _gather_mapped(self, index: NDArray[np.int64], present: NDArray[np.bool_]) -> Tensor:
        values = np.zeros((len(index), self.width), dtype=np.float32)
        part = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(part[present]):
            here = present & (part == number)
            values[here] = self._maps[number][index[here] - self._starts[number]]
        return torch.from_numpy(values)


def _checked_manifest(dataset_dir: Path, directory: Path) -> dict[str, Any]:
    """The features' manifest, if it is of this data set's rows."""
    again = f"run python -m mocme_dist.extract {dataset_dir}"
    if not (directory / "manifest.json").is_file():
        raise DataError(f"{directory.absolute()}: no finished features of this modality; {again}")
    manifest, dataset = read_json(directory / "manifest.json"), read_json(dataset_dir / "manifest.json")
    try:
        if manifest["format"] != FEATURES_FORMAT:
            raise DataError(f"{directory.absolute()}: features of format {manifest['format']}, expected {FEATURES_FORMAT}; {again}")
        found = (manifest["num_rows"], manifest["shard_rows"])
        expected = (dataset["num_entities"], dataset["shard_rows"])
        hashes = [entry["sha256"] for entry in dataset["shards"]]
        checked = {**manifest, "width": int(manifest["width"]), "encoder_hash": manifest["encoder_hash"], "hashes": hashes}
    except (KeyError, TypeError) as error:
        raise DataError(f"{directory.absolute()}: manifest.json is damaged, it lacks {error}; {again}") from None
    if found != expected:
        raise DataError(f"{directory.absolute()}: made for (rows, shard rows) = {found}, the data set has {expected}; {again}")
    return checked


def _open_part(
    directory: Path, shard: int, bounds: tuple[int, int], wanted: tuple[int, int], manifest: dict[str, Any], on_bad_feature: str
) -> _Part:
    """Map one part and cut out the ids [wanted[0], wanted[1]), after checking it whole."""
    path = part_path(directory, shard)
    again = "delete it and run python -m mocme_dist.extract again"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise DataError(f"{path.absolute()}: part {shard} is missing; run python -m mocme_dist.extract again")
    stats = read_json(path.with_suffix(".json"))
    for key, expected in (("encoder_hash", manifest["encoder_hash"]), ("input_sha256", manifest["hashes"][shard])):
        if stats.get(key) != expected:
            raise DataError(f"{path.absolute()}: {key} {str(stats.get(key))[:12]}, expected {str(expected)[:12]}; {again}")
    size = path.stat().st_size
    if size != stats.get("bytes") or sha256_file(path) != stats.get("sha256"):
        raise DataError(
            f"{path.absolute()}: {size:,} bytes, expected {stats.get('bytes', 0):,} of another sha256; the part is torn, {again}"
        )
    try:
        tensors = map_tensors(path)
        values, mask = tensors["values"], np.array(tensors["present"]).astype(bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path.absolute()}: not a safetensors file of values and present ({error}); {again}") from None
    if mask.shape != (bounds[1] - bounds[0],) or values.shape != (mask.sum(), manifest["width"]) or values.dtype not in _TORCH:
        raise DataError(
            f"{path.absolute()}: values {values.shape} {values.dtype} and present {mask.shape}, expected {bounds[1] - bounds[0]} rows "
            f"of width {manifest['width']}; {again}"
        )
    if "bad_shard" in stats:
        log.warning("%s: shard %d could not be read when features were made: its entities are absent", directory.name, shard)
    low, high = wanted[0] - bounds[0], wanted[1] - bounds[0]
    start, stop = int(mask[:low].sum()), int(mask[:high].sum())
    present = _finite(values, mask, bounds[0], directory.name, path, on_bad_feature)
    return _Part(values[start:stop], mask[low:high], present[low:high])


def _finite(
    values: NDArray[Any], mask: NDArray[np.bool_], first_id: int, modality: str, path: Path, on_bad_feature: str
) -> NDArray[np.bool_]:
    """Who is present with finite values; others are an error, or absent with a warning."""
    step = max(1, _SCAN // max(1, values.shape[1]))
    bad, good = 0, np.ones(len(values), dtype=bool)
    for start in range(0, len(values), step):
        wrong = ~np.isfinite(values[start : start + step])
        good[start : start + step] = ~wrong.any(axis=1)
        bad += int(wrong.sum())
    if not bad:
        return mask
    entities = first_id + np.flatnonzero(mask)[~good]
    found = f"{path.name}: {bad} values of modality {modality} are not finite, the first at entity {entities[0]} (key {entities[0]:012d})"
    if on_bad_feature == "error":
        raise DataError(
            f"{found}; mend its raw file or the encoder, delete the part and run python -m mocme_dist.extract again, "
            "or let such entities be absent with --on-bad-feature=mask (features.on_bad)"
        )
    log.warning("%s: %d entities are absent in this modality", found, len(entities))
    present = mask.copy()
    present[np.flatnonzero(mask)] = good
    return present
