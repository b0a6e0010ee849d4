"""The output folder of a packing.

Hash of its source, whether the folder may be used, and cleaning up after a failure.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mocme_dist.data.dataset import MANIFEST, SPLITS
from mocme_dist.data.files import clear, read_json, sha256_file, sweep, verify_once
from mocme_dist.data.labels import RELATIONS_TABLE
from mocme_dist.data.modalities import TABLES
from mocme_dist.data.shards import SUFFIXES
from mocme_dist.data.tsv import MediaFolder, Table, find_file
from mocme_dist.data.vectors import FOLDER, find_vectors
from mocme_dist.errors import ConfigError, LockedError

# Its presence means that a packing began here and has not ended, so everything next to it may be removed.
_WORK = ".tmp-pack"
_LOCK = "lock"


def source_hash(raw: Path) -> str:
    """Return the SHA-256 over names and contents of the tables, and names and sizes of the files they list."""
    digest = hashlib.sha256()
    tables = [name for name, _ in TABLES.values()]
    for name in [*(f"{split}.txt" for split in SPLITS), "entity2id.txt", RELATIONS_TABLE, *tables]:
        file = find_file(raw, name)
        if file is not None:
            digest.update(f"{file.label}\t{sha256_file(file.path)}\n".encode())
    for modality in TABLES:
        vectors = find_vectors(raw, modality)
        ids = find_file(raw / FOLDER, f"{modality}.ids")
        for path in [path for path in (vectors, ids.path if vectors and ids else None) if path is not None]:
            digest.update(f"{FOLDER}/{path.name}\t{sha256_file(path)}\n".encode())
    for _, size in _media(raw):
        digest.update(b"%d\n" % size)
    return digest.hexdigest()


def media_hash(raw: Path) -> str:
    """Return the SHA-256 over names and contents of the image, audio and video files in the tables.

    Reads all of them.
    """
    digest = hashlib.sha256()
    for name, size in _media(raw):
        digest.update(f"{name}\t{sha256_file(raw / name) if size >= 0 else ''}\n".encode())
    return digest.hexdigest()


def _media(raw: Path) -> Iterator[tuple[str, int]]:
    """Yield name and size of every file in the tables.

    -1 if it is missing or forbidden, which packing reports later.
    """
    media = MediaFolder(raw)
    for modality in SUFFIXES:
        table = find_file(raw, TABLES[modality][0])
        for _, fields in Table(table, ("entity", "file")).rows() if table is not None else ():
            name = fields[1].decode("utf-8", "replace").strip()
            size = -1
            with suppress(ValueError):
                name, size = media.find(name)
            yield name, size


def is_packed(raw: Path, out: Path, source: dict[str, Any]) -> bool:
    """Return whether `out` is a finished data set of `raw` and this source; one of another source is an error."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_json(out / MANIFEST)
    found = manifest.get("source") if isinstance(manifest, dict) else None
    advice = "choose another folder or delete this one"
    if not isinstance(found, dict):
        raise ConfigError(f"{out.absolute()}: holds a {MANIFEST} that is not a packed data set's; {advice}")
    settings = {"twins": "report", **found.get("settings", {})}  # earlier versions knew no twins
    changed = [
        f"data.{name}={settings.get(name)} there, {value} now"
        for name, value in source["settings"].items()
        if settings.get(name) != value
    ]
    if found.get("sha256") != source["sha256"]:
        changed.insert(0, "other raw files")
    if changed:
        raise ConfigError(f"{out.absolute()}: a data set was packed here before with {'; '.join(changed)}; {advice}")
    content = found.get("media")

    def check() -> None:
        if media_hash(raw) != content:
            raise ConfigError(
                f"{out.absolute()}: a data set was packed here before with other raw files: an image, audio or video "
                f"file has another content, though not another size; {advice}"
            )

    if content is not None:  # data sets of earlier versions lack it
        verify_once(raw, {name for name, size in _media(raw) if size >= 0}, check, token=content)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    sweep(out)
    return True


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """Yield a locked temporary folder inside `out`; a failure removes it and everything packed so far."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out.absolute()}: is a file; expected a folder to pack into")
    work = out / _WORK
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"{out.absolute()}: holds files that are not a data set's; choose another folder or an empty one"
        )
    created = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{out.absolute()}: another process is packing into this folder; wait for it or choose another"
            ) from None
        try:
            _remove_packed(out)
            clear(work, keep=(_LOCK,))  # rows spilled by a killed packing would be read as ours
            yield work
        except BaseException:
            _remove_packed(out)
            shutil.rmtree(work, ignore_errors=True)
            if created:
                with suppress(OSError):
                    out.rmdir()
            raise
        shutil.rmtree(work)


def _remove_packed(out: Path) -> None:
    (out / MANIFEST).unlink(missing_ok=True)  # first: without it the rest is not a data set
    for folder in ("graph", "shards"):
        shutil.rmtree(out / folder, ignore_errors=True)
    sweep(out)
