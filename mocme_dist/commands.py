"""What the commands share: configuration flags, and how a failure leaves the process.

A command module parses its arguments, calls one function and reports; this module turns a `MocmeError` into one
block on standard error and its exit code.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from mocme_dist.cluster import leave_ray
from mocme_dist.config import Config, load_config
from mocme_dist.errors import MocmeError, error_block

EXIT_CODES = "exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 6 locked, 7 storage, 70 internal, 75 preempted"


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m mocme_dist.MODULE` with --config and --set."""
    parser = argparse.ArgumentParser(
        prog=f"python -m mocme_dist.{module}",
        description=description,
        epilog=EXIT_CODES + ". All settings with their defaults: mocme_dist/config/schema.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files, applied left to right")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override single settings"
    )
    return parser


def checkpoint_step(text: str) -> str:
    """The argument of --step: "auto" or a number of steps."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step number, got {text!r}")
    return text


def config_of(args: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """The configuration that --config, --set and then `extra` overrides make."""
    return load_config(args.config, [*args.overrides, *extra])


def run_command(main: Callable[[], None]) -> None:
    """Run `main` and leave the process with its exit code; a user's mistake shows one block, no traceback."""
    level = os.environ.get("MOCME_LOG", "INFO").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        main()
    except MocmeError as error:
        leave_ray()
        if level == "DEBUG":
            traceback.print_exc()
        print(error_block(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        print(f"error: internal: {type(error).__name__}: {error}; this is a mistake of the program, please report it", file=sys.stderr)
        sys.exit(MocmeError.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(75)
