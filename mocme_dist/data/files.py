"""Files that are whole or absent: written under a temporary name, synced, then renamed.

Every file of a data set, feature part, checkpoint, bundle or status is written through this module, so a killed process
never leaves half a file under a final name. `sweep` removes the temporary files that it leaves.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mocme_dist import __version__
from mocme_dist.environment import cache_folder
from mocme_dist.errors import DataError, StorageError

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
# Age at which a temporary file of another host counts as abandoned: its lock may not be visible here (seconds).
_ABANDONED_S = 24 * 3600
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
# Temporary names of earlier versions have no host.
_OURS = re.compile(rf"{re.escape(TEMPORARY)}(?:(?P<host>[0-9a-f]{{6}})-)?[0-9a-f]{{8,12}}-(?P<name>.+)")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# Files younger than this are not remembered: two changes within the resolution of file times look like one (seconds).
_YOUNG_S = 1.0


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield an empty file next to `path`, locked while it is written; it is removed at the end unless it was renamed.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        temporary = path.with_name(f"{TEMPORARY}{_HOST}-{uuid.uuid4().hex[:8]}-{path.name}")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        swept = False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            swept = True  # a sweep is testing this file, and may be about to remove it
        except OSError:
            pass  # a file system without locks: nothing is swept there for a day
        if temporary.exists() and not swept:
            break
        temporary.unlink(missing_ok=True)
        os.close(handle)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on a clean exit it is synced and renamed to `path`.

    Args:
        durable: False leaves the syncing out: some milliseconds less, and a machine that loses power may lose the file.

    Raises:
        StorageError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as temporary:
            yield temporary
            if durable:
                sync(temporary)
            temporary.replace(path)
            if durable:
                sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path.absolute()}: cannot be written: {error.strerror or error}{_room(path.parent)}"
        ) from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed writers left in `folder`; files of live writers stay.

    A writer holds a lock on its temporary file until it ends. A file that was made on another host must also be a day
    old, because some shared file systems do not propagate locks.

    Args:
        folder: need not exist; subfolders are not searched.
        name: restrict to temporary files of this final name, for a folder that others write to as well.
    """
    for path in sorted(folder.glob(f"{TEMPORARY}*")) if folder.is_dir() else ():
        match = _OURS.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name):
            continue
        with suppress(OSError):  # its writer renamed or removed it in the meantime, or it belongs to another user
            handle = os.open(path, os.O_RDWR)
            try:
                if _is_left_behind(handle, match["host"] == _HOST):
                    # under the lock: a writer that has just created it waits, and then creates another one
                    path.unlink()
                    log.warning("%s was left half-written by a process that was killed; removed", path)
            finally:
                os.close(handle)


def _is_left_behind(handle: int, made_here: bool) -> bool:
    """Return whether the writer of an open temporary file has ended; takes its lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return False
        made_here = False  # this file system has no locks
    return made_here or time.time() - os.fstat(handle).st_mtime > _ABANDONED_S


def clear(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove all entries of `folder` except those in `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end; the lock of a killed holder is taken over.

    Raises:
        BlockingIOError: a live process holds it.
    """
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                break  # otherwise its last holder has just removed the file
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def exchange(first: Path, second: Path) -> bool:
    """Swap two files or folders atomically; return False if the kernel or file system cannot.

    Raises:
        OSError: one of them does not exist, or the folder may not be written.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(first))


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


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write `content` to `path`, whole or not at all; `durable` as for `atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as indented JSON, whole or not at all; the same value gives the same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf8"), durable)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        DataError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: file not found") from None
    except OSError as error:
        raise DataError(f"{path.absolute()}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path.absolute()}: not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{path.absolute()}: not JSON: nested too deeply") from None


def check_files(folder: Path, files: Mapping[str, Any], again: str) -> None:
    """Verify every file against its entry in the manifest of `folder`.

    Args:
        files: {"bytes": size, "sha256": hash} by name.
        again: advice for a file that differs, for the message.

    Raises:
        DataError: the first one that is missing, or has another size or content.
    """
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "not found" if size is None else f"{size:,} bytes, the manifest says {entry['bytes']:,}"
            raise DataError(f"{path.absolute()}: {found}; {again}")
        if sha256_file(path) != entry["sha256"]:
            raise DataError(
                f"{path.absolute()}: sha256 differs from the manifest's: the file is damaged or not its own; {again}"
            )


def file_entry(path: Path) -> dict[str, Any]:
    """Return size and hash of a file, as manifests store them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_once(
    folder: Path, names: Iterable[str], check: Callable[[], None], again: bool = False, token: str = ""
) -> None:
    """Call `check` unless it has already passed for the same files; its exceptions propagate.

    Args:
        folder: folder of the files.
        names: all files that `check` reads, relative to `folder`.
        check: raises if the files are wrong.
        again: call `check` in any case.
        token: anything else that the outcome depends on.
    """
    stamp, newest = _stamp(folder, names, token)
    place = str(folder.absolute())
    record = cache_folder() / "verified.json"
    known = _known(record)
    if stamp and known.get(place) == stamp and not again:
        return
    check()
    if stamp and time.time() - newest >= _YOUNG_S:
        known = {other: value for other, value in _known(record).items() if Path(other).is_dir()}
        with suppress(StorageError):  # without a writable cache the files are verified again next time
            write_json(record, {**known, place: stamp})


def _known(record: Path) -> dict[str, str]:
    try:
        known = read_json(record)
    except (DataError, OSError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(folder: Path, names: Iterable[str], token: str) -> tuple[str, float]:
    """Return a hash of the files' identities, empty if one is missing, and the time of the last change."""
    stamps = []
    newest = 0.0
    for name in sorted(names):
        try:
            status = (folder / name).stat()
        except (OSError, ValueError):
            return "", newest
        stamps.append([name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        newest = max(newest, status.st_ctime)
    return hashlib.sha256(json.dumps([__version__, token, stamps]).encode()).hexdigest(), newest
