"""Shell completion of `mocme`: commands, options, shipped configurations and settings (argcomplete).

The shell calls `mocme` with `_ARGCOMPLETE` set whenever the user presses the tab key. Nothing runs then but the parser
of the command on the line, which answers in place of parsing its arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic import BaseModel

from mocme_dist import environment
from mocme_dist.config import Config
from mocme_dist.config.load import shipped_configs


def complete_command(parser: argparse.ArgumentParser) -> None:
    """Answer for the first word after `mocme`; return if the line already has a command and a space after it."""
    words = environment.completed_part().split(" ")
    if len([word for word in words if word]) < 2 or (len(words) == 2 and words[-1]):
        _answer(parser)
    environment.hide_first_word()


def answer_in_place_of_parsing() -> None:
    """From here on, every parser of this process answers the shell instead of parsing."""

    def answer(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        for action in parser._actions:
            if action.dest == "config":
                action.completer = complete_config  # type: ignore[attr-defined]  # read by argcomplete
            elif action.dest == "overrides":
                action.completer = complete_setting  # type: ignore[attr-defined]
        _answer(parser)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = answer  # type: ignore[method-assign,assignment]


def _answer(parser: argparse.ArgumentParser) -> None:
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)


def complete_config(prefix: str, **_: Any) -> list[str]:
    """Return shipped configurations, and YAML files and folders, that begin with `prefix`."""
    from argcomplete.completers import FilesCompleter

    files: list[str] = FilesCompleter(("yaml", "yml"))(prefix)
    return [*(name for name in shipped_configs() if name.startswith(prefix)), *files]


def complete_setting(prefix: str, **_: Any) -> list[str]:
    """Return full keys of settings, each with its equals sign, that begin with `prefix`."""
    return [f"{key}=" for key in _keys(Config) if f"{key}=".startswith(prefix)]


def _keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}"
