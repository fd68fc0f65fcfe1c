"""One model behind HTTP: its worker, its limits, and how a request's job is queued, watched and counted."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeslm.errors import EdgeslmError, EngineError
from edgeslm.runtime import openapi
from edgeslm.runtime.answering import Summary
from edgeslm.runtime.http_io import LOOPBACK, read_json, watching
from edgeslm.runtime.jobs import BusyError, StoppingError, Worker
from edgeslm.runtime.metrics import Metrics
from edgeslm.runtime.openai_api import ApiError, Grammars, check_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.requests import Request

    from edgeslm.runtime.answering import Answerer
    from edgeslm.runtime.jobs import Job
    from edgeslm.runtime.ort import OrtClassifier

MAX_BODY_BYTES = 4 * 2**20


@dataclass(kw_only=True)
class Service:
    """One model and what its server allows; exactly one of answerer and classifier is there."""

    name: str
    answerer: Answerer | None = None
    classifier: OrtClassifier | None = None
    worker: Worker
    keys: frozenset[bytes] = frozenset()
    hosts: tuple[str, ...] = LOOPBACK
    """Names under which it may be asked where there is no key; empty: any."""
    max_body_bytes: int = MAX_BODY_BYTES
    version: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    grammars: Grammars = field(default_factory=Grammars)
    created: int = field(default_factory=lambda: int(time.time()))
    reading: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="edgeslm-reading")
    )

    async def body(self, request: Request, path: str) -> dict[str, Any]:
        """The checked body of a request."""
        body = await read_json(request.headers, request.receive, self.max_body_bytes)
        return check_request(body, openapi.POSTS[path][0])

    async def read(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function in the thread that reads requests."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.reading, lambda: function(*arguments, **options))

    def submit(self, work: Callable[[Callable[[], bool]], Iterator[Any]]) -> Job:
        """Queue a job.  Raises ApiError 429 or 503."""
        try:
            return self.worker.submit(work)
        except BusyError as error:
            self.metrics.count("rejected_total")
            raise ApiError(
                429, f"{error}: try again later", kind="rate_limit_error", code="queue_full",
                headers={"Retry-After": str(error.retry_after_s)},
            ) from error  # fmt: skip
        except StoppingError as error:
            raise stopping() from error

    async def events(self, request: Request, job: Job) -> AsyncIterator[Any]:
        """The events of a job, as long as its client is there.  Raises ApiError for what the engine raises."""
        try:
            async with watching(self.worker, job, request.receive):
                async for event in job.events():
                    if isinstance(event, Summary):
                        self._count(event)
                    yield event
        except StoppingError as error:
            raise stopping() from error
        except EdgeslmError as error:
            status = 500 if isinstance(error, EngineError) else 400
            raise ApiError.of(
                error, status, kind="server_error" if status == 500 else "invalid_request_error"
            ) from error
        finally:
            if job.ended_by == "client":
                self.metrics.count("cancelled_total")

    def _count(self, summary: Summary) -> None:
        self.metrics.count("prompt_tokens_total", summary.prompt_tokens)
        self.metrics.count("reused_tokens_total", summary.reused_tokens)
        self.metrics.count("generated_tokens_total", summary.tokens)
        if summary.ttft_s is not None:
            self.metrics.observe("time_to_first_token_seconds", summary.ttft_s)


def stopping() -> ApiError:
    """What a request is told that the end of the server cuts short."""
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")


def unable(what: str, way_out: str) -> ApiError:
    """What this model can't do at all."""
    return ApiError(501, f"{what} ({way_out})", kind="not_supported_error", code="not_supported")
