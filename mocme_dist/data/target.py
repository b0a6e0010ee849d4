"""Where a packing goes: what its source is, whether the folder may be used, and what is left when it fails."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mocme_dist.data.dataset import MANIFEST, SPLITS
from mocme_dist.data.files import read_json, sha256_file
from mocme_dist.data.layouts import MediaFolder, Table, find_file
from mocme_dist.data.modalities import TABLES
from mocme_dist.data.shards import SUFFIXES
from mocme_dist.data.vectors import FOLDER, find_vectors
from mocme_dist.errors import ConfigError, LockedError

# Its presence says that a packing began here and has not ended: what lies beside it is ours to remove.
_WORK = ".tmp-pack"


def source_hash(raw: Path) -> str:
    """SHA-256 over the tables' names and contents, and the names and sizes of the files they name."""
    digest = hashlib.sha256()
    tables = [name for name, _ in TABLES.values()]
    for name in [*(f"{split}.txt" for split in SPLITS), "entity2id.txt", *tables]:
        file = find_file(raw, name)
        if file is not None:
            digest.update(f"{file.label}\t{sha256_file(file.path)}\n".encode())
    for modality in TABLES:
        vectors, ids = find_vectors(raw, modality), find_file(raw / FOLDER, f"{modality}.ids")
        for path in [path for path in (vectors, ids.path if vectors and ids else None) if path is not None]:
            digest.update(f"{FOLDER}/{path.name}\t{sha256_file(path)}\n".encode())
    media = MediaFolder(raw)
    for modality in SUFFIXES:
        table = find_file(raw, TABLES[modality][0])
        for _, fields in Table(table, ("entity", "file")).rows() if table is not None else ():
            size = -1
            # What is missing or forbidden is reported by the pass that packs it.
            with suppress(ValueError):
                size = media.size(fields[1].decode("utf-8").strip())
            digest.update(b"%d\n" % size)
    return digest.hexdigest()


def is_packed(out: Path, source: dict[str, Any]) -> bool:
    """Whether `out` is a finished data set of this source; one of another source is an error."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_json(out / MANIFEST)
    found = manifest.get("source") if isinstance(manifest, dict) else None
    advice = "choose another folder or delete this one"
    if not isinstance(found, dict):
        raise ConfigError(f"{out.absolute()}: holds a {MANIFEST} that is not a packed data set's; {advice}")
    settings = found.get("settings", {})
    changed = [
        f"data.{name}={settings.get(name)} there, {value} now" for name, value in source["settings"].items() if settings.get(name) != value
    ]
    if found.get("sha256") != source["sha256"]:
        changed.insert(0, "other raw files")
    if changed:
        raise ConfigError(f"{out.absolute()}: a data set was packed here before with {'; '.join(changed)}; {advice}")
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return True


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`, locked; a failure removes it and whatever was packed."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out.absolute()}: is a file; expected a folder to pack into")
    work = out / _WORK
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out.absolute()}: holds files that are not a data set's; choose another folder or an empty one")
    created = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{out.absolute()}: another process is packing into this folder; wait for it or choose another") from None
        try:
            _remove_packed(out)
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
    for folder in ("graph", "shards"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)
