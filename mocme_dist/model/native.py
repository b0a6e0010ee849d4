"""Kernels in C++ where torch.compile stays far from the machine's limit; built once with the compiler at hand.

A kernel is one .cpp file with C functions on plain pointers, called through ctypes: no torch headers, so it builds in
about a second (`compiled`). Whoever calls one has a torch path beside it: where there is no compiler `library` gives None.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mocme_dist.compiled import build, first_of

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
    return first_of("c++", "g++", "clang++")


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
    try:
        return build(source, program, flags, b"".join(path.read_bytes() for path in sorted(include.glob("*.h"))))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()[-500:]
        log.warning("%s: cannot be built or loaded, the torch path runs in its place: %s", source.name, said)
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
