"""Files that are whole or absent: written under a temporary name, synced, then renamed.

Every file of a data set, a feature part, a checkpoint or a status is written through here, so a killed process
never leaves half a file under a final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mocme_dist.errors import DataError, StorageError

TEMPORARY = ".tmp-"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on a clean exit it is synced and becomes `path` in one rename.

    Raises:
        StorageError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path.absolute()}: cannot be written: {error.strerror or error}{_room(path.parent)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        return ""


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; the same value gives the same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf8"))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: file not found") from None
    except ValueError as error:
        raise DataError(f"{path.absolute()}: not JSON: {error}") from None


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
