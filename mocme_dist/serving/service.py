"""The endpoint: a FastAPI application over one or more open bundles, and the page that asks it.

The same application runs in one process under uvicorn and in each replica of Ray Serve. It opens nothing that a client
names, and everything that it answers with comes from the bundles and the data set that it was started with.

Concurrent questions are answered together, and nobody waits for a batch to fill: a question that finds the worker idle
is answered at once, and one pass over the vectors answers all that have come meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mocme_dist import __version__
from mocme_dist.errors import ConfigError, DataError, MocmeError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.predict import Question
from mocme_dist.serving.service_answers import AskedAs, ServedBundle
from mocme_dist.serving.service_guard import Guard, Measured, Metrics
from mocme_dist.serving.service_media import open_media
from mocme_dist.serving.service_new import NewEntities
from mocme_dist.serving.service_routes import ROUTES, Asking, as_json, routers

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServiceSettings:
    """Settings that a service is started with; replicas get a copy.

    Attributes:
        places: folder or URL of each bundle by name; the first answers where a request names none.
        data: packed data set of the bundles, or None.
        token: what requests must carry, or None.
        loopback: the server listens on loopback only.
        max_batch: questions of one pass over the vectors.
        trust_encoders: encoders of a bundle may import code.
        metrics_dir: folder in which replicas share their counters; None in one process.
    """

    places: dict[str, str]
    data: str | None = None
    token: str | None = None
    loopback: bool = True
    max_batch: int = 32
    trust_encoders: bool = False
    metrics_dir: str | None = None


class Overloaded(Exception):
    """More questions wait than the service keeps."""


class Batcher(Generic[Item, Result]):
    """Answers items in batches in one thread.

    Args:
        answer: takes the key and the items of a batch and returns their results in order; runs in the thread.
        max_batch: items of a batch.
        max_waiting: items that wait; one more is refused.
    """

    def __init__(
        self,
        answer: Callable[[Any, Sequence[Item]], Sequence[Result]],
        max_batch: int = 32,
        max_waiting: int = 256,
    ) -> None:
        self._answer, self.max_batch, self.max_waiting = answer, max_batch, max_waiting
        self._waiting: deque[tuple[Hashable, Item, asyncio.Future[Result]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scan")
        self._running: asyncio.Task[None] | None = None

    async def ask(self, key: Hashable, item: Item) -> Result:
        """Return the result of one item; items of equal `key` may share a batch.

        Raises:
            Overloaded: too many items wait.
        """
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((key, item, future))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._drain(loop))
        return await future

    async def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            key = self._waiting[0][0]
            batch: list[tuple[Item, asyncio.Future[Result]]] = []
            others: list[tuple[Hashable, Item, asyncio.Future[Result]]] = []
            while self._waiting and len(batch) < self.max_batch:
                own_key, item, future = self._waiting.popleft()
                if future.done():
                    continue  # its client has gone
                if own_key == key:
                    batch.append((item, future))
                else:
                    others.append((own_key, item, future))
            self._waiting.extendleft(reversed(others))
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self._answer, key, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Service:
    """Open bundles, the threads that work on them, and the routes.

    Args:
        settings: see `ServiceSettings`.

    Raises:
        DataError: a bundle or the data set cannot be opened.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        opened = {name: Bundle.open(place) for name, place in settings.places.items()}
        media = open_media(opened, settings.data) if settings.data is not None else {}
        self.bundles = {name: ServedBundle(name, bundle, media.get(name)) for name, bundle in opened.items()}
        self.new = {name: NewEntities(served, settings.trust_encoders) for name, served in self.bundles.items()}
        self.metrics = Metrics(settings.metrics_dir)
        self._batchers = {
            name: Batcher(self._answering(served), settings.max_batch) for name, served in self.bundles.items()
        }
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._light = ThreadPoolExecutor(2, thread_name_prefix="look-up")

    def warm(self) -> None:
        """Answer one question of each bundle, so that the first client does not wait for what is made once."""
        for served in self.bundles.values():
            relation = served.relations()[:1]
            if not relation:
                continue
            [name] = served.bundle.entities.take(served.bundle.known.targets[:1])
            served.describe(served.entity_id(name))
            served.relation_id(relation[0]["relation"]["id"])
            for known in ("known", "none"):
                served.answer(AskedAs(10, known), [Question(name, relation[0]["relation"]["id"], None)])
            served.search(name[:2], 5)
            served.featured(12)

    def _answering(self, served: ServedBundle) -> Callable[[Any, Any], Any]:
        def answer(key: Any, questions: Any) -> Any:
            self.metrics.batches.observe(len(questions))
            return served.answer(key, questions)

        return answer

    def served(self, name: str | None) -> ServedBundle:
        """Return a bundle by name.

        Raises:
            HTTPException: 404.
        """
        if name is None:
            return next(iter(self.bundles.values()))
        if name not in self.bundles:
            raise HTTPException(404, f"bundle {name!r}: not served here; served are {', '.join(self.bundles)}")
        return self.bundles[name]

    async def look_up(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what takes milliseconds in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._light, function, *args)

    async def work(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run what takes long, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, function, *args)

    async def predict(self, served: ServedBundle, asking: Asking, asked_as: AskedAs) -> dict[str, Any]:
        """Return the answers to one question.

        Raises:
            ConfigError: a name is unknown or both sides are missing. Overloaded: too many questions wait.
        """
        if asking.head is None and asking.tail is None:
            raise HTTPException(400, "neither head nor tail is given; a question needs one of them")
        given = {side: name for side, name in (("head", asking.head), ("tail", asking.tail)) if name is not None}
        ids = {side: served.entity_id(name) for side, name in given.items()}
        relation = served.relation(served.relation_id(asking.relation))
        about = {side: served.entity(number) for side, number in ids.items()}
        question = Question(
            about["head"]["id"] if "head" in about else None,
            relation["id"],
            about["tail"]["id"] if "tail" in about else None,
        )
        answers = await self._batchers[served.name].ask(asked_as, question)
        return {
            "bundle": served.name,
            "head": about.get("head"),
            "relation": relation,
            "tail": about.get("tail"),
            "answers": answers,
        }

    def close(self) -> None:
        """End the threads."""
        for batcher in self._batchers.values():
            batcher.close()
        self._slow.shutdown(wait=False, cancel_futures=True)
        self._light.shutdown(wait=False, cancel_futures=True)


def make_app(settings: ServiceSettings) -> Any:
    """Return the ASGI application, its bundles open and warm.

    Raises:
        DataError: a bundle or the data set cannot be opened.
    """
    service = Service(settings)
    service.warm()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="mocme_dist",
        version=__version__,
        summary="Ranked answers, reasons and facts of multi-modal knowledge graphs.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    for router in routers(service):
        app.include_router(router)
    _add_errors(app)
    # One file of the limit of extraction, and a megabyte for the rest of the form.
    upload = max(new.max_member_bytes for new in service.new.values()) + (1 << 20)
    return Measured(Guard(app, settings.token, settings.loopback, upload), service.metrics, ROUTES)


def _add_errors(app: FastAPI) -> None:
    """Answer every failure with one line of JSON."""

    async def refused(_: Request, error: Exception) -> Response:
        return as_json({"error": str(getattr(error, "detail", error))}, getattr(error, "status_code", 500))

    async def mistaken(_: Request, error: Exception) -> Response:
        status = 404 if isinstance(error, ConfigError) else 500
        return as_json({"error": str(error)}, status)

    async def broken(_: Request, error: Exception) -> Response:
        return as_json({"error": f"internal: {type(error).__name__}; see the log of the server"}, 500)

    async def busy(_: Request, error: Exception) -> Response:
        response = as_json({"error": "too many questions wait; ask again in a second"}, 503)
        response.headers["retry-after"] = "1"
        return response

    async def malformed(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("query", "body", "path"))
        return as_json({"error": f"{where}: {first['msg']}"}, 422)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(MocmeError, mistaken)
    app.add_exception_handler(Overloaded, busy)
    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(RequestValidationError, malformed)


def serve_in_process(settings: ServiceSettings, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Serve in this process until SIGINT or SIGTERM.

    Args:
        ready: called with the port once connections are accepted; 0 in `port` takes a free one.

    Raises:
        ConfigError: the address cannot be listened on. DataError: see `make_app`.
    """
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        app = make_app(settings)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, backlog=512
        )
        server = uvicorn.Server(config)
        started = time.monotonic()

        async def run() -> None:
            serving = asyncio.create_task(server.serve([listener]))
            while not server.started and not serving.done() and time.monotonic() < started + 60:
                await asyncio.sleep(0.01)
            if server.started:
                ready(listener.getsockname()[1])
            await serving

        with suppress(KeyboardInterrupt):  # uvicorn has ended in order, and raises the signal again
            asyncio.run(run())
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}") from None
    finally:
        listener.close()


__all__ = ["DataError", "Service", "ServiceSettings", "make_app", "serve_in_process"]
