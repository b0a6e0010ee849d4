"""Output of a command: log lines and progress on standard error, the result on standard output, nothing else.

Ray, DeepSpeed and C++ libraries write their own lines in every process. Their log files keep them; the user sees the
lines of this package, errors of others, and everything with MOCME_LOG=DEBUG. Workers under Ray mark their lines, and
the driver shows marked lines. Imports the standard library only, because the file also runs as the filter of a
command's standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)

# A worker's line: mark, letter of the level, rank, text; "P" marks the state of a `Progress` as JSON.
_MARK = "mocme|"
_LEVELS = {"D": logging.DEBUG, "I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "C": logging.ERROR}
# Lines of C and C++ libraries that report no fault of this run: Ray's appear although the arguments outlive the actors;
# libmpg123 writes a line per damaged frame of an MP3 file, which extraction counts.
_NOISE = re.compile(
    r"core_worker\.cc:\d+: Actor with class name.* has constructor arguments in the object store"
    r"|libmpg123/\w+\.c:|^(Note|Warning|Error): .*(MPEG|mpeg|frame|stream|sync|header|bytes in input|ID3|LAME|Xing)"
)
# Control characters, separators of lines, and marks that change the direction of text: a terminal obeys them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
# Unmarked lines that report how a process ended.
_CRASH = re.compile(r"\*\*\* SIG|Fatal Python error|terminate called|^\s*what\(\): |^[\w.]*(Error|Exception)\b(:|$)")
# Ray's own lines about lost workers, which the supervisor reports with rank and step.
_REPORTED = re.compile(r"A worker died or was killed")
_REPEAT_S = 10.0


class _Output:
    """Streams for this process's lines and its result."""

    def __init__(self) -> None:
        self.spoke = time.monotonic()
        self.result: TextIO | None = None
        self.filter: subprocess.Popen[bytes] | None = None
        # Rank of a worker under Ray, "" for a worker without one.
        self.rank: str | None = None


_output = _Output()


class LineHandler(logging.Handler):
    """Writes log records to the current standard error, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            write_line(self.format(record))
        except Exception:
            self.handleError(record)


class _MarkedHandler(logging.Handler):
    """Handler of a worker: marks every line of a record for the driver."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            for line in self.format(record).splitlines():
                _send(record.levelname[0], line)
        except Exception:
            self.handleError(record)


def _is_ours(record: logging.LogRecord) -> bool:
    ours = record.name.partition(".")[0] in ("mocme_dist", "tools", "__main__")
    return ours or record.levelno >= logging.ERROR


def _install(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # Python's warnings become records, which the filter drops: they address authors of libraries.
    logging.captureWarnings(True)
    if level != "DEBUG":
        handler.addFilter(_is_ours)


def open_console(level: str) -> None:
    """Send the log lines of a command to standard error.

    Args:
        level: lowest level shown.
    """
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    _install(handler, level)


def speak_to_driver(rank: int | None = None) -> None:
    """Mark the log lines of this worker under Ray, so that the driver shows them.

    Args:
        rank: rank of a training process; None for other workers.
    """
    _output.rank = "" if rank is None else str(rank)
    _install(_MarkedHandler(), "INFO")


def is_worker() -> bool:
    """Return whether this process sends its lines to a driver."""
    return _output.rank is not None


def send_state(state: dict[str, Any]) -> None:
    """Send the state of a `Progress` of this worker to the driver."""
    _send("P", json.dumps(state))


def _send(kind: str, text: str) -> None:
    # One write per line: threads of a worker share the stream.
    sys.stderr.write(f"{_MARK}{kind}|{_output.rank}|{text}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Return a text with control characters and marks of direction as escapes, so that no name controls a terminal."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_line(text: str) -> None:
    """Write a line to standard error, above the progress bars; control characters are escaped."""
    text = printable(text)
    _output.spoke = time.monotonic()
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if getattr(tqdm, "_instances", None):
        tqdm.write(text, file=sys.stderr)  # type: ignore[union-attr]
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def silent_s() -> float:
    """Return seconds since this process wrote its last line."""
    return time.monotonic() - _output.spoke


def spoke() -> None:
    """Set the time of the last line to now."""
    _output.spoke = time.monotonic()


# -- standard output


def reserve_stdout() -> None:
    """Reserve standard output for `print_result`; all other output to it, also of libraries, goes to standard error."""
    if _output.result is not None or sys.stdout is None or sys.stdout is not sys.__stdout__:
        return  # done already, or the output is captured
    print(end="", flush=True)
    _output.result = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)


def print_result(report: dict[str, Any], table: str = "") -> None:
    """Print the JSON line for programs; on a terminal, print a table for readers on standard error before it."""
    stream = _output.result or sys.stdout
    if table and stream.isatty():
        write_line(table)
    # Escapes of `printable` are those of JSON: the object stays the same.
    print(printable(json.dumps(report, ensure_ascii=False)), file=stream, flush=True)


# -- output of libraries and workers


def filter_stderr() -> None:
    """Drop known lines of C and C++ libraries from this process's standard error.

    They are written to file descriptor 2 without Python. From here on that is a pipe to a small process, which outlives
    this one and so also passes on the output of a crash; Python itself writes to a copy of the descriptor.
    """
    captured = sys.stderr is None or sys.stderr is not sys.__stderr__
    from mocme_dist.environment import log_level  # not at the top: this file is also run without the package

    if captured or log_level().upper() == "DEBUG":
        return
    direct = os.dup(2)
    command = [sys.executable, "-S", "-E", str(Path(__file__))]
    # In a separate session, so that Ctrl-C reaches only this process, which may still log.
    reader, writer = os.pipe()
    _output.filter = subprocess.Popen(command, stdin=reader, stdout=direct, start_new_session=True)
    sys.stderr = os.fdopen(direct, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    if _output.result is not None:
        os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def listen_to_workers(on_state: Callable[[str, dict[str, Any]], None]) -> None:
    """Show the lines of workers under Ray in place of Ray's own printer; call before `ray.init`.

    Args:
        on_state: called with a worker's name and the state of its `Progress`.
    """
    import ray._private.worker as ray_worker  # there is no public way to receive the lines

    recent: dict[str, tuple[float, Any]] = {}

    def said_by_another(text: str, speaker: Any) -> bool:
        now = time.monotonic()
        at, who = recent.get(text, (-_REPEAT_S, speaker))
        if now - at < _REPEAT_S and who != speaker:
            return True
        for old in [key for key, (at, _) in recent.items() if now - at >= _REPEAT_S]:
            del recent[old]
        recent[text] = (now, speaker)
        return False

    def hear(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        pid = data.get("pid")
        for line in data.get("lines", ()):
            if pid == "raylet":
                _show_cluster(line)
                continue
            kind, rank, text = _parts(line)
            if kind == "P":
                with contextlib.suppress(ValueError):
                    on_state(f"{data.get('ip')}:{pid}", json.loads(text))
            elif kind and not said_by_another(text, rank or pid):
                log.log(
                    _LEVELS.get(kind, logging.INFO), "%s%s", f"rank {rank}: " if rank not in ("", "0") else "", text
                )
            elif not kind and not _NOISE.search(line):
                crash = data.get("is_err") and _CRASH.search(line)
                log.log(logging.WARNING if crash else logging.DEBUG, "process %s: %s", pid, line)

    if hasattr(ray_worker, "print_to_stdstream"):
        ray_worker.print_to_stdstream = hear


def _parts(line: str) -> tuple[str, str, str]:
    """Return kind, rank and text of a marked line; the kind is empty if there is no mark."""
    if not line.startswith(_MARK) or line.count("|") < 3:
        return "", "", line
    kind, rank, text = line[len(_MARK) :].split("|", 2)
    return kind, rank, text


def _show_cluster(line: str) -> None:
    lines = [part for part in line.splitlines() if part.strip()]
    if lines:
        level = logging.DEBUG if _REPORTED.search(line) else logging.WARNING
        log.log(level, "ray: %s", re.sub(r"\x1b\[[0-9;]*m", "", lines[0])[:500])


def _main() -> None:
    """Copy standard input to standard output without known noise."""
    for line in sys.stdin.buffer:
        if not _NOISE.search(line.decode(errors="replace")):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
