"""Reads configuration files and overrides into a `Config`, and reports all mistakes at once.

Files apply left to right, then `--set key.path=value`. YAML is read by a safe loader that rejects duplicate keys, tags,
anchors and aliases, reads 1e-3 as a number, and reads `no`, `012` and `12:30` as text.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import yaml
from pydantic import BaseModel, ValidationError
from yaml.reader import ReaderError

from mocme_dist.config.schema import MODALITIES, Config
from mocme_dist.errors import ConfigError

# Sections are two levels deep, lists of them three; the parser recurses once per level.
_MAX_DEPTH = 20
# Python converts no longer integers, and no setting needs one.
_MAX_DIGITS = 40


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 scalars and without duplicate keys, tags, anchors, aliases or deep nesting."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the base class declares it so)
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Build one node, after a look at its event: nothing but plain values passes."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"{self.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{where}: YAML anchors and aliases are not accepted; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{where}: YAML tag {event.tag!r} is not accepted; write the value without it")
        if self._depth >= _MAX_DEPTH:
            raise ConfigError(f"{where}: nested more than {_MAX_DEPTH} levels deep; expected sections of keys")
        self._depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[no-untyped-call,no-any-return]
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a dictionary; a duplicate key is an error, whereas YAML's own loader keeps the last value."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{key_node.start_mark.name}:{line}: expected a name as the key, got {key!r}")
            if key in seen:
                raise ConfigError(
                    f"{key_node.start_mark.name}:{line}: key '{key}' is also on line {seen[key]}; delete one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer of at most `_MAX_DIGITS` digits."""
        if len(node.value) > _MAX_DIGITS:
            raise ConfigError(
                f"{self.name}:{node.start_mark.line + 1}: a number of {len(node.value):,} characters, "
                f"{node.value[:10]}...; expected at most {_MAX_DIGITS}"
            )
        return int(super().construct_yaml_int(node))  # type: ignore[no-untyped-call]

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Return a text without control characters and lone surrogates, which escapes such as \\0 can produce."""
        text = str(super().construct_yaml_str(node))  # type: ignore[no-untyped-call]
        if wrong := next(
            (letter for letter in text if category(letter) in ("Cc", "Cs") and letter not in "\t\n"), None
        ):
            raise ConfigError(
                f"{self.name}:{node.start_mark.line + 1}: character U+{ord(wrong):04X} is not allowed in a value"
            )
        return text


for _tag in ("int", "str"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(_StrictLoader, f"construct_yaml_{_tag}"))


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes any text which the loader above or a YAML 1.1 loader would read as another type."""


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
    loader = None
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except ReaderError as error:
        letter = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(
            f"{name}: not YAML: character U+{letter:04X} at position {error.position} is not allowed"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise ConfigError(f"{where}: not YAML: {problem}") from None
    except RecursionError:  # the scanner of flow collections
        raise ConfigError(f"{name}: not YAML: nested too deeply; expected sections of keys") from None
    finally:
        if loader is not None:
            loader.dispose()  # type: ignore[no-untyped-call]


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
        shown = text if text.isprintable() else ascii(text)
        raise ConfigError(
            f"--set {shown}: expected key.path=value, as in --set experts.width=512; --set takes every word up to the "
            "next option: put other arguments before it"
        )
    if not path.isprintable():
        raise ConfigError(f"--set {path!r}: the key holds a control character; expected key.path=value")
    keys = path.split(".")
    if len(keys) > _MAX_DEPTH:
        raise ConfigError(f"--set {path[:40]}...: {len(keys)} levels of keys; expected key.path=value")
    parsed = _parse_yaml(value, f"--set {path}")
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def _section(path: Sequence[Any]) -> type[BaseModel] | None:
    """Return the model class that the keys of `path` lead to."""
    model: type[BaseModel] = Config
    for key in path:
        field = model.model_fields.get(str(key))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def _elsewhere(key: str) -> list[str]:
    """Return full paths of a key of this name in other sections, such as train.gradient_clipping."""
    return [
        f"{name}.{key}" for name in Config.model_fields if (section := _section([name])) and key in section.model_fields
    ]


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
        return f"modalities: expected auto or a list of {', '.join(MODALITIES)}; got {reprlib.repr(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], BaseModel | dict) else f", got {reprlib.repr(error['input'])}"
    return f"{where}: {message}{given}"


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name: mkg_w, demo, ...

    They lie in the installed package, and in a checkout beside it.
    """
    package = Path(__file__).parents[1]
    folder = next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """Return a configuration file: the path itself if it exists, else the shipped configuration of that name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    shipped = shipped_configs()
    if path.name not in shipped:
        raise ConfigError(
            f"--config {path.name}: neither a file nor a shipped configuration; expected a path or one of "
            f"{', '.join(shipped)}"
        )
    return shipped[path.name]


def load_config(files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Return the configuration made by `files`, left to right, and then by `overrides`.

    Raises:
        ConfigError: a file is missing or not YAML, or keys or values are wrong; the message names all of them.
    """
    merged: dict = {}
    for file in files:
        path = find_config(file)
        try:
            text = path.read_text(encoding="utf8")
        except OSError as error:
            hint = (
                f"; --config takes every word up to the next option: did you mean --set {file}?"
                if "=" in path.name
                else ""
            )
            raise ConfigError(f"{path.absolute()}: configuration file cannot be read: {error.strerror}{hint}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path.absolute()}: configuration file is not UTF-8 at byte {error.start}") from None
        values = _parse_yaml(text, str(path))
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections of keys, got {type(values).__name__}")
        # A section with nothing under it, for example with its lines commented out, changes nothing.
        _merge(
            merged,
            {key: value for key, value in (values or {}).items() if value is not None or _section([key]) is None},
        )
    for text in overrides:
        _merge(merged, _override(text))
    return parse_config(merged)


def parse_config(values: dict) -> Config:
    """Return a `Config` from nested dictionaries, as YAML gives them.

    Raises:
        ConfigError: every unknown key and every value out of range, in one message.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines: dict[tuple, str] = {}
        for e in error.errors():
            # A union reports each of its branches; the first is the most useful.
            lines.setdefault(e["loc"][:1] if e["loc"][:1] == ("modalities",) else e["loc"], _describe(e))
        raise ConfigError("; ".join(lines.values())) from None


def dump_value(value: Any) -> str:
    """Return one setting's value on one line, as `load_config` reads it."""
    text = str(yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6))
    return text.removesuffix("\n...\n").rstrip("\n")


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal `Config`."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


_COMMENT_WIDTH = 110


def documented(config: Config) -> str:
    """Return YAML with each setting's description as a comment; `load_config` reads it back to an equal `Config`."""
    return "\n".join(_lines(config, config.model_dump(mode="json"), "")) + "\n"


def _lines(section: BaseModel, values: dict[str, Any], indent: str) -> Iterator[str]:
    """Yield the lines of one section: each setting below its description, in the order of the schema."""
    for name, field in type(section).model_fields.items():
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            yield ""
            yield from _comment(type(inner).__doc__ or "", indent)
            yield f"{indent}{name}:"
            yield from _lines(inner, values[name], indent + "  ")
            continue
        yield from _comment(field.description or "", indent)
        yield f"{indent}{name}: {dump_value(values[name])}"


def _comment(text: str, indent: str) -> Iterator[str]:
    words = " ".join(text.split())
    yield from (f"{indent}# {line}" for line in textwrap.wrap(words, _COMMENT_WIDTH - len(indent) - 2))
