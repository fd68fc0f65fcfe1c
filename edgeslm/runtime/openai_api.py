"""OpenAI's API as data: requests into questions, answers into the documents and chunks that its clients read.

https://platform.openai.com/docs/api-reference/chat, /completions and /embeddings.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError, EdgeslmError
from edgeslm.runtime.answering import Question, any_seed
from edgeslm.runtime.gbnf import read_gbnf
from edgeslm.runtime.json_grammar import any_object, read_schema
from edgeslm.runtime.openapi import fault
from edgeslm.runtime.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeslm.runtime.answering import Answerer, Piece, Summary
    from edgeslm.runtime.grammar import Grammar
    from edgeslm.runtime.steering import Score

    Document = dict[str, Any]

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
FINISH = {"interrupted": "stop"}
"""What OpenAI's clients don't know, in words that they do."""


class ApiError(Exception):
    """An answer other than 200; message, kind, param and code as OpenAI's errors have them."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: EdgeslmError, status: int = 400, **more: Any) -> ApiError:
        """What an error meant for the user is to a client."""
        return cls(status, str(error), **more)


def check_request(body: Any, schema: Mapping[str, Any]) -> Document:
    """A request that its schema allows, without what is null in it.  Raises ApiError."""
    if found := fault(body, schema):
        where, words = found
        raise ApiError(400, f"{where or 'the body'} {words}", param=where or None)
    return {name: value for name, value in body.items() if value is not None}


def check_model(body: Mapping[str, Any], name: str) -> None:
    """Raise ApiError for a request that names another model than the one there is."""
    if body.get("model", name) != name:
        raise ApiError(
            404, f"there is no model {str(body['model'])[:80]!r} here: {name!r} is served, or leave it out",
            param="model", code="model_not_found",
        )  # fmt: skip


def question(body: Document, answerer: Answerer, *, is_chat: bool, grammars: Grammars) -> Question:
    """What a checked request asks.  Raises ApiError for a prompt or grammar that can't be used."""
    param = "messages" if is_chat else "prompt"
    try:
        tokens = answerer.chat_tokens(messages(body)) if is_chat else _prompt_tokens(body["prompt"], answerer)
        answerer.check(tokens)
    except EdgeslmError as error:
        raise ApiError.of(error, param=param) from error
    _check_length(tokens, answerer, "the prompt", param)
    wanted = body.get("max_completion_tokens", body.get("max_tokens"))
    stop = body.get("stop", ())
    numbers = {name: type(getattr(Sampling(), name))(body[name]) for name in SAMPLING_FIELDS if name in body}
    seed = int(body["seed"]) % 2**63 if "seed" in body else any_seed()
    room = (answerer.runner.options.context or 0) - len(tokens) + 1
    return Question(
        tokens=tokens,
        sampling=Sampling(**numbers, seed=seed),
        max_tokens=room if wanted is None else min(room, int(wanted)),
        stop=[stop] if isinstance(stop, str) else stop,
        grammar=grammars.of(body),
        scored=_scored(body, is_chat),
    )


def embedding_inputs(body: Document, answerer: Answerer, size: int) -> list[list[int]]:
    """Tokens of each text that a checked request wants a vector of `size` numbers of.  Raises ApiError."""
    if body.get("dimensions", size) != size:
        raise ApiError(
            400,
            f"dimensions is {body['dimensions']:.0f}, the model's vectors have {size}",
            param="dimensions",
        )
    given = body["input"]
    is_one = isinstance(given, str) or not isinstance(given[0], str | list)
    found = []
    for number, one in enumerate([given] if is_one else given):
        param = "input" if is_one else f"input[{number}]"
        try:
            tokens = answerer.text_tokens(one) if isinstance(one, str) else [int(token) for token in one]
            answerer.check(tokens)
        except EdgeslmError as error:
            raise ApiError.of(error, param=param) from error
        _check_length(tokens, answerer, param, param)
        found.append(tokens)
    return found


def _check_length(tokens: Sequence[int], answerer: Answerer, what: str, param: str) -> None:
    if len(tokens) > answerer.prompt_limit:
        raise ApiError(
            400, f"{what} has {len(tokens)} tokens, the limit is {answerer.prompt_limit}",
            param=param, code="context_length_exceeded",
        )  # fmt: skip


def messages(body: Document) -> list[dict[str, str]]:
    """The conversation as templates want it: texts only, and system for what OpenAI now calls developer."""
    return [
        {
            "role": "system" if one["role"] == "developer" else one["role"],
            "content": one["content"]
            if isinstance(one["content"], str)
            else "".join(part["text"] for part in one["content"]),
        }
        for one in body["messages"]
    ]


def _prompt_tokens(prompt: Any, answerer: Answerer) -> list[int]:
    if isinstance(prompt, list) and not isinstance(prompt[0], str):
        return [int(token) for token in prompt]
    return answerer.text_tokens(prompt if isinstance(prompt, str) else prompt[0])


def _scored(body: Document, is_chat: bool) -> int | None:
    if not is_chat:
        return int(body["logprobs"]) if "logprobs" in body else None
    if "top_logprobs" in body and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return int(body.get("top_logprobs", 0)) if body.get("logprobs") else None


class Grammars:
    """The newest grammars, since programs ask for the same ones again and again; for one thread."""

    def __init__(self, kept: int = 8) -> None:
        self._kept = kept
        self._known: dict[str, Grammar] = {}

    def of(self, body: Document) -> Grammar | None:
        """The grammar that a request asks for.  Raises ApiError for one that can't be used."""
        form = body.get("response_format", {"type": "text"})
        if "grammar" in body and form["type"] != "text":
            raise ApiError(400, "grammar and response_format exclude each other", param="grammar")
        if "grammar" in body:
            return self._get("grammar", body["grammar"], lambda: read_gbnf(body["grammar"]))
        if form["type"] == "json_schema":
            schema = form["json_schema"]["schema"]
            return self._get("response_format", repr(schema), lambda: read_schema(schema))
        return self._get("response_format", "", any_object) if form["type"] == "json_object" else None

    def _get(self, param: str, text: str, make: Callable[[], Grammar]) -> Grammar:
        key = f"{param}:{text}"
        try:
            grammar = self._known.pop(key, None) or make()
        except DataError as error:
            raise ApiError.of(error, param=param) from error
        except RecursionError:
            raise ApiError(400, "the schema is nested too deeply", param=param) from None
        self._known[key] = grammar
        if len(self._known) > self._kept:
            del self._known[next(iter(self._known))]
        return grammar


# --- answers ---


@dataclass
class Reply:
    """One answer in the words of one of the two APIs."""

    is_chat: bool
    identifier: str
    created: int
    """Seconds since 1970."""
    model: str
    token_text: Callable[[int], bytes]
    scored: int | None = None
    _offset: int = 0
    _chosen: list[Score] = field(default_factory=list)

    def whole(self, text: str, scores: Sequence[Score], summary: Summary) -> Document:
        """The answer in one document."""
        finish = FINISH.get(summary.finish_reason, summary.finish_reason)
        choice: Document = {"index": 0, "finish_reason": finish, "logprobs": self._logprobs(scores)}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head(""), "choices": [choice], "usage": usage(summary)}

    def first(self) -> list[Document]:
        """The chunks before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.is_chat else []

    def piece(self, piece: Piece) -> Document:
        """The chunk of some text."""
        delta = {"content": piece.text} if self.is_chat else piece.text
        return self._chunk(delta, logprobs=self._logprobs(piece.scores))

    def last(self, summary: Summary) -> Document:
        """The chunk that says why it ended."""
        finish = FINISH.get(summary.finish_reason, summary.finish_reason)
        return self._chunk({} if self.is_chat else "", finish=finish)

    def usage(self, summary: Summary) -> Document:
        """The chunk with the numbers of tokens, for those who asked for it."""
        return {**self._head(".chunk"), "choices": [], "usage": usage(summary)}

    def _chunk(self, delta: Any, *, finish: str | None = None, logprobs: Document | None = None) -> Document:
        name = "delta" if self.is_chat else "text"
        choice = {"index": 0, name: delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(".chunk"), "choices": [choice]}

    def _head(self, suffix: str) -> Document:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {"id": self.identifier, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, scores: Sequence[Score]) -> Document | None:
        if self.scored is None:
            return None
        if self.is_chat:
            return {"content": [self._chat_score(score) for score in scores], "refusal": None}
        tokens = [self._text(score.token) for score in scores]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._text(token): value for token, value in score.top} for score in scores],
            "text_offset": offsets,
        }

    def _chat_score(self, score: Score) -> Document:
        chosen = self._one_score(score.token, score.logprob)
        return {**chosen, "top_logprobs": [self._one_score(*each) for each in score.top]}

    def _one_score(self, token: int, logprob: float) -> Document:
        data = self.token_text(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _text(self, token: int) -> str:
        return self.token_text(token).decode(errors="replace")


def embeddings(vectors: Sequence[NDArray[np.float32]], body: Document, model: str, tokens: int) -> Document:
    """Vectors of `tokens` tokens in one document, as numbers or as base64 of little-endian floats."""
    encoded = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if encoded
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def usage(summary: Summary) -> Document:
    """Numbers of tokens as OpenAI counts them."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.tokens,
        "total_tokens": summary.prompt_tokens + summary.tokens,
        "prompt_tokens_details": {"cached_tokens": summary.reused_tokens},
    }
