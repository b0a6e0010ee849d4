"""The routes of the endpoint: questions, look-ups, media, and the files of the page."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from mocme_dist import __version__
from mocme_dist.serving.service_answers import AskedAs, ServedBundle
from mocme_dist.serving.service_guard import COOKIE, cookie_of
from mocme_dist.serving.service_new import read_form

if TYPE_CHECKING:
    from mocme_dist.serving.service import Service

MAX_TOP = 1000
MAX_QUESTIONS = 64
_PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SHOWN = ("/predict", "/explain", "/new", "/entity", "/search", "/alike", "/relations", "/map", "/run")
ROUTES = frozenset((*_SHOWN, "/health", "/metrics", "/bundles", "/featured", "/thumbnail", "/media", "/page"))
Filter = Literal["known", "train", "none"]
FILTERED = "Left out are known answers, those of train, or none; whatever is left and known is marked."
_HOUR = {"cache-control": "private, max-age=3600"}


class Asking(BaseModel, extra="forbid"):
    """A question: a relation with a head (answers are tails), with a tail (answers are heads), or with both."""

    head: str | None = Field(None, max_length=1000, description="Id or label of an entity.")
    relation: str = Field(max_length=1000, description="Id or label of a relation.")
    tail: str | None = Field(None, max_length=1000, description="Id or label of an entity.")


class Asked(BaseModel, extra="forbid"):
    """Several questions at once."""

    questions: list[Asking] = Field(min_length=1, max_length=MAX_QUESTIONS)
    top: int = Field(10, ge=1, le=MAX_TOP)
    filter: Filter = Field("known", description=FILTERED)
    candidates: list[str] | None = Field(None, max_length=10_000, description="Entities that may be answers.")
    range: bool = Field(False, description="Only entities that train has on this side of the relation.")
    bundle: str | None = None


BundleName = Annotated[str | None, Query(description="Name of a bundle; the first one by default.", max_length=200)]
Name = Annotated[str, Query(max_length=1000)]
Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="How many answers.")]


def as_json(value: Any, status: int = 200) -> Response:
    """Return a JSON response; faster than FastAPI's, which looks at every value first."""
    # A request may hold half of a surrogate pair, which an error message quotes and UTF-8 does not have.
    content = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf8", "replace")
    return Response(content, status, media_type="application/json")


def routers(service: Service) -> list[APIRouter]:
    """Return all routes of a service."""
    return [_ask_routes(service), _look_routes(service), _media_routes(service), _page_routes(service)]


def _ask_routes(service: Service) -> APIRouter:
    """Return the routes that answer questions."""
    router = APIRouter(tags=["questions"])

    @router.get("/predict", summary="Ranked answers to one question")
    async def predict(
        relation: Name,
        head: Name | None = None,
        tail: Name | None = None,
        top: Top = 10,
        filter: Annotated[Filter, Query(description=FILTERED)] = "known",
        range: Annotated[bool, Query(description="Only entities that train has on this side of the relation.")] = False,
        bundle: BundleName = None,
    ) -> Response:
        asking = Asking(head=head, relation=relation, tail=tail)
        return as_json(await service.predict(service.served(bundle), asking, AskedAs(top, filter, range)))

    @router.post("/predict", summary="Ranked answers to several questions")
    async def predict_many(asked: Asked) -> Response:
        served = service.served(asked.bundle)
        candidates = None if asked.candidates is None else tuple(served.entity_names(asked.candidates))
        asked_as = AskedAs(asked.top, asked.filter, asked.range, candidates)
        each = (service.predict(served, asking, asked_as) for asking in asked.questions)
        return as_json({"results": await asyncio.gather(*each)})

    @router.get("/explain", summary="Why an answer: terms, votes, likeness by modality")
    async def explain(
        head: Name,
        relation: Name,
        tail: Name,
        direction: Annotated[Literal["tail", "head"], Query(description="The side that is the answer.")] = "tail",
        bundle: BundleName = None,
    ) -> Response:
        served = service.served(bundle)
        ids = (served.entity_id(head), served.entity_id(tail))
        source, answer = ids if direction == "tail" else reversed(ids)
        side = int(direction == "head")
        return as_json(await service.work(served.explain, source, served.relation_id(relation), side, answer))

    @router.post("/new", summary="Answers about an entity that is not in the graph")
    async def new(request: Request) -> Response:
        form = await read_form(request)
        served = service.served(form.bundle)
        return as_json(await service.work(service.new[served.name].answer, form))

    @router.get("/new", summary="What a new entity may be described by")
    async def new_form(bundle: BundleName = None) -> Response:
        served = service.served(bundle)
        return as_json(await service.look_up(service.new[served.name].form))

    return router


def _look_routes(service: Service) -> APIRouter:
    """Return the routes that look something up."""
    router = APIRouter(tags=["graph"])

    @router.get("/health", summary="Whether the service answers")
    async def health() -> Response:
        return as_json({"status": "ok", "version": __version__, "bundles": list(service.bundles)})

    @router.get("/metrics", summary="Counters and times for Prometheus")
    async def metrics() -> Response:
        content, kind = service.metrics.text()
        return Response(content, media_type=kind)

    @router.get("/bundles", summary="The bundles that are served")
    async def bundles() -> Response:
        return as_json({"bundles": [served.about() for served in service.bundles.values()]})

    @router.get("/search", summary="Entities whose names match")
    async def search(
        q: Annotated[str, Query(max_length=200)],
        limit: Annotated[int, Query(ge=1, le=50)] = 10,
        bundle: BundleName = None,
    ) -> Response:
        return as_json({"query": q, "results": await service.look_up(service.served(bundle).search, q, limit)})

    @router.get("/featured", summary="Entities to begin with: many facts, and a picture")
    async def featured(limit: Annotated[int, Query(ge=1, le=100)] = 18, bundle: BundleName = None) -> Response:
        return as_json({"entities": await service.look_up(service.served(bundle).featured, limit)})

    @router.get("/entity/{name:path}", summary="An entity: texts, numbers, media and known facts")
    async def entity(name: str, bundle: BundleName = None) -> Response:
        served = service.served(bundle)
        return as_json(await service.look_up(lambda: served.describe(served.entity_id(name))))

    @router.get("/alike", summary="The entities that each modality finds most like one")
    async def alike(entity: Name, limit: Annotated[int, Query(ge=1, le=50)] = 6, bundle: BundleName = None) -> Response:
        served = service.served(bundle)
        return as_json(await service.work(lambda: served.alike(served.entity_id(entity), limit)))

    @router.get("/relations", summary="Relations; for an entity those that make sense first")
    async def relations(entity: Name | None = None, bundle: BundleName = None) -> Response:
        served = service.served(bundle)

        def found() -> list[dict[str, Any]]:
            return served.relations(None if entity is None else served.entity_id(entity))

        return as_json({"relations": await service.look_up(found)})

    @router.get("/map", summary="Entities with coordinates")
    async def points(bundle: BundleName = None) -> Response:
        return as_json({"points": await service.work(service.served(bundle).points)})

    @router.get("/run", summary="The training behind a bundle: metrics, calibration, weights")
    async def run(bundle: BundleName = None) -> Response:
        return as_json(await service.look_up(service.served(bundle).run))

    return router


def _media_routes(service: Service) -> APIRouter:
    """Return the routes of pictures, sounds and films."""
    router = APIRouter(tags=["media"])

    @router.get("/thumbnail/{number}", summary="A picture, small, as PNG")
    async def thumbnail(
        number: int, entity: Name, side: Annotated[int, Query(ge=32, le=256)] = 128, bundle: BundleName = None
    ) -> Response:
        served = service.served(bundle)

        def found() -> bytes | None:
            return served.media.thumbnail(served.entity_id(entity), number, side) if served.media else None

        content = await service.look_up(found)
        if content is None:
            raise HTTPException(404, "the entity has no such picture")
        return Response(content, media_type="image/png", headers=_HOUR)

    @router.get("/media/{modality}/{number}", summary="A picture, sound or film as it was packed; Range is understood")
    async def media(
        request: Request,
        modality: Literal["image", "audio", "video"],
        number: int,
        entity: Name,
        bundle: BundleName = None,
    ) -> Response:
        served = service.served(bundle)
        return await service.look_up(_file, served, entity, modality, number, request.headers.get("range"))

    return router


def _file(served: ServedBundle, name: str, modality: str, number: int, wanted: str | None) -> Response:
    """Return a file of an entity, or the range of bytes that is wanted."""
    entity = served.entity_id(name)
    found = served.media.find(entity, modality, number) if served.media is not None else None
    if served.media is None or found is None:
        raise HTTPException(404, "the entity has no such file")
    place, kind = found
    headers = {**_HOUR, "accept-ranges": "bytes"}
    span = _range(wanted, place.size)
    if span is None:
        return Response(served.media.read(entity, place), media_type=kind, headers=headers)
    start, stop = span
    if start >= stop:
        return Response(b"", 416, {**headers, "content-range": f"bytes */{place.size}"})
    headers["content-range"] = f"bytes {start}-{stop - 1}/{place.size}"
    return Response(served.media.read(entity, place, start, stop), 206, headers, kind)


def _range(wanted: str | None, size: int) -> tuple[int, int] | None:
    """Return [start, stop) of a Range header with one range; None where the whole file is to be sent."""
    unit, _, span = (wanted or "").partition("=")
    first, dash, last = span.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not all(part == "" or part.isdecimal() for part in (first, last)):
        return None
    if first == "":
        return (max(0, size - int(last)), size) if last else None
    return int(first), min(size, int(last) + 1) if last else size


def _page_routes(service: Service) -> APIRouter:
    """Return the routes of the page and of its session."""
    router = APIRouter(include_in_schema=False)
    folder = files("mocme_dist.serving") / "page"
    content = {item.name: item.read_bytes() for item in folder.iterdir() if item.name.rpartition(".")[2] in _PAGE_TYPES}

    def static(name: str) -> Response:
        if name not in content:
            raise HTTPException(404, "no such file")
        kind = _PAGE_TYPES[name.rpartition(".")[2]]
        return Response(content[name], media_type=kind, headers={"cache-control": "no-cache"})

    @router.get("/")
    async def index() -> Response:
        return static("index.html")

    @router.get("/docs")
    async def docs() -> Response:
        return static("docs.html")

    @router.get("/page/{name}")
    async def page(name: str) -> Response:
        return static(name)

    @router.post("/session")
    async def session() -> Response:
        """Give a browser that sent the token a cookie, because pictures cannot carry headers."""
        response = JSONResponse({"status": "ok"})
        if service.settings.token is not None:
            response.set_cookie(COOKIE, cookie_of(service.settings.token), httponly=True, samesite="strict")
        return response

    return router
