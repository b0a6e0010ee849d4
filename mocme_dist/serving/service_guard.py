"""What every request to the service passes first: host, origin, token, size of the body.

And the headers of every answer. It is counted and measured for Prometheus: in memory, or by replicas of Ray Serve in
files of one folder, which whichever is asked adds up.

An ASGI middleware of its own, so that a refused request costs nothing more. A web page of somebody else that
resolves its own name to the loopback address (DNS rebinding) fails at the host, a form of another site at the origin.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.exceptions import HTTPException

from mocme_dist import environment
from mocme_dist.errors import ConfigError

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

COOKIE = "mocme_token"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIN_TOKEN = 16
MAX_BODY_BYTES = 1 << 20  # of every request but an upload
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    return host in LOOPBACK or host.startswith("127.")


def read_token(file: str | None) -> str | None:
    """Return the token of a file, else that of the environment variable MOCME_SERVE_TOKEN, else None.

    Raises:
        ConfigError: the file cannot be read, others may read it, or the token is too short.
    """
    where, token = environment.SERVICE_TOKEN, environment.service_token()
    if file is not None:
        where = f"--token-file {file}"
        try:
            mode = Path(file).stat().st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"{where}: has mode {mode & 0o777:04o}, expected 0600; chmod 600 {file}")
            token = Path(file).read_text(encoding="utf8").strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: is not UTF-8 text; expected one line with the token") from None
    if token is None:
        return None
    if len(token) < MIN_TOKEN or not token.isascii() or any(letter.isspace() for letter in token):
        raise ConfigError(
            f"{where}: a token of {len(token)} characters, expected {MIN_TOKEN} or more ASCII characters without"
            " spaces; make one with: openssl rand -hex 32"
        )
    return token


def cookie_of(token: str) -> str:
    """Return the value of the cookie that stands for a token."""
    return hashlib.sha256(f"mocme_dist:{token}".encode()).hexdigest()


class Guard:
    """ASGI middleware that refuses what must not reach the service.

    Args:
        app: the service.
        token: required for everything but the page's own files and /health; None asks for none.
        loopback: the server listens on loopback only, so the Host header must name it.
        upload_bytes: limit of a body sent to /new.
    """

    def __init__(self, app: App, token: str | None, loopback: bool, upload_bytes: int) -> None:
        self.app, self.token, self.loopback, self.upload_bytes = app, token, loopback, upload_bytes

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {key.lower() for key, _ in message.get("headers", [])}
                added = [pair for pair in HEADERS if pair[0] not in own]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        if refusal := self._refusal(scope, headers):
            await _refuse(answer, *refusal)
            return
        limit = self.upload_bytes if scope["path"].rstrip("/") == "/new" else MAX_BODY_BYTES
        claimed = headers.get("content-length", "0")
        if not claimed.isdecimal() or int(claimed) > limit:
            await _refuse(answer, 413, f"the request has {claimed} bytes, limit {limit:,}")
            return
        await self.app(scope, _bounded(receive, limit), answer)

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and reason of a request that is refused, or None."""
        if not scope["query_string"].isascii():
            return 400, "the query has bytes that are not ASCII; escape them as %XX"
        host = _split(f"//{headers.get('host', '')}").hostname or ""
        if self.loopback and not is_loopback(host):
            return 403, f"the Host header names {host!r}, expected a loopback address; use http://127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != headers.get("host", ""):
            return 403, f"the request comes from a page of {origin}; expected one of this server"
        if self.token is None or _is_open(scope["path"]):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode()):
            return None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie is not None and hmac.compare_digest(cookie.value.encode(), cookie_of(self.token).encode()):
            return None
        return 401, "a token is required: Authorization: Bearer TOKEN"


def _split(url: str) -> SplitResult:
    """Return the parts of a URL, empty ones if it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_open(path: str) -> bool:
    """Return whether a path needs no token: the page's own files hold no data."""
    return path in ("/", "/health") or path.startswith("/page/")


class _TooLarge(HTTPException):
    """The body is longer than the limit; FastAPI passes an HTTPException on and would answer 400 to any other."""


def _bounded(receive: Any, limit: int) -> Any:
    """Return `receive` that counts the bytes of the body; a chunked body has no Content-Length."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message: Message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _TooLarge(413, f"the request has more than {limit:,} bytes")
        return message

    return counted


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# -- metrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of a process.

    Args:
        folder: shared by the replicas of a machine; None keeps them in memory.
    """

    def __init__(self, folder: str | None = None) -> None:
        if folder is not None:
            # read when prometheus_client is first imported
            environment.set_variables({"PROMETHEUS_MULTIPROC_DIR": folder})
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._folder = folder
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mocme_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "mocme_request_seconds",
            "Time from request to answer, by route.",
            ["route"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.batches = Histogram(
            "mocme_batch_questions", "Questions of one pass.", registry=self._registry, buckets=_SIZES
        )

    def text(self) -> tuple[bytes, str]:
        """Return the metrics and their media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, self._folder)
        return generate_latest(registry), CONTENT_TYPE_LATEST


class Measured:
    """ASGI middleware that counts requests and measures them.

    Args:
        app: the service.
        metrics: where they are counted.
        routes: first parts of the paths that are labels, as "/predict"; all else counts as "other".
    """

    def __init__(self, app: Any, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def seen(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            first = "/" + scope["path"].lstrip("/").partition("/")[0]
            route = first if first in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
