"""Builds one C or C++ file into a shared library, once for a kind of machine, and keeps it in the user's cache.

The library's name holds a hash of all that it is made of, so a change builds anew, and checkouts, versions and kinds of
CPU never take each other's. No torch here: a query must answer sooner than torch imports.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def first_of(*names: str) -> str | None:
    """The first of these programs that is found."""
    return next((path for name in names if (path := shutil.which(name))), None)


def build(source: Path, compiler: str, flags: Sequence[str], more: bytes = b"") -> ctypes.CDLL:
    """The loaded library of a source file, made where it is not there yet.

    Args:
        source: one file.
        compiler: path of a C or C++ compiler. flags: all of them.
        more: what else the result depends on: headers, or the CPU where flags say native.

    Raises:
        OSError: there is no folder to write in, or one whose libraries may not be run (noexec).
        subprocess.SubprocessError: the compiler failed; `stderr` of it says why.
    """
    made_of = b"\0".join([source.read_bytes(), repr((str(Path(compiler).resolve()), tuple(flags))).encode(), more])
    folder = cache_folder()
    path = folder / f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not path.is_file():
        # Built aside and renamed: processes may build at once, and none must load half a file.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            command = [compiler, *flags, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.replace(path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """A folder that belongs to this user and nobody else may write: what lies in it is run.

    Raises:
        OSError: there is none.
    """
    own = os.environ.get("MOCME_CACHE") or "~/.cache/mocme_dist"
    for place in (f"{own}/kernels", f"{tempfile.gettempdir()}/mocme_dist-{os.getuid()}"):
        try:
            folder = Path(place).expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat(follow_symlinks=False)
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
        except (OSError, RuntimeError):
            continue
    raise OSError("no folder of this user's own can be written for compiled kernels")
