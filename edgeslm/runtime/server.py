"""`edgeslm serve`: one model behind HTTP, in the words of OpenAI's API.

Reading a request happens beside the event loop in one thread, computing in another (jobs.py): the loop only
moves bytes.  starlette and uvicorn are the extra `serve`, loaded when a server starts.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.runtime import openapi
from edgeslm.runtime.endpoints import HANDLERS
from edgeslm.runtime.http_io import check_host, check_key
from edgeslm.runtime.metrics import CONTENT_TYPE
from edgeslm.runtime.openai_api import ApiError, check_model
from edgeslm.runtime.service import stopping

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

    from edgeslm.runtime.http_io import Asgi, Message, Receive, Send
    from edgeslm.runtime.service import Service

OPEN_PATHS = ("/", "/healthz", "/openapi.json")
"""What needs no key: nothing of it tells or does anything with the model."""
PAGE = Path(__file__).with_name("page.html")


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        check_model({"model": request.path_params["model"]}, service.name)
        return JSONResponse(_model(service))

    async def healthz(_request: Request) -> Response:
        if service.worker.stopping:
            raise stopping()
        return JSONResponse({"status": "ok", "model": service.name})

    async def metrics(_request: Request) -> Response:
        return Response(_metrics(service), media_type=CONTENT_TYPE)

    async def description(_request: Request) -> Response:
        return JSONResponse(openapi.document(service.name, service.version, keyed=bool(service.keys)))

    page, headers = read_page()

    async def root(_request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    async def failed(_request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        if not isinstance(error, ApiError):
            error = ApiError(500, "the server failed; its log says more", kind="server_error")
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    async def post(request: Request) -> Any:
        return await HANDLERS[request.url.path](service, request)

    gets = {"/": root, "/v1/models": models, "/v1/models/{model:path}": model, "/healthz": healthz,
            "/metrics": metrics, "/openapi.json": description}  # fmt: skip
    routes = [Route(path, endpoint) for path, endpoint in gets.items()]
    routes += [Route(path, post, methods=["POST"]) for path in openapi.POSTS]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={ApiError: failed, HTTPException: failed, Exception: failed},
    )


class Gate:
    """Before every request: who asks, and by which name; after it: what it came to."""

    def __init__(self, app: Asgi, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, start, path = self._service, time.perf_counter(), scope["path"]
        known = path if path in openapi.POSTS or path in openapi.GETS or path in OPEN_PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                service.metrics.count("requests_total", path=known, status=str(message["status"]))
            await send(message)

        headers = Headers(scope=scope)
        try:
            if service.keys and path not in OPEN_PATHS:
                check_key(headers.get("authorization"), service.keys)
            if not service.keys and service.hosts:
                check_host(headers.get("host"), service.hosts)
        except ApiError as error:
            await JSONResponse(error.body, status_code=error.status, headers=error.headers)(
                scope, receive, counted
            )
            return
        await self._app(scope, receive, counted)
        if path in openapi.POSTS:
            service.metrics.observe("request_seconds", time.perf_counter() - start, path=path)


def _model(service: Service) -> dict[str, Any]:
    held: dict[str, Any] = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "edgeslm",
    }
    if service.answerer is not None:
        facts, options = service.answerer.runner.facts, service.answerer.runner.options
        return held | {
            "task": "causal-lm", "context_length": options.context, "chat": facts.chat_template is not None,
            "max_prompt_tokens": service.answerer.prompt_limit, "parameters": facts.parameters,
            "embedding_size": embedder.embedding_size if (embedder := service.answerer.embedder) else None,
        }  # fmt: skip
    assert service.classifier is not None
    return held | {
        "task": f"{service.classifier.kind}-classification",
        "labels": list(service.classifier.labels),
    }


def _metrics(service: Service) -> str:
    import psutil

    gauges = {
        "queue_waiting": service.worker.waiting,
        "running": service.worker.running,
        "resident_bytes": psutil.Process().memory_info().rss,
    }
    return service.metrics.text(gauges, model=service.name, version=service.version)


def read_page() -> tuple[str, dict[str, str]]:
    """The page, and headers by which a browser runs exactly the script and style in it, and asks only here."""
    page = PAGE.read_text(encoding="utf-8")
    allowed = []
    for kind in ("script", "style"):
        inside = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
        allowed.append(" ".join([f"{kind}-src", *(f"'sha256-{digest}'" for digest in digests)]))
    policy = (
        f"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; {'; '.join(allowed)}"
    )
    return page, {
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
