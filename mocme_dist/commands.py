"""Common parts of the commands: configuration flags, and the exit of a failed process.

A command module parses its arguments, calls one function and reports. This module prints a `MocmeError` as one line on
standard error and exits with its code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mocme_dist import ray_loss
from mocme_dist.cluster import leave_ray, left_behind, submitted_job
from mocme_dist.config import Config, load_config
from mocme_dist.config.encoders import TRUST_FLAG
from mocme_dist.console import open_console, printable
from mocme_dist.data.storage import is_url
from mocme_dist.environment import few_open_files, lacking, log_level, outdated, remedy
from mocme_dist.errors import ConfigError, MocmeError, Preempted, error_block

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
EXIT_CODES = (
    "exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 6 locked, 7 storage, 70 internal, "
    "75 preempted"
)


class _Parser(argparse.ArgumentParser):
    """Adds a hint to messages about arguments that --set or --config consumed."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        if "required" in message:
            message += "; --set and --config take every word up to the next option: put other arguments before them"
        super().error(message)


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for `python -m mocme_dist.MODULE` with --config and --set."""
    parser = _Parser(
        prog=f"python -m mocme_dist.{module}",
        description=description,
        epilog=EXIT_CODES + ". `mocme config` prints all settings with their defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files, applied left to right")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.PATH=VALUE",
        dest="overrides",
        help="override single settings",
    )
    return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag --trust-encoders, for commands that open files which may come from somebody else."""
    parser.add_argument(
        TRUST_FLAG,
        action="store_true",
        help="an encoder module:function that it names may be imported and run (see SECURITY.md)",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add the option --step, for commands that read a checkpoint of a run."""
    parser.add_argument(
        "--step",
        type=_checkpoint_step,
        default="auto",
        metavar="STEP",
        help="a checkpoint's step instead of the best one",
    )


def _checkpoint_step(text: str) -> str:
    """Parse the argument of --step: "auto" or a number of steps."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step number, got {text!r}")
    return text


def absolute(key: str, place: str) -> str:
    """Return the absolute path of a place that a command reads or writes; a URL unchanged.

    Args:
        key: the setting or argument, for messages.
        place: path or URL.

    Raises:
        ConfigError: it is relative in a job submitted to Ray, where output would be lost; or it is a web address.
    """
    if place.lower().startswith(("http://", "https://")):
        raise ConfigError(
            f"{key}={place}: web pages cannot be listed or written; expected a path or a URL of an object store, as in "
            "s3://BUCKET/FOLDER: download it first"
        )
    if is_url(place):
        return place
    path = Path(place)
    if not path.is_absolute() and (job := submitted_job()) is not None:
        where = (
            "a copy of the uploaded folder, which Ray deletes"
            if job.copied
            else f"{path.absolute()} on the head's machine"
        )
        better = f"{key}=$PWD/{place} where you submit" if job.copied else f"{key}={path.absolute()}"
        raise ConfigError(
            f"{key}={place}: a relative path in a Ray job is one in {where}; give an absolute path on storage that all "
            f"nodes see, as in {better}, or a URL"
        )
    return str(path.absolute())


def config_of(args: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """Return the configuration made by --config, --set and then the overrides in `extra`."""
    return load_config(args.config, [*args.overrides, *extra])


@contextmanager
def _missing_package_is_a_mistake() -> Iterator[None]:
    """Turn the import of a package that is not installed into a ConfigError with the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or not lacking([package]):
            raise  # a missing module of an installed package
        raise ConfigError(remedy([package])) from error


def run_command(main: Callable[[], None]) -> None:
    """Run `main` and exit with its code; a user's mistake prints one line without a traceback."""
    code = 0
    try:
        _run_or_exit(main)
    except SystemExit as end:
        if not left_behind():
            raise
        code = end.code if isinstance(end.code, int) else 1
    if left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_or_exit(main: Callable[[], None]) -> None:
    level = log_level().upper()
    if level not in LEVELS:
        error = ConfigError(f"MOCME_LOG={log_level()}: expected one of {', '.join(LEVELS)}")
        print(printable(error_block(error)), file=sys.stderr)
        sys.exit(error.exit_code)
    open_console(level)
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if reason := outdated() or few_open_files():
            raise ConfigError(reason)
        with _missing_package_is_a_mistake(), ray_loss.watching():
            main()
    except MocmeError as error:
        _leave_ray(error.exit_code)
        if level == "DEBUG":
            traceback.print_exc()
        print(printable(error_block(error)), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        ray_loss.end_if_lost(error)
        traceback.print_exc()
        print(
            printable(
                f"error: internal: {type(error).__name__}: {error}; this is a bug of mocme_dist, please report it"
            ),
            file=sys.stderr,
        )
        sys.exit(MocmeError.exit_code)
    except KeyboardInterrupt as error:
        _leave_ray(Preempted.exit_code)
        said = str(error) or "SIGINT"
        print(f"error: interrupted ({said}); run the same command again to continue", file=sys.stderr)
        previous = {}  # a signal during the interpreter's shutdown, which may take seconds, keeps this exit code
        sys.exit(Preempted.exit_code)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt(number: int, _frame: object) -> None:
    """Handle SIGTERM: end a command as Ctrl-C does, so that it cleans up and keeps its exit code.

    Raises:
        KeyboardInterrupt: always, because no `except Exception` catches it.
    """
    raise KeyboardInterrupt(signal.Signals(number).name)


def _leave_ray(exit_code: int) -> None:
    """Leave Ray at the end of a failed command; another signal ends the process at once, with the same code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(exit_code))
    leave_ray()
