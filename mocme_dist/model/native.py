"""Kernels in C++ where torch.compile stays far from the machine's limit; built once with the compiler at hand.

A kernel is one .cpp file with C functions on plain pointers, called through ctypes: no torch headers, so it builds in
about a second. The library is cached under a name that holds a hash of its text and flags: a change builds anew, and
checkouts, versions and kinds of CPU never take each other's. Whoever calls a kernel has a torch path beside it: where
there is no compiler `library` gives None.
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
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Named instruction sets and not -march=native: the cache may lie in a home that machines of several kinds share.
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma")
_AMX = (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
_INSTRUCTIONS = {"AMX": _AMX, "AMX, in two parts": (*_AMX, "-DMOCME_SPLIT"), "AVX512": _AVX512, "AVX2": ("-mavx2", "-mfma")}
# No contraction behind our back: what must tie bit for bit says where it fuses. SONAMEs are equal, so -fopenmp
# shares the OpenMP runtime and the threads that torch has loaded.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")


def instruction_set() -> str:
    """The name of what this CPU has and torch uses: AVX512, AVX2, or something that gets the portable form."""
    return str(torch.backends.cpu.get_cpu_capability())


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@cache
def library(source: Path, instructions: str | None = None) -> ctypes.CDLL | None:
    """The loaded library of a .cpp file; None where it cannot be built.

    Args:
        source: the file; headers beside this module are found.
        instructions: instruction set to build for; None is this machine's without AMX, which is taken only where it is
            asked for, and None is the answer where this machine has none.
    """
    program = compiler()
    # Not built before the CPU is known to have it: older compilers know no AMX, and would warn for nothing.
    if program is None or ((instructions or "").startswith("AMX") and not has_amx()):
        return None
    include = Path(__file__).parent
    flags = (*_FLAGS, *_INSTRUCTIONS.get(instructions or instruction_set(), ()), f"-I{include}")
    text = b"".join(path.read_bytes() for path in (source, *sorted(include.glob("*.h"))))
    key = hashlib.sha256(repr((program, flags)).encode() + text).hexdigest()[:16]
    try:
        return _load(source, [program, *flags, str(source)], f"{source.stem}-{key}.so")
    except OSError as error:  # no folder to write in, or one whose libraries may not be run (noexec)
        log.warning("%s: cannot be built or loaded, the torch path runs in its place: %s", source.name, error)
        return None


def call(kernels: ctypes.CDLL | None, name: str, arrays: Sequence[Tensor], sizes: Sequence[int], numbers: Sequence[float] = ()) -> None:
    """A function of a kernel's library, by the order of arguments that most of ours have.

    Args:
        kernels: what `library` gave, and not None.
        name: of the function.
        arrays: contiguous tensors on the CPU, as pointers.
        sizes, numbers: int64 and float32. The number of threads comes last, int32.
    """
    assert kernels is not None and all(array.is_contiguous() for array in arrays), name
    function = getattr(kernels, name)
    function.restype = None
    pointers = (ctypes.c_void_p(array.data_ptr()) for array in arrays)
    function(*pointers, *map(ctypes.c_int64, sizes), *map(ctypes.c_float, numbers), ctypes.c_int32(torch.get_num_threads()))


@cache
def has_amx() -> bool:
    """Whether this process may multiply bfloat16 by AMX; the first call asks the system for it."""
    found = library(Path(__file__).with_name("amx.cpp"))
    return found is not None and bool(found.mocme_has_amx())


def _load(source: Path, command: list[str], name: str) -> ctypes.CDLL | None:
    """The library `name` of the cache, built by `command` where it is not there; None where that fails."""
    built = _cache_directory() / name
    if not built.exists():
        # Built aside and renamed: ranks may build at once, and none must load half a file.
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=built.parent)
        os.close(handle)
        done = subprocess.run([*command, "-o", temporary], capture_output=True, text=True, check=False)
        if done.returncode:
            Path(temporary).unlink()
            log.warning("%s: not built, the torch path runs in its place: %s", source.name, done.stderr.strip()[-500:])
            return None
        Path(temporary).replace(built)
    return ctypes.CDLL(str(built))


@cache
def _cache_directory() -> Path:
    """Beside torch's own caches in the user's home; a directory of this process where that cannot be written."""
    path = Path(torch.hub.get_dir()).parent / "mocme_dist"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A library that others can write is code that others can run here.
        if os.access(path, os.W_OK) and path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o022:
            return path
    except OSError:
        log.info("%s cannot be made; kernels are built for this process alone", path)
    return Path(tempfile.mkdtemp(prefix="mocme-native-"))
