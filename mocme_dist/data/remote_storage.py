"""Folders behind fsspec (s3://, gs://, abfs://, file://, memory://, ...), each with a copy on this machine.

Computation works on local files, because arrays are memory-mapped, tar files are streamed and renames are atomic.
A remote folder therefore has a copy on this machine: `pull` brings files that are new or have changed, `push` sends
such files in the order given, each as a whole, so that the file that says "done" can go last. There is one copy per URL
and machine, and it is locked while files are pulled.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mocme_dist.data.files import (
    TEMPORARY,
    atomic_path,
    read_json,
    sweep,
    sync,
    temporary_file,
    write_json,
)
from mocme_dist.data.storage import LocalStorage, is_temporary, is_url, link_new, matches, start_of, walk_files
from mocme_dist.environment import cache_folder
from mocme_dist.errors import ConfigError, DataError, MocmeError, StorageError

# File systems on which a half-written file is visible; in object stores an object appears as a whole.
log = logging.getLogger(__name__)

# How long to wait for another process of this machine that fetches files of the same storage (seconds).
LOCK_S = 3600.0
_RENAMES = {"file", "local"}
# Up to this many files of one push are looked up one by one.
_FEW = 8
# Fields of fsspec's file information that tell versions of a file apart, the most reliable first.
_VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "created")


class RemoteStorage:
    """A folder behind fsspec, and its copy on this machine.

    Attributes:
        url: the URL without a slash at the end.
        path: the copy, in $MOCME_CACHE/mirror or ~/.cache/mocme_dist/mirror.

    Raises:
        ConfigError: no fsspec package serves this kind of URL.
    """

    is_remote = True

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = self.place = url.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{self.url}: {error}; install the fsspec package for it (s3:// needs s3fs, gs:// gcsfs)"
            ) from None
        self.root = self.root.rstrip("/")
        name = f"{hashlib.sha256(self.url.encode()).hexdigest()[:16]}-{self.url.rsplit('/', 1)[-1]}"
        self.path = cache_folder() / "mirror" / name / "files"
        self._state_path = self.path.with_name("state")

    def list(self, *patterns: str) -> dict[str, str]:
        """See `Storage`.

        Raises:
            DataError: a name would lie outside the folder. StorageError: the storage does not answer.
        """
        with self._as_storage_error("listed"):
            self.files.invalidate_cache()
            found: dict[str, Any] = {}
            for place, whole in dict.fromkeys(map(start_of, patterns or ("*",))):
                found |= self._found(f"{self.root}/{place}".rstrip("/"), whole)
        names: dict[str, str] = {}
        for full, info in sorted(found.items()):
            if str(full).endswith("/"):
                continue  # consoles of stores create empty objects to show a folder
            name = str(full).removeprefix(self.root).lstrip("/")
            if is_temporary(name):
                continue
            if any(part in ("", ".", "..") for part in PurePosixPath(name).parts) or "\\" in name:
                raise DataError(f"{self.url}: holds {full!r}, which is no name inside it")
            if matches(name, patterns):
                # Stores differ in what they report: a hash, a time, or both.
                token = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
                names[name] = f"{info['size']} {token}"
        return names

    def _found(self, place: str, whole: bool) -> dict[str, Any]:
        """Return the information of one file, or of all files below a folder; empty if it does not exist."""
        try:
            if whole:
                return {place: self.files.info(place)}
            return walk_files(place) if self._renames else self.files.find(place, detail=True)
        except FileNotFoundError:
            return {}

    def pull(self, *patterns: str) -> Sequence[str]:
        """Fetch remote files that are new or have changed; return their names.

        Raises:
            DataError, StorageError: see `list`; also if this disk cannot be written.
        """
        fetched = []
        with self._locked():
            known = self._state()
            for name, version in self.list(*patterns).items():
                local = self.path / name
                if known.get(name) == version and local.is_file():
                    continue
                with atomic_path(local) as temporary, self._as_storage_error(f"read: {name}"):
                    self.files.get_file(f"{self.root}/{name}", str(temporary))
                self._remember(name, version)
                fetched.append(name)
        return fetched

    def fetch(self, name: str, size: int) -> Path:
        """See `Storage`; a local copy of another size is fetched again.

        Raises:
            StorageError: the file does not exist, or the storage does not answer.
        """
        local = self.path / name
        with self._locked(f"lock-{hashlib.sha256(name.encode()).hexdigest()[:2]}"):
            if not local.is_file() or local.stat().st_size != size:
                with atomic_path(local) as temporary, self._as_storage_error(f"read: {name}"):
                    self.files.get_file(f"{self.root}/{name}", str(temporary))
        return local

    def get(self, name: str) -> bytes | None:
        """See `Storage`.

        Raises:
            StorageError: the storage does not answer.
        """
        with self._as_storage_error(f"read: {name}"):
            self.files.invalidate_cache()
            try:
                return bytes(self.files.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes | Path) -> None:
        """See `Storage`.

        Raises:
            StorageError: the storage does not take it.
        """
        target = f"{self.root}/{name}"
        with self._as_storage_error(f"written: {name}"):
            self.files.invalidate_cache()
            if not self._renames:
                self._send(content, target)
                return
            self.files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            with temporary_file(Path(target)) as aside:
                self._send(content, str(aside))
                sync(aside)
                aside.replace(target)

    def _send(self, content: bytes | Path, target: str) -> None:
        if isinstance(content, bytes):
            self.files.pipe_file(target, content)
        else:
            self.files.put_file(str(content), target)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """See `Storage`. S3, GCS, Azure and disks decide this atomically; a caller reads back for stores that do not.

        Raises:
            StorageError: the storage does not take it.
        """
        target = f"{self.root}/{name}"
        with self._as_storage_error(f"written: {name}"):
            self.files.invalidate_cache()
            if self._renames:
                self.files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                return link_new(Path(target), content)
            try:
                try:
                    self.files.pipe_file(target, content, mode="create")
                except TypeError:  # this fsspec package has no exclusive creation: the next best
                    if self.files.exists(target):
                        return False
                    self.files.pipe_file(target, content)
            except Exception:
                # Stores report an existing object in different ways; reading it back tells.
                if self.get(name) is None:
                    raise
                return False
        return True

    @property
    def _renames(self) -> bool:
        return bool(set(_protocols(self.files)) & _RENAMES)

    def sweep(self) -> None:
        """Remove half-written files of killed writers from the copy, and from the remote folder if it is on a disk."""
        for root in (self.path, *([Path(self.root)] if self._renames else [])):
            for folder, _, _ in os.walk(root):
                sweep(Path(folder))

    def push(self, names: Iterable[str]) -> None:
        """Send local files in this order, each as a whole.

        Raises:
            StorageError: the storage does not take a file; those before it have arrived.
        """
        sent = []
        for name in names:
            self.put(name, self.path / name)
            sent.append(name)
        if not sent:
            return
        # Many files are looked up per folder; a few one by one, because a folder may hold a hundred thousand others.
        folders = {name.rpartition("/")[0] for name in sent} if len(sent) > _FEW else set[str]()
        found = self.list(*([f"{folder}/*".lstrip("/") for folder in folders] or sent))
        with self._locked():
            for name in sent:
                self._remember(name, found.get(name, ""))

    def push_tree(
        self, last: Iterable[str] = (), skip: Iterable[str] = (), sent: dict[str, tuple[int, int]] | None = None
    ) -> None:
        """Send every local file, those that match `last` after all others; temporary files and `skip` are left out.

        Args:
            sent: size and time per file at its last sending. Unchanged files are not sent again; updated in place.

        Raises:
            StorageError: see `push`.
        """
        last, left_out = tuple(last), (f"{TEMPORARY}*", f"*/{TEMPORARY}*", *skip)
        names = sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())
        names = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out)]
        is_last = {name: any(fnmatch.fnmatchcase(name, pattern) for pattern in last) for name in names}
        now = {name: (status.st_size, status.st_mtime_ns) for name in names for status in [(self.path / name).stat()]}
        names = [name for name in names if sent is None or sent.get(name) != now[name]]
        self.push(sorted(names, key=lambda name: (is_last[name], name)))
        if sent is not None:
            sent |= {name: now[name] for name in names}

    def remove(self, name: str) -> None:
        """See `Storage`."""
        with self._as_storage_error(f"removed: {name}"):
            self.files.invalidate_cache()
            if self.files.exists(f"{self.root}/{name}"):
                self.files.rm(f"{self.root}/{name}", recursive=True)

    def _state(self) -> dict[str, Any]:
        folder = self._state_path
        known: dict[str, Any] = {}
        for record in folder.glob("*.json"):
            try:
                entry = read_json(record)
                known[entry["name"]] = entry["version"]
            except (DataError, KeyError, TypeError):
                continue  # a torn record: its file is fetched again
        return known

    def _remember(self, name: str, version: str) -> None:
        write_json(
            self._state_path / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json",
            {"name": name, "version": version},
        )

    @contextmanager
    def _locked(self, name: str = "lock") -> Iterator[None]:
        """Let one process of this machine in at a time: several ranks ask for the same files at once."""
        folder = self._state_path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w") as lock:
                self._wait_for(lock, folder / name)
                yield
        except PermissionError as error:
            raise StorageError(
                f"{folder}: cannot be written: {error.strerror}; set MOCME_CACHE to a writable folder"
            ) from None

    def _wait_for(self, lock: IO[str], path: Path) -> None:
        """Take a lock of this machine.

        Raises:
            StorageError: another process has held it for too long.
        """
        begun, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - begun
            if waited >= LOCK_S:
                raise StorageError(
                    f"{path}: waited {LOCK_S:g} s for another process of this machine, which fetches files of "
                    f"{self.url}; end it if it hangs, and run the same command again"
                )
            if waited >= 10 and not told:
                told = True
                log.info("waiting for another process of this machine, which fetches files of %s", self.url)
            time.sleep(0.01 if waited < 1 else 0.2)

    @contextmanager
    def _as_storage_error(self, what: str) -> Iterator[None]:
        """Turn any error of the store's library into a StorageError; botocore and aiohttp raise more than OSError."""
        try:
            yield
        except MocmeError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{self.url}: could not be {what}: {reason}; check the address, the network and your rights there"
            ) from error


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def open_storage(place: str | Path) -> LocalStorage | RemoteStorage:
    """Return the storage of a folder or URL; the folder need not exist.

    Raises:
        ConfigError: no fsspec package serves this kind of URL.
    """
    return RemoteStorage(str(place)) if is_url(place) else LocalStorage(place)
