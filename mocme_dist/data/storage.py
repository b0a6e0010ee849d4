"""Folders of files: what all of them offer, and those of this machine.

`Storage` is what both kinds offer: list, get, put, put_if_absent, remove, and `fetch` for a file that never changes
under its name. Folders behind fsspec are in `remote_storage.py`, with `open_storage` for either kind.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mocme_dist.data.files import (
    TEMPORARY,
    atomic_path,
    sync,
    temporary_file,
    write_bytes,
)
from mocme_dist.errors import StorageError

log = logging.getLogger(__name__)

_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_url(place: str | Path) -> bool:
    """Return whether `place` names a folder behind fsspec and not a path of this machine."""
    return bool(_URL.match(str(place)))


class Storage(Protocol):
    """Files of one folder. Names are relative to it, with slashes.

    Attributes:
        place: path or URL for messages.
        path: the folder on this machine: the folder itself, or the copy of a remote one.
        is_remote: whether other machines may lack the files below `path`.
    """

    place: str
    path: Path
    is_remote: bool

    def list(self, *patterns: str) -> dict[str, str]:
        """Return a version string, "SIZE TOKEN", per file that matches any of `patterns` (all files
        without patterns).
        """

    def get(self, name: str) -> bytes | None:
        """Return the current content of a small file; None if it does not exist."""

    def fetch(self, name: str, size: int) -> Path:
        """Return the local path of a file that never changes under its name, after fetching it if necessary."""

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file, replacing an existing one; readers see the whole content or none. A local file may be moved."""

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Create a small file; return False and write nothing if the name exists."""

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all its files, if it exists."""


def size_of(version: str | None) -> int:
    """Return the size in bytes from a version string of `Storage.list`; -1 for None."""
    return -1 if version is None else int(version.split()[0])


class LocalStorage:
    """A folder of this machine, or of a file system that all machines of a run share."""

    is_remote = False

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).absolute()
        self.place = str(self.path)

    def list(self, *patterns: str) -> dict[str, str]:
        """See `Storage`."""
        found = {}
        for start, is_file in dict.fromkeys(map(start_of, patterns or ("*",))):
            for full, info in (stat_file(self.path / start) if is_file else walk_files(str(self.path / start))).items():
                name = Path(full).relative_to(self.path).as_posix()
                if not is_temporary(name) and matches(name, patterns):
                    found[name] = f"{info['size']} {info['mtime']}"
        return dict(sorted(found.items()))

    def get(self, name: str) -> bytes | None:
        """See `Storage`."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def fetch(self, name: str, size: int) -> Path:
        """See `Storage`.

        Raises:
            StorageError: the file does not exist.
        """
        path = self.path / name
        if not path.is_file():
            raise StorageError(f"{path}: file not found")
        return path

    def put(self, name: str, content: bytes | Path) -> None:
        """See `Storage`; a file of the same file system is moved.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.path / name
        if isinstance(content, bytes):
            write_bytes(target, content)
            return
        try:
            is_new = not target.parent.is_dir()
            target.parent.mkdir(parents=True, exist_ok=True)
            content.replace(target)
            sync(target.parent)
            if is_new:
                sync(target.parent.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
            with atomic_path(target) as temporary:
                shutil.copyfile(content, temporary)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """See `Storage`.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return link_new(target, content)
        except OSError as error:
            raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """See `Storage`.

        A folder is renamed first, so that a kill leaves a temporary folder and not half of this one.
        """
        path = self.path / name
        doomed = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
        with suppress(FileNotFoundError):
            path.rename(doomed)
            if doomed.is_dir():
                shutil.rmtree(doomed, ignore_errors=True)
            else:
                doomed.unlink()


def start_of(pattern: str) -> tuple[str, bool]:
    """Return the folder below which a pattern can match, or a plain name itself and True."""
    plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return (pattern, True) if plain == pattern else (plain.rpartition("/")[0], False)


def is_temporary(name: str) -> bool:
    """Return whether a file is being written, or was left by a killed writer."""
    return any(part.startswith(TEMPORARY) for part in name.split("/"))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns, or there are none."""
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def link_new(target: Path, content: bytes) -> bool:
    """Create a file with its content in one atomic step; return False if it exists."""
    with temporary_file(target) as aside:
        aside.write_bytes(content)
        sync(aside)
        try:
            os.link(aside, target)
        except FileExistsError:
            return False
    return True


def stat_file(path: Path) -> dict[str, Any]:
    """Return size and time of a file by its path; nothing if it does not exist."""
    if not path.is_file():
        return {}
    status = path.stat()
    return {str(path): {"size": status.st_size, "mtime": status.st_mtime}}


def walk_files(place: str) -> dict[str, Any]:
    """Return files below a folder. fsspec's own `find` shows a folder as empty if a file disappears while it looks."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for folder, _, names in os.walk(place, onerror=failed):
        for name in names:
            with suppress(FileNotFoundError):
                status = (Path(folder) / name).stat()
                found[f"{folder}/{name}"] = {"size": status.st_size, "mtime": status.st_mtime}
    return found
