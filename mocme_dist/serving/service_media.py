"""Pictures, sounds, films, texts and numbers of entities, read from the shards of a packed data set.

A shard's members are found by walking its headers once, when it is first asked for; nothing is unpacked. Clients name
an entity, a modality and a number, never a file.
"""

from __future__ import annotations

import json
import logging
import math
import tarfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle import Bundle

log = logging.getLogger(__name__)

TYPES = {
    "png": "image/png",
    "apng": "image/apng",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "oga": "audio/ogg",
    "opus": "audio/ogg",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "m4v": "video/mp4",
    "mov": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/webm",
}
MAP_POINTS = 20_000
_CACHED_SHARDS = 64
_CACHED_THUMBNAILS = 2_000
_LATITUDES = ("latitude", "lat", "latitude_degrees")
_LONGITUDES = ("longitude", "lon", "lng", "long", "longitude_degrees")


class Place(NamedTuple):
    """Where a member lies in its shard: its name ("image.0.png"), its first byte and its size."""

    name: str
    offset: int
    size: int


class Media:
    """The members of the entities of a bundle in the data set that it was trained on.

    Args:
        dataset: an open data set.
        max_member_bytes, max_pixels: larger files are not served; the limits of extraction.
    """

    def __init__(self, dataset: Dataset, max_member_bytes: int, max_pixels: int) -> None:
        self.dataset, self.max_member_bytes, self.max_pixels = dataset, max_member_bytes, max_pixels
        self._shards: OrderedDict[int, dict[int, list[Place]]] = OrderedDict()
        self._thumbnails: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._points: list[tuple[int, float, float]] | None = None
        self._lock = Lock()

    @classmethod
    def of(cls, bundle: Bundle, dataset: Dataset) -> Media:
        """Return the members for a bundle.

        Raises:
            DataError: the bundle was trained on another data set, whose ids differ.
        """
        trained = bundle.manifest.get("trained", {}).get("dataset")
        if trained != dataset.fingerprint:
            raise DataError(
                f"--data {dataset.place}: has fingerprint {dataset.fingerprint[:12]}, the bundle was trained on "
                f"{str(trained)[:12]}; give the data set of its run (RUN_DIR/dataset)"
            )
        limits = Config.model_validate(bundle.manifest["config"]).encoders
        return cls(dataset, limits.max_member_mb << 20, limits.max_pixels)

    def places(self, entity: int) -> list[Place]:
        """Return the members of an entity, in the order of their modalities and numbers."""
        shard = entity // self.dataset.shards.shard_rows
        with self._lock:
            index = self._shards.get(shard)
            if index is None:
                index = _index(self.dataset.shard_path(shard))
                self._shards[shard] = index
                while len(self._shards) > _CACHED_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
        return index.get(entity, [])

    def files(self, entity: int) -> list[dict[str, Any]]:
        """Return the pictures, sounds and films of an entity: modality, number, type and size in bytes."""
        found = []
        for place in self.places(entity):
            modality, _, rest = place.name.partition(".")
            number, _, suffix = rest.partition(".")
            if suffix in TYPES and place.size <= self.max_member_bytes:
                kind = _type(modality, suffix)
                found.append({"modality": modality, "number": int(number), "type": kind, "bytes": place.size})
        return found

    def find(self, entity: int, modality: str, number: int) -> tuple[Place, str] | None:
        """Return where a file lies and its type; None where the entity has no such file, or it is too large."""
        for place in self.places(entity):
            if place.name.startswith(f"{modality}.{number}.") and place.size <= self.max_member_bytes:
                return place, _type(modality, place.name.rpartition(".")[2])
        return None

    def read(self, entity: int, place: Place, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes [start, stop) of a member."""
        path = self.dataset.shard_path(entity // self.dataset.shards.shard_rows)
        stop = place.size if stop is None else min(stop, place.size)
        with path.open("rb") as file:
            file.seek(place.offset + start)
            return file.read(max(0, stop - start))

    def thumbnail(self, entity: int, number: int, side: int) -> bytes | None:
        """Return a picture as PNG that fits into side x side pixels; None where there is none that can be decoded."""
        key = (entity, number, side)
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        found = self.find(entity, "image", number)
        if found is None:
            return None
        from mocme_dist.encoders.encoder import BadFile
        from mocme_dist.encoders.image_files import thumbnail

        try:
            content = thumbnail(self.read(entity, found[0]), side, self.max_pixels)
        except BadFile as error:
            log.info("entity %d, image %d: %s", entity, number, error)
            return None
        with self._lock:
            self._thumbnails[key] = content
            while len(self._thumbnails) > _CACHED_THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return content

    def texts(self, entity: int) -> dict[str, str]:
        """Return the text columns of an entity."""
        return {name: value for name, value in self._json(entity, "text.json").items() if isinstance(value, str)}

    def numbers(self, entity: int) -> dict[str, float]:
        """Return the numbers of an entity; attributes with several values have their mean."""
        return _numbers(self._json(entity, "numeric.json"))

    def _json(self, entity: int, name: str) -> dict[str, Any]:
        for place in self.places(entity):
            if place.name == name and place.size <= self.max_member_bytes:
                return _object(self.read(entity, place))
        return {}

    def points(self) -> list[tuple[int, float, float]]:
        """Return (entity, latitude, longitude) of the first entities that have coordinates, at most 20,000."""
        if self._points is None:
            self._points = self._read_points() if "numeric" in self.dataset.modalities else []
        return self._points

    def _read_points(self) -> list[tuple[int, float, float]]:
        found: list[tuple[int, float, float]] = []
        for shard in range(self.dataset.shards.num_shards):
            for member in self.dataset.read_members(shard, self.max_member_bytes, "numeric"):
                numbers = _numbers(_object(member.content or b"{}"))
                point = coordinates(numbers)
                if point is not None:
                    found.append((member.id, *point))
                if len(found) == MAP_POINTS:
                    return found
        return found


def has_coordinates(names: Iterable[str]) -> bool:
    """Return whether attributes of these names hold latitude and longitude."""
    own = {name.casefold() for name in names}
    return bool(own & set(_LATITUDES)) and bool(own & set(_LONGITUDES))


def coordinates(numbers: dict[str, float]) -> tuple[float, float] | None:
    """Return latitude and longitude in degrees out of an entity's numbers, or None."""
    own = {name.casefold(): value for name, value in numbers.items()}
    latitude = next((own[name] for name in _LATITUDES if name in own), None)
    longitude = next((own[name] for name in _LONGITUDES if name in own), None)
    if latitude is None or longitude is None or not (abs(latitude) <= 90 and abs(longitude) <= 180):
        return None
    return latitude, longitude


def open_media(bundles: dict[str, Bundle], place: str) -> dict[str, Media]:
    """Return the members for each bundle that was trained on the data set at `place`.

    Raises:
        DataError: there is no data set, or none of the bundles was trained on it.
    """
    dataset = Dataset.open(place)
    found: dict[str, Media] = {}
    for name, bundle in bundles.items():
        try:
            found[name] = Media.of(bundle, dataset)
        except DataError as error:
            if len(bundles) == 1:
                raise
            log.warning("bundle %s: %s", name, error)
    if not found:
        raise ConfigError(
            f"--data {place}: none of the bundles was trained on it; give the data set of one of their runs"
        )
    return found


def _index(path: Path) -> dict[int, list[Place]]:
    """Return the members of a shard by entity; only headers are read."""
    found: dict[int, list[Place]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, _, name = info.name.partition(".")
                if info.isreg() and key.isdecimal():
                    found.setdefault(int(key), []).append(Place(name, info.offset_data, info.size))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path.absolute()}: cannot be read ({error}); restore it or pack it again") from None
    for places in found.values():
        places.sort(key=_order)
    return found


def _order(place: Place) -> tuple[str, int]:
    modality, number, *_ = place.name.split(".")
    return modality, int(number) if number.isdecimal() else -1


def _type(modality: str, suffix: str) -> str:
    """Return the media type of a file; sounds in a container for both are audio."""
    kind = TYPES[suffix]
    return "video/ogg" if modality == "video" and kind == "audio/ogg" else kind


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _numbers(value: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, own in value.items():
        several = own if isinstance(own, list) else [own]
        floats = [float(one) for one in several if isinstance(one, int | float) and math.isfinite(one)]
        if floats:
            found[name] = sum(floats) / len(floats)
    return found
