"""Folders at fsspec URLs (s3://, gs://, abfs://, file://, memory://, ...) and their copies on this machine's disk.

Whatever computes works on local files: arrays are memory-mapped, tar files are streamed, renames are atomic. A remote
folder is therefore mirrored: `pull` brings files that are new or have changed, `push` sends those, each whole or not at
all and in the order given, so that what says "done" goes last. One mirror a URL and machine, locked while it pulls.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mocme_dist.data.files import atomic_path, read_json, write_json
from mocme_dist.errors import ConfigError, DataError, MocmeError, StorageError

log = logging.getLogger(__name__)

_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# A file system whose writes are seen half-done; everywhere else an object appears whole.
_RENAMES = {"file", "local"}
# Files of one push that are looked up one by one.
_FEW = 8


def is_url(place: str | Path) -> bool:
    """Whether it names a folder behind fsspec, and not a path of this machine."""
    return bool(_URL.match(str(place)))


def local_folder(place: str | Path, *patterns: str) -> Path:
    """A path as it is; of a URL its mirror, with the files that match `patterns` (all without any) brought up to date.

    Raises:
        ConfigError, DataError, StorageError: see `Mirror`.
    """
    if not is_url(place):
        return Path(place)
    mirror = Mirror(str(place))
    mirror.pull(*patterns)
    return mirror.path


class Mirror:
    """A remote folder and its copy here.

    Attributes:
        url: without a slash at the end.
        path: the copy: in $MOCME_CACHE/mirror, or ~/.cache/mocme_dist/mirror.

    Raises:
        ConfigError: no fsspec package serves this kind of URL.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{self.url}: {error}; install the fsspec package for it (s3:// needs s3fs, gs:// gcsfs)") from None
        self.root = self.root.rstrip("/")
        cache = Path(os.environ.get("MOCME_CACHE") or Path.home() / ".cache" / "mocme_dist")
        name = f"{hashlib.sha256(self.url.encode()).hexdigest()[:16]}-{self.url.rsplit('/', 1)[-1]}"
        self.path = cache.absolute() / "mirror" / name / "files"
        self._state_path = self.path.with_name("state")

    # -- from there to here

    def listing(self, *patterns: str) -> dict[str, str]:
        """Remote files that match any of `patterns` (all without any), by relative name, with what tells versions apart.

        Raises:
            DataError: a name would lie outside the folder. StorageError: the storage does not answer.
        """
        with self._told("listed"):
            self.files.invalidate_cache()
            found: dict[str, Any] = {}
            for place, whole in dict.fromkeys(map(_start_of, patterns or ("*",))):
                found |= self._found(f"{self.root}/{place}".rstrip("/"), whole)
        names: dict[str, str] = {}
        for full, info in sorted(found.items()):
            if str(full).endswith("/"):
                continue  # consoles of stores make empty objects to show a folder
            name = str(full).removeprefix(self.root).lstrip("/")
            if any(part in ("", ".", "..") for part in PurePosixPath(name).parts) or "\\" in name:
                raise DataError(f"{self.url}: holds {full!r}, which is no name inside it")
            if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                # Stores differ in what they tell: a hash, a time, both.
                token = next((str(info[key]) for key in ("ETag", "etag", "md5", "mtime", "LastModified", "created") if info.get(key)), "")
                names[name] = f"{info['size']} {token}"
        return names

    def _found(self, place: str, whole: bool) -> dict[str, Any]:
        """One file, or all below a folder; nothing where there is none."""
        try:
            if whole:
                return {place: self.files.info(place)}
            return _walk(place) if self._renames else self.files.find(place, detail=True)
        except FileNotFoundError:
            return {}

    def pull(self, *patterns: str) -> list[str]:
        """Bring remote files that are new or changed; names of those that came.

        Raises:
            DataError, StorageError: see `listing`; also when this disk cannot be written.
        """
        came = []
        with self._locked():
            known = self._state()
            for name, version in self.listing(*patterns).items():
                local = self.path / name
                if known.get(name) == version and local.is_file():
                    continue
                with atomic_path(local) as temporary, self._told(f"read: {name}"):
                    self.files.get_file(f"{self.root}/{name}", str(temporary))
                self._remember(name, version)
                came.append(name)
        return came

    def bring(self, name: str, size: int) -> Path:
        """One file that never changes under its name: fetched unless it is here in its size; where it lies here.

        Raises:
            StorageError: it is not there, or the storage does not answer.
        """
        local = self.path / name
        with self._locked(f"lock-{hashlib.sha256(name.encode()).hexdigest()[:2]}"):
            if not local.is_file() or local.stat().st_size != size:
                with atomic_path(local) as temporary, self._told(f"read: {name}"):
                    self.files.get_file(f"{self.root}/{name}", str(temporary))
        return local

    def read(self, name: str) -> bytes | None:
        """The bytes of a small remote file as it is now; None where there is none.

        Raises:
            StorageError: the storage does not answer.
        """
        with self._told(f"read: {name}"):
            self.files.invalidate_cache()
            try:
                return bytes(self.files.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    # -- from here to there

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        """Write a small remote file, whole or not at all.

        Args:
            new: only where there is none yet, which S3, GCS, Azure and a disk decide for themselves; whoever depends on
                it reads it back, for a store that does not.

        Returns:
            False when `new` and there is one.

        Raises:
            StorageError: the storage does not take it.
        """
        target = f"{self.root}/{name}"
        with self._told(f"written: {name}"):
            if self._renames:
                with self._aside(target) as aside:
                    self.files.pipe_file(aside, content)
                    if not new:
                        Path(aside).replace(target)
                        return True
                    try:
                        os.link(aside, target)
                    except FileExistsError:
                        return False
                return True
            try:
                self.files.invalidate_cache()
                if not new:
                    self.files.pipe_file(target, content)
                    return True
                try:
                    self.files.pipe_file(target, content, mode="create")
                except TypeError:  # a package that has not learnt to: the next best
                    if self.files.exists(target):
                        return False
                    self.files.pipe_file(target, content)
            except Exception:
                # Stores have no common word for "there is one"; a read tells what it was.
                if not new or self.read(name) is None:
                    raise
                return False
        return True

    def put(self, local: Path, name: str) -> None:
        """Send a local file; it is there whole or not at all.

        Raises:
            StorageError: the storage does not take it.
        """
        target = f"{self.root}/{name}"
        with self._told(f"written: {name}"):
            if not self._renames:
                self.files.put_file(str(local), target)
                return
            with self._aside(target) as aside:
                self.files.put_file(str(local), aside)
                Path(aside).replace(target)

    @property
    def _renames(self) -> bool:
        return bool(set(_protocols(self.files)) & _RENAMES)

    @contextmanager
    def _aside(self, target: str) -> Iterator[str]:
        """A name beside `target` on a disk, gone afterwards."""
        aside = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
        self.files.makedirs(aside.rsplit("/", 1)[0], exist_ok=True)
        try:
            yield aside
        finally:
            Path(aside).unlink(missing_ok=True)

    def push(self, names: Iterable[str]) -> None:
        """Send local files in this order; each is there whole or not at all.

        Raises:
            StorageError: the storage does not take one; those before it are there.
        """
        sent = []
        for name in names:
            self.put(self.path / name, name)
            sent.append(name)
        if not sent:
            return
        # Of many files one listing a folder; of a few each by itself, for a folder may hold a hundred thousand others.
        folders = {name.rpartition("/")[0] for name in sent} if len(sent) > _FEW else set[str]()
        found = self.listing(*([f"{folder}/*".lstrip("/") for folder in folders] or sent))
        with self._locked():
            for name in sent:
                self._remember(name, found.get(name, ""))

    def push_tree(self, last: Iterable[str] = (), skip: Iterable[str] = (), sent: dict[str, tuple[int, int]] | None = None) -> None:
        """Send every local file, those that match `last` after all others; temporary files and `skip` stay.

        Args:
            sent: size and time of files by name when they were sent before: such do not go again; brought up to date.

        Raises:
            StorageError: see `push`.
        """
        last, left_out = tuple(last), ("*.tmp-*", ".tmp-*", "*/.tmp-*", *skip)
        names = sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())
        names = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out)]
        is_last = {name: any(fnmatch.fnmatchcase(name, pattern) for pattern in last) for name in names}
        now = {name: (status.st_size, status.st_mtime_ns) for name in names for status in [(self.path / name).stat()]}
        names = [name for name in names if sent is None or sent.get(name) != now[name]]
        self.push(sorted(names, key=lambda name: (is_last[name], name)))
        if sent is not None:
            sent |= {name: now[name] for name in names}

    def remove(self, name: str) -> None:
        """Delete a remote file or folder, if it is there."""
        with self._told(f"removed: {name}"):
            self.files.invalidate_cache()
            if self.files.exists(f"{self.root}/{name}"):
                self.files.rm(f"{self.root}/{name}", recursive=True)

    # -- what this mirror knows

    def _state(self) -> dict[str, Any]:
        folder = self._state_path
        known: dict[str, Any] = {}
        for record in folder.glob("*.json"):
            try:
                entry = read_json(record)
                known[entry["name"]] = entry["version"]
            except (DataError, KeyError, TypeError):
                continue  # torn by a kill: its file is fetched again
        return known

    def _remember(self, name: str, version: str) -> None:
        write_json(self._state_path / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json", {"name": name, "version": version})

    @contextmanager
    def _locked(self, name: str = "lock") -> Iterator[None]:
        """One process of this machine at a time: several ranks ask for the same files at once."""
        folder = self._state_path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except PermissionError as error:
            raise StorageError(f"{folder}: cannot be written: {error.strerror}; set MOCME_CACHE to a writable folder") from None

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of whatever store as one of ours; what its library raises need be no OSError (botocore, aiohttp)."""
        try:
            yield
        except MocmeError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{self.url}: could not be {what}: {reason}; check the address, the network and your rights there"
            ) from error


def _start_of(pattern: str) -> tuple[str, bool]:
    """The folder below which a pattern can match, or, of a plain name, the name itself and True."""
    plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return (pattern, True) if plain == pattern else (plain.rpartition("/")[0], False)


def _walk(place: str) -> dict[str, Any]:
    """Files below a folder of a disk. fsspec's own `find` shows a folder as empty when one file goes while it looks."""

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


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
