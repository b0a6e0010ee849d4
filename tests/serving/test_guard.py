"""Malformed requests are refused by the guard before anything else reads them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mocme_dist.serving.service_guard import Guard


def status(query: bytes = b"", host: bytes = b"127.0.0.1", origin: bytes | None = None) -> int:
    """Status of a request to a guarded application that answers 200."""
    sent: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host), *([(b"origin", origin)] if origin is not None else [])]
    scope = {"type": "http", "path": "/predict", "query_string": query, "headers": headers}
    asyncio.run(Guard(app, None, True, 1000)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "request_of, expected",
    [
        ({"query": b"head=a", "origin": b"http://127.0.0.1"}, 200),
        ({"query": b"head=\xc4\x28"}, 400),
        ({"host": b"["}, 403),
        ({"host": b"evil.example"}, 403),
        ({"origin": b"http://["}, 403),
        ({"origin": b"http://evil.example"}, 403),
        ({"origin": b"\xff"}, 403),
    ],
)
def test_a_malformed_request_is_refused(request_of, expected):
    assert status(**request_of) == expected
