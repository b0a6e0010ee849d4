"""Files of a bundle. An export is built beside its target under a temporary name and renamed when it is complete.

    bundle.json     manifest, written last: sizes, settings, calibration, encoders, size and hash of each file
    vectors-00017.safetensors
                    fused vectors (n, D) of the entities [17 S, 18 S); the first D / 2 columns are the real parts
    modalities-00017.safetensors
                    weights (n, M) of the modalities, 0 where absent; with two modalities or more also views (M, n, D)
                    int8, the direction of each modality's own vector
    relations.safetensors
                    phases (R, D / 2) in radians
    dense.safetensors
                    projections, experts and fusion, which encode unseen entities
    structure_imputer.safetensors
                    matrix ((M - 1) (D + 1) + 1, D) that predicts the vector of an entity without structure; only if it
                    ranks better than the plain vector (structure_imputer.py)
    evidence-00017.safetensors
                    units (n, F) int16 of each dense space of evidence, named after it (evidence/units.py)
    evidence_means.safetensors
                    mean features (F,) of each space, which centre the features of unseen entities; if there are any
    blend.safetensors
                    weights of the model and of the evidence by relation and direction; if the run has a blend
    entities.parquet, relations.parquet
                    id, name
    entity_labels.parquet, relation_labels.parquet
                    label, aliases; if the data set has any (data/labels.py)
    known_{all,train,valid,test}_{keys,offsets,targets}.npy
                    known answers by query (data/known.py)
    card.md         what the bundle is, its data, licences, metrics with their protocol, limits

Exports of other formats (npz, parquet, word2vec, faiss) have the same manifest with their own kind.

At an fsspec URL the files are in a folder named after the manifest's hash, and the bundle.json beside that folder names
it. That file is replaced by one write after all others have been uploaded, so readers see either the earlier or the new
export.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mocme_dist.data.files import (
    TEMPORARY,
    clear,
    exchange,
    file_entry,
    held,
    read_json,
    sweep,
    sync,
    write_json,
)
from mocme_dist.data.known import ARRAYS
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError, DataError, LockedError, StorageError

log = logging.getLogger(__name__)

MANIFEST = "bundle.json"
CARD = "card.md"
KNOWN = ("all", "train", "valid", "test")
FORMAT = 2
_SOURCE = "source.json"
_GENERATION = re.compile(r"[0-9a-f]{16}")
_TRIES = 3
_ADVICE = "not a bundle: make one with mocme export RUN_DIR DIR"


def part_name(kind: str, part: int) -> str:
    """Return the file name of a part; kind is vectors, modalities or evidence."""
    return f"{kind}-{part:05d}.safetensors"


def part_files(num_parts: int) -> list[str]:
    """Return the files that a bundle of `num_parts` parts must have."""
    parts = [part_name(kind, part) for kind in ("vectors", "modalities") for part in range(num_parts)]
    rest = ["relations.safetensors", "entities.parquet", "relations.parquet", CARD]
    return [*parts, *rest, *(f"known_{name}_{array}.npy" for name in KNOWN for array in ARRAYS)]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a finished bundle, unchecked but for kind and format.

    Raises:
        DataError: the folder does not exist, is not a bundle, or has another kind or format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory.absolute()}: no {MANIFEST} in it; {_ADVICE}")
    manifest = read_json(path)
    found = (manifest.get("kind"), manifest.get("format")) if isinstance(manifest, dict) else (None, None)
    if found[0] != "bundle":
        raise DataError(f"{directory.absolute()}: holds an export of format {found[0]}, expected bundle; export again")
    if found[1] != FORMAT:
        raise DataError(f"{directory.absolute()}: a bundle of format {found[1]}, expected {FORMAT}; export again")
    return dict(manifest)


def check_target(target: Path, kind: str) -> None:
    """Refuse to overwrite anything but an export of the same kind.

    Raises:
        ConfigError: `target` is a file, another folder, or an export of another kind; nothing is changed.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(
            f"{target}: is a file or a link; give a folder that does not exist yet, or an earlier export to replace"
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    manifest = target / MANIFEST
    try:
        found = read_json(manifest)["kind"]
    except (DataError, KeyError, TypeError):
        raise ConfigError(f"{target}: not empty and not an export of mocme_dist; choose another folder") from None
    if found != kind:
        raise ConfigError(
            f"{target}: holds an export of format {found}, not {kind}; choose another folder or delete it"
        )


def folder_of(place: str | Path) -> Path:
    """Return the folder of an export on this machine; for a URL, its local copy after an update.

    Raises:
        DataError: there is no export.
        StorageError: the storage does not answer.
    """
    if not is_url(place):
        directory = Path(place)
        # An export may have been killed while it replaced another on a file system that cannot swap folders; see
        # `_put`.
        return _replaced(directory) if not directory.exists() and _replaced(directory).is_dir() else directory
    mirror = RemoteStorage(str(place))
    for _ in range(_TRIES):
        generation = _generation(mirror)
        if generation is None:
            mirror.pull()
            return mirror.path
        with suppress(StorageError):  # if it has been replaced meanwhile, it may have been removed as well
            mirror.pull(f"{generation}/*")
        if generation == _generation(mirror):
            mirror.pull(f"{generation}/*")
            _forget_others(mirror.path, generation)
            return mirror.path / generation
    raise StorageError(f"{mirror.url}: the export was replaced several times while it was fetched; try again")


def _forget_others(copy: Path, generation: str) -> None:
    """Remove the copies of earlier exports; processes that have mapped them keep them."""
    for folder in copy.iterdir():
        if folder.name != generation and _GENERATION.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _generation(mirror: RemoteStorage) -> str | None:
    """Return the folder of the current export at a URL, or None if an older version put files beside bundle.json."""
    content = mirror.get(MANIFEST)
    if content is None:
        raise DataError(f"{mirror.url}: no {MANIFEST} in it; {_ADVICE}")
    try:
        found = json.loads(content).get("generation")
    except (ValueError, AttributeError):
        raise DataError(f"{mirror.url}/{MANIFEST}: not a JSON object; export again") from None
    if found is not None and not (isinstance(found, str) and _GENERATION.fullmatch(found)):
        raise DataError(f"{mirror.url}/{MANIFEST}: generation {found!r} is not the name of a folder; export again")
    return found


def check_remote_target(mirror: RemoteStorage, kind: str) -> None:
    """Refuse to overwrite anything at a URL but an export of the same kind; see `check_target`."""
    content = mirror.get(MANIFEST)
    if content is None:
        # A first export that was killed leaves one folder, named after a hash.
        if any(not _GENERATION.fullmatch(name.split("/")[0]) for name in mirror.list()):
            raise ConfigError(f"{mirror.url}: holds files that are no export; choose another place")
        return
    try:
        found = json.loads(content)["kind"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{mirror.url}: holds a {MANIFEST} that is no export's; choose another place") from None
    if found != kind:
        raise ConfigError(f"{mirror.url}: holds an export of format {found}, not {kind}; choose another place")


def publish(folder: Path, mirror: RemoteStorage) -> None:
    """Send a finished export to a URL, in place of the one there; files that a killed attempt has sent do not go again.

    Raises:
        StorageError: the storage does not take it; the earlier export still counts.
    """
    mirror.sweep()
    content = (folder / MANIFEST).read_bytes()
    generation = hashlib.sha256(content).hexdigest()[:16]
    there = mirror.list(f"{generation}/*")
    for path in sorted(folder.iterdir()):
        name = f"{generation}/{path.name}"
        if there.get(name, "-1").split()[0] != str(path.stat().st_size):
            mirror.put(name, path)
    pointer = {**json.loads(content), "generation": generation}
    mirror.put(MANIFEST, (json.dumps(pointer, indent=1, ensure_ascii=False) + "\n").encode())
    for name in mirror.list():
        if name != MANIFEST and not name.startswith(f"{generation}/"):
            mirror.remove(name)


@contextmanager
def staging(target: Path, kind: str, source: dict[str, Any]) -> Iterator[Path]:
    """Build in a folder beside `target`; on a clean exit it replaces the target.

    Files that a killed export of the same `source` completed are kept; those of another source and incomplete files are
    removed.

    Raises:
        ConfigError: see `check_target`.
        LockedError: another export to this target is running.
        StorageError: the folder cannot be made or moved.
    """
    check_target(target, kind)
    folder = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The lock is beside the folder, because the folder is renamed while the lock is held.
        with held(target.with_name(f"{TEMPORARY}{target.name}.lock")):
            folder.mkdir(exist_ok=True)
            _clear_other(folder, source)
            yield folder
            (folder / _SOURCE).unlink(missing_ok=True)
            sync(folder)
            _put(folder, target)
    except BlockingIOError:
        raise LockedError(f"{target}: another export to it is running; wait for it or choose another folder") from None
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written: {error.strerror or error}; choose a writable folder with room"
        ) from None


def _clear_other(folder: Path, source: dict[str, Any]) -> None:
    """Keep complete files that were built from the same source, and remove the rest."""
    wanted = json.loads(json.dumps(source))
    try:
        same = read_json(folder / _SOURCE) == wanted
    except DataError:
        same = False
    if same:
        log.info("continuing the export that was interrupted")
        sweep(folder)
        return
    clear(folder)
    write_json(folder / _SOURCE, wanted)


def _put(folder: Path, target: Path) -> None:
    """Replace `target` by the finished `folder`; a kill at any moment leaves the old export or the new one."""
    old = _replaced(target)
    if not target.exists():
        folder.rename(target)
    elif not exchange(folder, target):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        # A kill at this point leaves no `target`; readers find the old one, see `folder_of`.
        folder.rename(target)
    sync(target.parent)
    shutil.rmtree(folder, ignore_errors=True)  # the earlier export
    shutil.rmtree(old, ignore_errors=True)


def _replaced(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}.old")


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file of an export, by name."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in (MANIFEST, _SOURCE) and not path.name.startswith(TEMPORARY)
    )
    return {name: file_entry(folder / name) for name in names}
