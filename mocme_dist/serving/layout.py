"""What a bundle is on disk, and how one comes to be: built beside its place under a temporary name, then renamed.

    bundle.json                    the manifest, written last: sizes, settings, calibration, encoders, every file's size and hash
    vectors-00017.safetensors      vectors (n, D) of the entities [17 S, 18 S), first D / 2 columns real parts; fused
    modalities-00017.safetensors   weights (n, M) of each entity's modalities, 0 where absent; views (M, n, D) int8, the
                                   direction of what each modality alone says, there with two modalities or more
    relations.safetensors          phases (R, D / 2) in radians
    dense.safetensors              projections, experts, fusion: what encodes an entity that was never seen
    newcomers.safetensors          matrix ((M - 1) (D + 1) + 1, D): where such an entity belongs, if newcomer_map found it to help
    entities.parquet, relations.parquet             id, name
    known_all_{keys,offsets,targets}.npy            every fact of the graph, by query (data/known.py)

A folder of another format (npz, parquet, word2vec) has the same manifest with its own kind.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist.data.files import TEMPORARY, read_json, sha256_file, sync, write_json
from mocme_dist.errors import ConfigError, DataError, LockedError, StorageError

log = logging.getLogger(__name__)

MANIFEST = "bundle.json"
FORMAT = 1
_SOURCE = "source.json"
_LOCK = "lock"


def part_name(kind: str, part: int) -> str:
    """File of a part; kind is vectors or modalities."""
    return f"{kind}-{part:05d}.safetensors"


def read_manifest(directory: Path, kind: str = "bundle") -> dict[str, Any]:
    """The manifest of a finished bundle, its files there in their sizes.

    Raises:
        DataError: the folder is not there, is no bundle, is of another kind or format, or lacks a file.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory.absolute()}: no {MANIFEST} in it; not a bundle: make one with python -m mocme_dist.export RUN_DIR DIR")
    manifest = read_json(path)
    try:
        if manifest["kind"] != kind:
            raise DataError(f"{directory.absolute()}: holds an export of format {manifest['kind']}, expected {kind}; export again")
        if manifest["format"] != FORMAT:
            raise DataError(f"{directory.absolute()}: a bundle of format {manifest['format']}, expected {FORMAT}; export again")
        for name, entry in manifest["files"].items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else None
            if size != entry["bytes"]:
                found = "not found" if size is None else f"{size:,} bytes, the manifest says {entry['bytes']:,}"
                raise DataError(f"{(directory / name).absolute()}: {found}; export again")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path.absolute()}: damaged, it lacks {error}; export again") from None
    return dict(manifest)


def check_target(target: Path, kind: str) -> None:
    """Refuse to write where something else stands.

    Raises:
        ConfigError: a file, a folder that is no export, or an export of another kind; nothing is touched.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target}: is a file or a link; give a folder that does not exist yet, or an earlier export to replace")
    if not target.is_dir() or not any(target.iterdir()):
        return
    manifest = target / MANIFEST
    try:
        found = read_json(manifest)["kind"]
    except (DataError, KeyError, TypeError):
        raise ConfigError(f"{target}: not empty and not an export of mocme_dist; choose another folder") from None
    if found != kind:
        raise ConfigError(f"{target}: holds an export of format {found}, not {kind}; choose another folder or delete it")


@contextmanager
def staging(target: Path, kind: str, source: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `target` to build in; on a clean exit it takes the target's place, replacing an earlier export.

    What a killed export of the same `source` left there is still there, so that finished parts can be kept; that of
    another source is cleared.

    Raises:
        ConfigError: see `check_target`.
        LockedError: another export to this target is running.
        StorageError: the folder cannot be made or moved.
    """
    check_target(target, kind)
    folder = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(f"{target}: another export to it is running; wait for it or choose another folder") from None
            _clear_other(folder, source)
            yield folder
            for name in (_SOURCE, _LOCK):
                (folder / name).unlink(missing_ok=True)
            sync(folder)
            _put(folder, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}; choose a writable folder with room") from None


def _clear_other(folder: Path, source: dict[str, Any]) -> None:
    """Keep what was built from the same source; clear the rest."""
    wanted = json.loads(json.dumps(source))
    try:
        same = read_json(folder / _SOURCE) == wanted
    except DataError:
        same = False
    if same:
        log.info("going on with the export that was left unfinished")
        return
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()
    write_json(folder / _SOURCE, wanted)


def _put(folder: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{target.name}")
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(target)
    sync(target.parent)


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file that belongs to an export, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, _SOURCE, _LOCK) and path.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
