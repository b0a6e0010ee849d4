"""Runs a command again and again, killed by SIGKILL at its first, second, third ... rename, and then undisturbed.

A server process imports the libraries once and forks a child for every attempt; strace attaches to the child and kills
it where it enters the call, before the kernel does anything. A start of Python and torch for each attempt would take
minutes.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RENAMES = "rename,renameat,renameat2"  # which of them Python takes depends on the libc
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class Attempts:
    """A server of attempts; a command is a function of an importable module, as "mocme_dist.pack:main"."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, function: str, *arguments: object, kill_at: tuple[str, int] | None = None) -> tuple[int, str]:
        """Exit code (negative.

        The signal) and output of a command, killed as it enters a system call for the n-th time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        task = {"function": function, "arguments": [str(argument) for argument in arguments], "kill_at": kill_at}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        code, output = json.loads(self._process.stdout.readline())
        return code, output

    def each_kill(
        self, function: str, *arguments: object, before: Callable[[], None], every: int = 1, calls: str = RENAMES
    ) -> Iterator[int]:
        """Kill the command at its `calls`; yields the number of the call after each kill, ends when it was not killed.

        Args:
            before: brings the disk to where each attempt starts.
            every: at one call in so many.
        """
        for number in range(1, 1000, every):
            before()
            code, output = self.run(function, *arguments, kill_at=(calls, number))
            if code == 0:
                return
            assert code == -signal.SIGKILL, output
            yield number


@contextmanager
def attempts(*modules: str, environment: Mapping[str, str]) -> Iterator[Attempts]:
    """A server that has imported `modules`."""
    command = [sys.executable, __file__, *modules]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        yield Attempts(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def why_not() -> str | None:
    """Why kills cannot be placed on this machine; None where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt-get install strace): nothing shows that a kill at any rename is survived"
    probe = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"strace may not trace here: {probe.stderr.strip()}"


def _serve() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(_attempt(**task)), flush=True)


def _attempt(function: str, arguments: list[str], kill_at: tuple[str, int] | None) -> tuple[int, str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os._exit(_call(function, arguments, stop=kill_at is not None))
    os.close(write)
    tracer = None
    if kill_at is not None:
        os.waitpid(child, os.WUNTRACED)
        calls, number = kill_at
        rules = ["-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={number}"]
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", os.devnull, *rules, "-p", str(child)])
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            assert tracer.poll() is None, "strace did not attach"
            time.sleep(0.002)
        os.kill(child, signal.SIGCONT)
    with os.fdopen(read) as file:
        output = file.read()
    _, status = os.waitpid(child, 0)
    if tracer is not None:
        tracer.wait()
    return os.waitstatus_to_exitcode(status), output


def _call(function: str, arguments: list[str], stop: bool) -> int:
    module, _, name = function.partition(":")
    if stop:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY)
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        from mocme_dist.commands import run_command

        sys.argv = [module, *arguments]
        run_command(getattr(importlib.import_module(module), name))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def tree(folder: Path) -> dict[str, Any]:
    """Content of every file below `folder`, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    for imported in sys.argv[1:]:
        importlib.import_module(imported)
    _serve()
