"""Reads configuration files and overrides into a `Config`, and reports all mistakes at once.

Files apply left to right, then `--set key.path=value`. YAML is read by a safe loader that rejects duplicate keys,
reads 1e-3 as a number and leaves `no`, `012` and `12:30` as the text they look like.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mocme_dist.config.schema import MODALITIES, Config
from mocme_dist.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 scalars and no duplicate keys."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the base class declares it so)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A dictionary; a key that stands twice is an error, where YAML's own loader lets the last one win."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise ConfigError(f"{key_node.start_mark.name}:{line}: expected a name as the key, got {key!r}")
            if key in seen:
                raise ConfigError(f"{key_node.start_mark.name}:{line}: key '{key}' was given on line {seen[key]} already; delete one")
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that puts into quotes whatever either the loader here or one of YAML 1.1 would not read as text."""


_FLOAT = r"[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+|(?:0|[1-9][0-9_]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", ["t", "f"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", f"^{_FLOAT}$", list("-+.0123456789")),
):
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _parse_yaml(text: str, name: str) -> Any:
    loader = _StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def _merge(into: dict, new: dict) -> dict:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
    return into


def _override(text: str) -> dict:
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set {text}: expected key.path=value, as in --set experts.width=512")
    parsed = _parse_yaml(value, f"--set {path}")
    for key in reversed(path.split(".")):
        parsed = {key: parsed}
    return parsed


def _section(path: Sequence[Any]) -> type[BaseModel] | None:
    """The model class that the keys of `path` lead to."""
    model: type[BaseModel] = Config
    for key in path:
        field = model.model_fields.get(str(key))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def _elsewhere(key: str) -> list[str]:
    """Full paths of a key of this name in other sections: DeepSpeed's gradient_clipping is train.gradient_clipping here."""
    return [f"{name}.{key}" for name in Config.model_fields if (section := _section([name])) and key in section.model_fields]


def _describe(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join(path) or "configuration"
    if error["type"] == "extra_forbidden":
        section = _section(path[:-1])
        known = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6) or _elsewhere(path[-1])
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if path[:1] == ["modalities"]:
        return f"modalities: expected auto or a list of {', '.join(MODALITIES)}; wrong here: {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], BaseModel | dict) else f", got {error['input']!r}"
    return f"{where}: {message}{given}"


def load_config(files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The configuration that `files`, left to right, then `overrides` make.

    Raises:
        ConfigError: a file is missing or not YAML, or values are unknown or out of range; all of them are named.
    """
    merged: dict = {}
    for file in files:
        path = Path(file)
        try:
            text = path.read_text(encoding="utf8")
        except OSError as error:
            raise ConfigError(f"{path.absolute()}: configuration file cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path.absolute()}: configuration file is not UTF-8 at byte {error.start}") from None
        values = _parse_yaml(text, str(path))
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections of keys, got {type(values).__name__}")
        # A section with nothing under it, its lines commented out say, changes nothing.
        _merge(merged, {key: value for key, value in (values or {}).items() if value is not None or _section([key]) is None})
    for text in overrides:
        _merge(merged, _override(text))
    return parse_config(merged)


def parse_config(values: dict) -> Config:
    """A `Config` from nested dictionaries, as `dump_config` made them or as YAML gave them.

    Raises:
        ConfigError: every unknown key and every value out of range, in one message.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines: dict[tuple, str] = {}
        for e in error.errors():
            # A union reports each of its branches; one line for a key is enough, and the first says most.
            lines.setdefault(e["loc"][:1] if e["loc"][:1] == ("modalities",) else e["loc"], _describe(e))
        raise ConfigError("; ".join(lines.values())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal `Config`."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
