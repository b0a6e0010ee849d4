"""The store that gives a rank the features of its rows, from the parts of `data.feature_parts`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocme_dist.data.feature_parts import FEATURES_FORMAT, part_path, read_part_record
from mocme_dist.data.files import read_json, sha256_file
from mocme_dist.data.manifests import FeaturesManifest, checked
from mocme_dist.data.tensors import map_tensors
from mocme_dist.errors import DataError, ShapeError
from mocme_dist.partition import ShardPartition

log = logging.getLogger(__name__)

_TORCH = {np.dtype("<f2"): torch.float16, np.dtype("<f4"): torch.float32}
# Numbers per block of the scan for NaN: 16 MiB of float32.
_SCAN = 1 << 22
# Numbers per block of a gather: half a MiB of float16.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class _Part:
    """The rows of one part that a store needs: memory-mapped values, the mask of stored rows, and the presence mask."""

    values: NDArray[Any]
    stored: NDArray[np.bool_]
    present: NDArray[np.bool_]


class FeatureStore:
    """Features of the entities [first, last) in one modality.

    Residency "host" keeps them in host memory, "device" in device memory, and "mmap" on disk, from which rows are read
    on demand. All three give equal results.

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
        # Place of each row's values among the stored ones; rows without values point at a neighbour.
        self._index = (torch.from_numpy(np.cumsum(stored, dtype=np.int64)) - 1).clamp_(min=0).to(home)
        self._maps = [part.values for part in parts] if residency == "mmap" else []
        self._starts = np.cumsum([0] + [len(part.values) for part in parts])
        self._values = torch.empty((0, width))
        if residency != "mmap":
            dtype = _TORCH[parts[0].values.dtype] if parts else torch.float32
            self._values = torch.empty((int(self._starts[-1]), width), dtype=dtype, device=home)
            for start, part in zip(self._starts, parts, strict=False):
                # Part by part, so that host memory never holds two copies of everything.
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
            modality: for example "text".
            first, last: id range, for example a rank's `RowPartition.bounds`.
            residency: "host", "device" or "mmap".
            device: device of the results of `gather`.
            on_bad_feature: "error" raises for values that are not finite; "mask" makes their entities absent and warns.

        Raises:
            DataError: features are missing, truncated, of other rows or another encoder, or not finite.
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
        """Return (num_rows,) bool: which rows have this modality."""
        return self._present

    def on_device(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return stored values, each row's place among them and presence (num_rows,); a graph looks rows up in them.

        None unless residency is "device" and there are values.
        """
        held = self._residency == "device" and bool(self._starts[-1])
        return (self._values, self._index, self._present) if held else None

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of some rows.

        Args:
            rows: (U,) int64 local rows in [0, num_rows), any order, repeats allowed.

        Returns:
            values (U, F) float32 with zeros where absent, and present (U,) bool, on the store's device.

        Raises:
            ShapeError: a row lies outside the range.
        """
        rows = rows.to(self._present.device)
        # On a GPU this test would synchronise with the device; indexing asserts there.
        if rows.device.type == "cpu" and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.num_rows):
            raise ShapeError(
                f"FeatureStore.gather: rows {int(rows.min())} to {int(rows.max())} of {self.modality}, expected [0, "
                f"{self.num_rows})"
            )
        # index_select runs in this thread, brackets would start several: mapped rows are gathered during a step, and a
        # second OpenMP team on the same cores puts the step's threads to sleep between operations.
        present = self._present.index_select(0, rows)
        index = self._index.index_select(0, rows)
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
        """Return rows as float32, block by block: a block stays in the cache until it is converted."""
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


def features_manifest(dataset_dir: Path, modality: str) -> FeaturesManifest | None:
    """Return features/MODALITY/manifest.json; None if the features are not finished.

    Raises:
        DataError: it is damaged, or of another format.
    """
    path = dataset_dir / "features" / modality / "manifest.json"
    again = _again(dataset_dir)
    if not path.is_file():
        return None
    manifest = read_json(path)
    if isinstance(manifest, dict) and manifest.get("format", FEATURES_FORMAT) != FEATURES_FORMAT:
        raise DataError(
            f"{path.parent.absolute()}: features of format {manifest['format']}, expected {FEATURES_FORMAT}; {again}"
        )
    return checked(FeaturesManifest, manifest, path, again)


def _again(dataset_dir: Path) -> str:
    return f"run python -m mocme_dist.extract {dataset_dir}"


def _checked_manifest(dataset_dir: Path, directory: Path) -> dict[str, Any]:
    """Return the features' manifest, after checking that it belongs to this data set's rows."""
    again = _again(dataset_dir)
    features = features_manifest(dataset_dir, directory.name)
    if features is None:
        raise DataError(f"{directory.absolute()}: no finished features of this modality; {again}")
    dataset = read_json(dataset_dir / "manifest.json")
    try:
        expected = (dataset["num_entities"], dataset["shard_rows"])
        hashes = [entry["sha256"] for entry in dataset["shards"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{dataset_dir.absolute()}: manifest.json is damaged, it lacks {error}; pack the data set again"
        ) from None
    found = (features.num_rows, features.shard_rows)
    if found != expected:
        raise DataError(
            f"{directory.absolute()}: made for (rows, shard rows) = {found}, the data set has {expected}; {again}"
        )
    return {**features.model_dump(), "hashes": hashes}


def _open_part(
    directory: Path,
    shard: int,
    bounds: tuple[int, int],
    wanted: tuple[int, int],
    manifest: dict[str, Any],
    on_bad_feature: str,
) -> _Part:
    """Map one part, verify all of it, and return the ids [wanted[0], wanted[1])."""
    path = part_path(directory, shard)
    again = "delete it and run python -m mocme_dist.extract again"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise DataError(f"{path.absolute()}: part {shard} is missing; run python -m mocme_dist.extract again")
    stats = read_part_record(directory, shard)
    for key, expected in (("encoder_hash", manifest["encoder_hash"]), ("input_sha256", manifest["hashes"][shard])):
        if stats.get(key) != expected:
            raise DataError(
                f"{path.absolute()}: {key} {str(stats.get(key))[:12]}, expected {str(expected)[:12]}; {again}"
            )
    size = path.stat().st_size
    if size != stats.get("bytes") or sha256_file(path) != stats.get("sha256"):
        raise DataError(
            f"{path.absolute()}: {size:,} bytes, expected {stats.get('bytes', 0):,} of another sha256; the part is "
            f"torn, {again}"
        )
    try:
        tensors = map_tensors(path)
        values = tensors["values"]
        mask = np.array(tensors["present"]).astype(bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path.absolute()}: not a safetensors file of values and present ({error}); {again}") from None
    if (
        mask.shape != (bounds[1] - bounds[0],)
        or values.shape != (mask.sum(), manifest["width"])
        or values.dtype not in _TORCH
    ):
        raise DataError(
            f"{path.absolute()}: values {values.shape} {values.dtype} and present {mask.shape}, expected "
            f"{bounds[1] - bounds[0]} rows of width {manifest['width']}; {again}"
        )
    if "bad_shard" in stats:
        log.warning(
            "%s: shard %d could not be read when features were made: its entities are absent", directory.name, shard
        )
    low = wanted[0] - bounds[0]
    high = wanted[1] - bounds[0]
    start = int(mask[:low].sum())
    stop = int(mask[:high].sum())
    present = _finite(values, mask, bounds[0], directory.name, path, on_bad_feature)
    return _Part(values[start:stop], mask[low:high], present[low:high])


def _finite(
    values: NDArray[Any], mask: NDArray[np.bool_], first_id: int, modality: str, path: Path, on_bad_feature: str
) -> NDArray[np.bool_]:
    """Return the mask of entities with finite values; others are an error, or absent with a warning."""
    step = max(1, _SCAN // max(1, values.shape[1]))
    bad = 0
    good = np.ones(len(values), dtype=bool)
    for start in range(0, len(values), step):
        wrong = ~np.isfinite(values[start : start + step])
        good[start : start + step] = ~wrong.any(axis=1)
        bad += int(wrong.sum())
    if not bad:
        return mask
    entities = first_id + np.flatnonzero(mask)[~good]
    found = (
        f"{path.name}: {bad} values of modality {modality} are not finite, the first at entity {entities[0]} "
        f"(key {entities[0]:012d})"
    )
    if on_bad_feature == "error":
        raise DataError(
            f"{found}; mend its raw file or the encoder, delete the part and run python -m mocme_dist.extract again, "
            "or let such entities be absent with --on-bad-feature=mask (features.on_bad)"
        )
    log.warning("%s: %d entities are absent in this modality", found, len(entities))
    present = mask.copy()
    present[np.flatnonzero(mask)] = good
    return present
