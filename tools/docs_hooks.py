"""Hooks of the documentation site: the page of settings is generated from the schema, so that it cannot fall behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mocme_dist.config import Config

MARKER = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of the page of settings by one table per section."""
    return markdown.replace(MARKER, "\n".join(settings_tables(Config))) if MARKER in markdown else markdown


def settings_tables(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Markdown of one section and of those inside it: name, default, description of each setting."""
    fields = section.model_fields
    inner = {
        name: field.annotation
        for name, field in fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    plain = {name: field for name, field in fields.items() if name not in inner}
    if path:
        yield f"\n## `{path}`\n\n{' '.join((section.__doc__ or '').split())}\n"
    if plain:
        yield "| setting | default | what it does |\n| --- | --- | --- |"
    for name, field in plain.items():
        default = "" if field.default is PydanticUndefined else json.dumps(field.default)
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{path + '.' if path else ''}{name}` | `{default}` | {description} |"
    for name, model in inner.items():
        yield from settings_tables(model, f"{path + '.' if path else ''}{name}")
