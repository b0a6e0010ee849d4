"""New entities sent to the service: the form, its limits, and the encoders that are loaded when one first comes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mocme_dist.config import Config
from mocme_dist.data.shards import SUFFIXES
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.predict import UnseenEntity
from mocme_dist.serving.service_answers import ServedBundle

if TYPE_CHECKING:
    from mocme_dist.serving.unseen import UnseenEntityEncoder

MAX_FILES = 8
MAX_TEXT = 20_000
MAX_TOP = 1000
_CACHED = 32
_FILES = tuple(SUFFIXES)


@dataclass
class NewForm:
    """A described entity: its texts by column ("" is the first one), numbers by attribute, files by member name."""

    name: str = "new entity"
    texts: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    relation: str | None = None
    side: str = "head"
    top: int = 10
    bundle: str | None = None


async def read_form(request: Request) -> NewForm:
    """Return the form of a multipart request.

    Name, text, texts, numbers, image, audio, video, relation, as, top, bundle.

    `texts` and `numbers` are JSON objects, by column and by attribute. Files are read as sent; their names give the
    type only.

    Raises:
        HTTPException: 400 with the field and what is wrong with it.
    """
    found = NewForm()
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=64)
    except HTTPException as error:
        raise HTTPException(400, f"the form cannot be read: {error.detail}") from None
    try:
        for key, value in form.multi_items():
            if key in _FILES:
                if not isinstance(value, UploadFile):
                    raise HTTPException(400, f"{key}: expected a file")
                if value.filename or value.size:
                    number = sum(name.startswith(f"{key}.") for name in found.members)
                    found.members[f"{key}.{number}.{_suffix(key, value)}"] = await value.read()
            elif isinstance(value, UploadFile):
                raise HTTPException(400, f"{key}: a file is not expected here; files are {', '.join(_FILES)}")
            else:
                _set(found, key, value)
    finally:
        await form.close()
    return found


def _set(form: NewForm, key: str, value: str) -> None:
    """Set one field that is not a file."""
    if len(value) > MAX_TEXT:
        raise HTTPException(400, f"{key}: {len(value):,} characters, limit {MAX_TEXT:,}")
    if key == "text":
        form.texts[""] = value
    elif key == "texts":
        form.texts |= {str(name): str(text) for name, text in _object(key, value).items()}
    elif key == "numbers":
        form.numbers |= {str(name): _number(str(name), number) for name, number in _object(key, value).items()}
    elif key == "as":
        if value not in ("head", "tail"):
            raise HTTPException(400, f"as: {value!r}, expected head or tail")
        form.side = value
    elif key == "top":
        if not value.isdecimal() or not 1 <= int(value) <= MAX_TOP:
            raise HTTPException(400, f"top: {value!r}, expected a number from 1 to {MAX_TOP}")
        form.top = int(value)
    elif key == "name":
        form.name = value.strip()[:200] or form.name
    elif key in ("relation", "bundle"):
        setattr(form, key, value or None)
    else:
        raise HTTPException(
            400, f"{key}: unknown field; fields are name, text, texts, numbers, relation, as, top, bundle"
        )


def _object(key: str, value: str) -> dict[str, Any]:
    try:
        found = json.loads(value or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, f"{key}: expected a JSON object")
    return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HTTPException(400, f"numbers: {name}: {value!r}, expected a finite number")
    return float(value)


def _suffix(modality: str, file: UploadFile) -> str:
    """Return the suffix of an upload's format, as a data set names it."""
    suffix = (file.filename or "").rpartition(".")[2].lower()
    if suffix not in SUFFIXES[modality]:
        suffix = (file.content_type or "").partition("/")[2].lower()
    if suffix not in SUFFIXES[modality]:
        raise HTTPException(400, f"{modality}: expected a file of type {', '.join(SUFFIXES[modality])}")
    return suffix


class NewEntities:
    """Encodes described entities for one bundle.

    Args:
        served: the bundle.
        trust_encoders: its encoders may import code.
    """

    def __init__(self, served: ServedBundle, trust_encoders: bool) -> None:
        self.served, self.trust_encoders = served, trust_encoders
        limits = Config.model_validate(served.bundle.manifest.get("config", {})).encoders
        self.max_member_bytes = limits.max_member_mb << 20
        self._vectors: OrderedDict[str, tuple[Any, dict[str, float]]] = OrderedDict()

    @cached_property
    def _encoder(self) -> UnseenEntityEncoder:
        from mocme_dist.serving.unseen import UnseenEntityEncoder

        return UnseenEntityEncoder(self.served.bundle, self.trust_encoders)

    def form(self) -> dict[str, Any]:
        """Return what an entity may be described by, read from the manifest alone."""
        manifest = self.served.bundle.manifest
        features = manifest.get("features", {})
        statistics = features.get("numeric", {}).get("statistics") or {}
        attributes = [attribute["name"] for attribute in statistics.get("attributes", [])]
        encoded = {name for name, pinned in features.items() if "imported" not in pinned}
        columns = manifest.get("config", {}).get("data", {}).get("text_columns") or ["text"]
        return {
            "bundle": self.served.name,
            "text": [str(column) for column in columns] if "text" in encoded else [],
            "numbers": attributes if "numeric" in encoded else [],
            "files": {name: list(SUFFIXES[name]) for name in SUFFIXES if name in encoded},
            "max_file_bytes": self.max_member_bytes,
        }

    def answer(self, form: NewForm) -> dict[str, Any]:
        """Return vectors' weights, nearest entities, relations that make sense, and answers where a relation is given.

        Raises:
            HTTPException: 400 if nothing is given that the model knows, or a file cannot be decoded; 413 if one is too
            large.
        """
        served = self.served
        relation = served.relation(served.relation_id(form.relation)) if form.relation is not None else None
        try:
            unseen, weights = self._encode(form)
        except (ConfigError, DataError) as error:
            raise HTTPException(400, str(error).removeprefix("--new: ")) from None
        unseen = unseen._replace(name=form.name)
        answers, close, relations = served.new(unseen, relation["id"] if relation else None, form.side, form.top)
        return {
            "bundle": served.name,
            "name": form.name,
            "as": form.side,
            "relation": relation,
            "weights": weights,
            "near": close,
            "relations": relations,
            "answers": answers,
        }

    def _encode(self, form: NewForm) -> tuple[UnseenEntity, dict[str, float]]:
        from mocme_dist.serving.unseen import Description

        for name, content in form.members.items():
            if len(content) > self.max_member_bytes:
                raise HTTPException(413, f"{name}: {len(content):,} bytes, limit {self.max_member_bytes:,}")
        members = dict(form.members)
        allowed = self.form()
        texts = {
            column or (allowed["text"] or ["text"])[0]: text for column, text in form.texts.items() if text.strip()
        }
        if unknown := sorted(set(texts) - set(allowed["text"])):
            raise HTTPException(400, f"texts: {unknown[0]}: unknown; known are {', '.join(allowed['text']) or 'none'}")
        if unknown := sorted(set(form.numbers) - set(allowed["numbers"])):
            known = ", ".join(allowed["numbers"][:20]) or "none"
            raise HTTPException(400, f"numbers: {unknown[0]}: unknown; known are {known}")
        if unknown := sorted({name.partition(".")[0] for name in members} - set(allowed["files"])):
            known = ", ".join(allowed["files"]) or "none"
            raise HTTPException(400, f"{unknown[0]}: this model was not trained with it; files that it knows: {known}")
        if texts:
            members["text.json"] = json.dumps(texts, ensure_ascii=False).encode(errors="replace")
        if form.numbers:
            members["numeric.json"] = json.dumps(form.numbers).encode()
        if not members:
            known = ", ".join(name for name in self.served.bundle.modalities if name != "structure") or "nothing"
            raise HTTPException(400, f"nothing is given that this model knows; it knows {known}")
        digest = hashlib.sha256()
        for name in sorted(members):
            digest.update(f"{name}:{len(members[name])}:".encode() + members[name])
        key = digest.hexdigest()
        if key not in self._vectors:
            self._vectors[key] = self._encoder.entity_of(Description(form.name, members))
            while len(self._vectors) > _CACHED:
                self._vectors.popitem(last=False)
        self._vectors.move_to_end(key)
        return self._vectors[key]
