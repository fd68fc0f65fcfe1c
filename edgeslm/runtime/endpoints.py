"""What each path of the server does: answers of a language model, whole or streamed, and classes."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from edgeslm.runtime.answering import Piece, Summary
from edgeslm.runtime.http_io import EventStream
from edgeslm.runtime.openai_api import (
    ApiError,
    Reply,
    check_model,
    embedding_inputs,
    embeddings,
    question,
)
from edgeslm.runtime.service import stopping, unable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.requests import Request

    from edgeslm.runtime.answering import Question
    from edgeslm.runtime.jobs import Job
    from edgeslm.runtime.ort import OrtClassifier
    from edgeslm.runtime.service import Service

# --- language models ---


async def _generate(service: Service, request: Request, path: str) -> Any:
    from starlette.responses import JSONResponse

    body = await service.body(request, path)
    answerer = service.answerer
    if answerer is None:
        raise unable(f"{service.name} generates no text: it is a classifier", "use /classify or /predict")
    check_model(body, service.name)
    is_chat = path == "/v1/chat/completions"
    asked: Question = await service.read(question, body, answerer, is_chat=is_chat, grammars=service.grammars)
    job = service.submit(lambda interrupted: answerer.answer(asked, interrupted))
    reply = Reply(
        is_chat=is_chat,
        identifier=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=service.name,
        token_text=lambda token: answerer.runner.token_bytes(token, special=True),
        scored=asked.scored,
    )
    events = service.events(request, job)
    if body.get("stream"):
        # The first event decides between a stream and an error with a status of its own.
        first = await anext(events, None)
        wants_usage = bool(body.get("stream_options", {}).get("include_usage"))
        return EventStream(_chunks(first, events, job, reply, wants_usage))
    pieces: list[Piece] = []
    summary: Summary | None = None
    async for event in events:
        if isinstance(event, Summary):
            summary = event
        else:
            pieces.append(event)
    if summary is None or job.ended_by == "client":
        raise ApiError(499, "the client left")
    if _is_cut(job, summary):
        raise stopping()
    scores = [score for piece in pieces for score in piece.scores]
    return JSONResponse(reply.whole("".join(piece.text for piece in pieces), scores, summary))


def _is_cut(job: Job, summary: Summary) -> bool:
    """Whether the end of the server ended an answer."""
    return job.ended_by == "shutdown" and summary.finish_reason == "interrupted"


async def _chunks(
    first: Any, events: AsyncIterator[Any], job: Job, reply: Reply, wants_usage: bool
) -> AsyncIterator[Any]:
    """The chunks of a stream, from its first event on."""

    async def all_events() -> AsyncIterator[Any]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    try:
        for chunk in reply.first():
            yield chunk
        async for event in all_events():
            if not isinstance(event, Summary):
                yield reply.piece(event)
                continue
            if _is_cut(job, event):
                raise stopping()
            yield reply.last(event)
            if wants_usage:
                yield reply.usage(event)
            yield "[DONE]"
    except ApiError as error:
        yield error.body
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _chat(service: Service, request: Request) -> Any:
    return await _generate(service, request, "/v1/chat/completions")


async def _complete(service: Service, request: Request) -> Any:
    return await _generate(service, request, "/v1/completions")


async def _embed(service: Service, request: Request) -> Any:
    """Vectors of texts, computed one after the other in one job."""
    from starlette.responses import JSONResponse

    body = await service.body(request, "/v1/embeddings")
    check_model(body, service.name)
    answerer = service.answerer
    embedder = None if answerer is None else answerer.embedder
    if answerer is None or embedder is None:
        raise unable(
            f"{service.name} gives no hidden states to make embeddings of",
            "a language model in the format gguf does",
        )
    inputs = await service.read(embedding_inputs, body, answerer, embedder.embedding_size)

    def work(interrupted: Callable[[], bool]) -> Iterator[Any]:
        for tokens in inputs:
            vector = embedder.embed(tokens, interrupted)
            if vector is None:
                return
            yield vector

    job = service.submit(work)
    vectors = [one async for one in service.events(request, job)]
    if len(vectors) < len(inputs):
        raise stopping() if job.ended_by == "shutdown" else ApiError(499, "the client left")
    count = sum(map(len, inputs))
    service.metrics.count("prompt_tokens_total", count)
    return JSONResponse(embeddings(vectors, body, service.name, count))


# --- classifiers ---


async def _classify(service: Service, request: Request) -> Any:
    texts = (await service.body(request, "/classify"))["input"]
    classifier = _classifier(service, "text", "texts")
    texts = [texts] if isinstance(texts, str) else texts
    return await _classes(service, request, len(texts), lambda: classifier.predict_texts(texts))


async def _predict(service: Service, request: Request) -> Any:
    windows = (await service.body(request, "/predict"))["windows"]
    classifier = _classifier(service, "sensors", "sensor readings")
    rows, columns = classifier.preprocessing["rows"], len(classifier.preprocessing["channels"])
    for number, window in enumerate(windows):
        if len(window) != rows or any(len(row) != columns for row in window):
            raise ApiError(
                400, f"windows[{number}] is not {rows} rows of {columns} channels "
                f"({', '.join(classifier.preprocessing['channels'])})", param="windows",
            )  # fmt: skip
    readings = [
        [[float("nan") if one is None else one for one in row] for row in window] for window in windows
    ]
    return await _classes(service, request, len(windows), lambda: classifier.predict_readings(readings))


def _classifier(service: Service, kind: str, words: str) -> OrtClassifier:
    if service.classifier is None or service.classifier.kind != kind:
        raise unable(f"{service.name} does not classify {words}", "GET /v1/models tells its task")
    return service.classifier


async def _classes(service: Service, request: Request, count: int, compute: Callable[[], Any]) -> Any:
    """Posteriors under the bundle's base rates, and its decisions."""
    from starlette.responses import JSONResponse

    classifier = service.classifier
    assert classifier is not None
    decision = classifier.decision

    def work(_interrupted: Callable[[], bool]) -> Iterator[Any]:
        posterior = decision.posterior(compute())
        yield posterior, decision.choose(posterior)

    found = [one async for one in service.events(request, service.submit(work))]
    if not found:
        raise ApiError(499, "the client left")
    service.metrics.count("examples_total", count)
    results = [
        {
            "label": classifier.labels[label],
            "probability": float(row[label]),
            "probabilities": dict(zip(classifier.labels, map(float, row), strict=True)),
        }
        for row, label in zip(*found[0], strict=True)
    ]
    return JSONResponse({"model": service.name, "results": results})


HANDLERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _complete,
    "/v1/embeddings": _embed,
    "/classify": _classify,
    "/predict": _predict,
}
