"""Builds the C++ kernels of this package, loads them and calls them.

A kernel is one .cpp file beside this module, with C functions on plain pointers that are called through ctypes: without
torch's headers it builds in about a second. The library is kept in the user's cache. Its name holds a hash of
everything it is built from, so a change builds a new one, and checkouts, versions and kinds of CPU never share one.
Its last 32 bytes are a SHA-256 of those before, so a damaged library is built again instead of run.

Every kernel has a torch form beside it: `library` returns None where no compiler works. This module does not import
torch, because a query must answer sooner than torch imports.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mocme_dist.environment import cache_folder

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size
# Named instruction sets instead of -march=native: the cache may lie in a home that machines of several kinds share.
_INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
# -ffp-contract=off: distances that must tie bit for bit are fused only where the source says so. The OpenMP runtime has
# the SONAME of torch's, so -fopenmp shares the runtime and the threads that torch has loaded.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")


@cache
def instruction_set() -> str:
    """Return the widest instruction set that this CPU has and kernels are written for: AVX512, AVX2 or DEFAULT."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return "DEFAULT"
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    for name, options in _INSTRUCTIONS.items():
        if flags.issuperset(option.removeprefix("-m") for option in options):
            return name
    return "DEFAULT"


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None if there is none."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@cache
def library(source: Path, instructions: str | None = None) -> ctypes.CDLL | None:
    """Return the loaded library of a .cpp file, or None if it cannot be built.

    Args:
        source: the file; headers beside this module are found.
        instructions: instruction set to build for; None is this machine's.
    """
    program = compiler()
    if program is None:
        return None
    flags = (*_FLAGS, *_INSTRUCTIONS.get(instructions or instruction_set(), ()), f"-I{FOLDER}")
    try:
        return build(source, program, flags, b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.h"))))
    except (OSError, subprocess.SubprocessError) as error:
        _warn(program, complaint(error))
        return None


@cache
def _warn(program: str, reason: str) -> None:
    """Warn once, though every kernel fails: a compiler that cannot build one can build none."""
    log.warning(
        "%s cannot build the C++ kernels, or they cannot be loaded (%s): torch runs in their place", program, reason
    )


def call(
    kernels: ctypes.CDLL | None,
    name: str,
    arrays: Sequence[Any],
    sizes: Sequence[int],
    numbers: Sequence[float] = (),
    threads: int = 1,
) -> None:
    """Call a function of a kernel's library; all of ours take their arguments in this order.

    Args:
        kernels: a library that `library` returned, not None.
        name: of the function.
        arrays: contiguous torch tensors on the CPU or numpy arrays, passed as pointers.
        sizes, numbers: passed as int64 and float32.
        threads: passed last, as int32.
    """
    assert kernels is not None, name
    function = getattr(kernels, name)
    function.restype = None
    pointers = (ctypes.c_void_p(_address(array)) for array in arrays)
    function(*pointers, *map(ctypes.c_int64, sizes), *map(ctypes.c_float, numbers), ctypes.c_int32(threads))


def _address(array: Any) -> int:
    """Return where a contiguous array begins."""
    if hasattr(array, "data_ptr"):
        assert array.is_contiguous() and array.device.type == "cpu"
        return int(array.data_ptr())
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def build(source: Path, program: str, flags: Sequence[str], more: bytes = b"") -> ctypes.CDLL:
    """Return the loaded library of a source file, building it if it is missing or damaged.

    Args:
        source: one file.
        program: path of the compiler. flags: all of its options.
        more: what else the result depends on, such as headers.

    Raises:
        OSError: no folder can be written, or libraries in it may not be run (noexec).
        subprocess.SubprocessError: the compiler failed; `complaint` gives the reason.
    """
    parts = (source.read_bytes(), repr((str(Path(program).resolve()), tuple(flags))).encode(), more)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    folder = library_folder()
    path = folder / f"{source.stem}-{digest[:16]}.so"
    if not _is_whole(path):
        # Built aside and renamed: several processes may build at once, and none may load half a file.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            command = [program, *flags, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            # The digest follows what the file's headers describe, where no loader reads.
            with made.open("r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
            made.replace(path)
    return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Return whether a library that `build` wrote exists and is undamaged."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def try_compiler(program: str) -> None:
    """Compile one line of C++ and keep nothing.

    Raises:
        OSError, subprocess.SubprocessError: it fails; `complaint` gives the reason.
    """
    command = [program, "-x", "c++", "-c", "-", "-o", os.devnull]
    subprocess.run(command, input="int one = 1;\n", check=True, capture_output=True, text=True, timeout=60)


def complaint(error: Exception) -> str:
    """Return the last line with "error" of a failed compiler's output, or of the exception; else its last line."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()


def library_folder() -> Path:
    """Return a folder that belongs to this user and that nobody else may write: libraries in it are run.

    Raises:
        OSError: there is none.
    """
    places = [Path(tempfile.gettempdir(), f"mocme_dist-{os.getuid()}")]
    with suppress(RuntimeError):  # a user without a home folder
        places.insert(0, cache_folder() / "kernels")
    for folder in places:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat(follow_symlinks=False)
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise OSError("no folder of this user's own can be written for compiled kernels")
