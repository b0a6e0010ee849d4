"""The console command `mocme`: `mocme NAME ...` is `python -m mocme_dist.NAME ...`; and its completion by the shell.

The shell calls `mocme` with `_ARGCOMPLETE` set whenever the user presses the tab key. Nothing runs then but the parser
of the command on the line, which answers in place of parsing its arguments (argcomplete).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic import BaseModel

from mocme_dist import __version__, environment
from mocme_dist.commands import run_command
from mocme_dist.config import Config
from mocme_dist.config.load import shipped_configs

# Module and line of help of each command, in the order of first use.
COMMANDS = {
    "init": ("init", "look into a raw folder and write a configuration for it"),
    "check": ("check", "report what is in a raw folder: sizes, leakage, gaps"),
    "split": ("split", "cut one file of facts into train, valid and test"),
    "import": ("import", "write a raw folder from a published graph"),
    "config": ("config.__main__", "print all settings with their descriptions"),
    "pack": ("pack", "pack a raw folder into WebDataset shards and a graph"),
    "extract": ("extract", "compute features with frozen encoders"),
    "train": ("train", "train a model; packs and extracts what is missing"),
    "evaluate": ("evaluate", "rank a split exactly"),
    "export": ("export", "write a trained run as a bundle, or for other tools"),
    "query": ("query", "ask a bundle for missing facts"),
    "discover": ("discover", "write the likeliest facts that a bundle does not know"),
    "report": ("report", "show what a run has learned: a table, pictures, a page"),
    "serve": ("serve", "answer over HTTP, with a page to explore a bundle"),
}


def main() -> None:
    """Run the command that the first argument names; exit with its code."""
    parser = argparse.ArgumentParser(
        prog="mocme",
        description="Completes multi-modal knowledge graphs, from raw files to ranked answers.",
        epilog="`mocme COMMAND --help` describes a command. Each is also `python -m mocme_dist.COMMAND`.",
    )
    parser.add_argument("--version", action="version", version=f"mocme_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if environment.is_completing():
        _complete_command(parser)
        sys.argv = environment.completed_line().split()
        _answer_in_place_of_parsing()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        parser.parse_args()
        return
    module = importlib.import_module(f"mocme_dist.{COMMANDS[name][0]}")
    # From here on the process is the command, whose parser reads the rest of the line.
    sys.argv = [f"mocme {name}", *sys.argv[2:]]
    run_command(module.main)


def _complete_command(parser: argparse.ArgumentParser) -> None:
    """Answer for the first word after `mocme`; return if the line already has a command and a space after it."""
    words = environment.completed_part().split(" ")
    if len([word for word in words if word]) < 2 or (len(words) == 2 and words[-1]):
        _answer(parser)
    environment.hide_first_word()


def _answer_in_place_of_parsing() -> None:
    """From here on, every parser of this process answers the shell instead of parsing."""

    def answer(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        for action in parser._actions:
            if action.dest == "config":
                action.completer = _complete_config  # type: ignore[attr-defined]  # read by argcomplete
            elif action.dest == "overrides":
                action.completer = _complete_setting  # type: ignore[attr-defined]
        _answer(parser)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = answer  # type: ignore[method-assign,assignment]


def _answer(parser: argparse.ArgumentParser) -> None:
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)


def _complete_config(prefix: str, **_: Any) -> list[str]:
    """Return shipped configurations, and YAML files and folders, that begin with `prefix`."""
    from argcomplete.completers import FilesCompleter

    files: list[str] = FilesCompleter(("yaml", "yml"))(prefix)
    return [*(name for name in shipped_configs() if name.startswith(prefix)), *files]


def _complete_setting(prefix: str, **_: Any) -> list[str]:
    """Return full keys of settings, each with its equals sign, that begin with `prefix`."""
    return [f"{key}=" for key in _keys(Config) if f"{key}=".startswith(prefix)]


def _keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}"


if __name__ == "__main__":
    main()
