"""HTTP with limits, on ASGI: bodies that are read as they come and no further, events sent as they happen.

Who may ask is decided here too: by the API key, and where there is none by the name in the Host header.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.runtime.openai_api import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
    from pathlib import Path

    from edgeslm.runtime.jobs import Job, Worker

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

BODY_TIMEOUT_S = 30.0
"""For the whole body of a request."""
SEND_TIMEOUT_S = 60.0
"""For a client to take one event; it is left alone after that."""
DRAIN_S = 5.0
"""How long the rest of a body that is too large is read away, so that the client sees why."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_DEEP = "the body is nested too deeply"


def read_keys(path: Path) -> frozenset[bytes]:
    """Digests of the keys of a file, one a line; blank lines and those with # are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the API keys can't be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise DataError(f"{path} holds no API key", hint="write one key a line")
    return frozenset(_digest(key.encode()) for key in keys)


def check_key(header: str | None, keys: Collection[bytes]) -> None:
    """Raise ApiError unless an Authorization header bears one of the keys; in constant time."""
    scheme, _, key = (header or "").partition(" ")
    given = _digest(key.strip().encode("utf-8", errors="replace"))
    right = [hmac.compare_digest(given, known) for known in keys]
    if scheme.lower() != "bearer" or not any(right):
        raise ApiError(
            401, "the API key is missing or wrong: send  Authorization: Bearer KEY",
            kind="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def check_host(header: str | None, names: Collection[str]) -> None:
    """Raise ApiError for a Host that is not this machine: a page of another name may not ask (DNS rebinding)."""
    host = (header or "").strip().lower()
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name not in names:
        raise ApiError(
            403, f"the Host {host[:80]!r} is not this machine; with an API key any name will do",
            kind="permission_error",
        )  # fmt: skip


async def read_json(headers: Any, receive: Receive, limit: int) -> Any:
    """The body of a request as JSON.  Raises ApiError 400, 408, 413 or 415; never holds more than `limit`."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a foreign page can't send without asking first
        raise ApiError(415, f"the content type is {kind[:80]!r}, not application/json")
    length = headers.get("content-length", "0")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            more = not (length.isdecimal() and int(length[:20]) > limit)
            too_large = not more
            while more and not too_large:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before the end of its request")
                body += message.get("body", b"")
                more, too_large = message.get("more_body", False), len(body) > limit
    except TimeoutError:
        raise ApiError(408, "the body came too slowly", headers={"Connection": "close"}) from None
    if too_large:
        body.clear()
        if headers.get("expect", "").lower() != "100-continue":
            await _drain(receive)
        raise ApiError(
            413, f"the body is larger than {limit} bytes", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
    return parse_json(bytes(body))


def parse_json(data: bytes) -> Any:
    """JSON as the RFC has it.  Raises ApiError for NaN and infinity, which Python would take, and the rest."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, _DEEP) from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None


async def _drain(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


@asynccontextmanager
async def watching(worker: Worker, job: Job, receive: Receive) -> AsyncIterator[None]:
    """Take the job back when its client leaves, and whenever this ends before the job."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        worker.withdraw(job, "client")

    watcher = asyncio.create_task(until_gone())
    try:
        yield
    finally:
        watcher.cancel()
        worker.withdraw(job, "client")
        with suppress(asyncio.CancelledError, Exception):
            await watcher


class EventStream:
    """An answer of server-sent events; documents are sent as JSON, texts as they are."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self._events = events

    async def __call__(self, _scope: Message, _receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self._events:
                text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                # Half a surrogate pair, which no UTF-8 can say, never is in text from bytes.
                data = f"data: {text}\n\n".encode("utf-8", errors="replace")
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # nobody reads: the connection is closed without an end
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
