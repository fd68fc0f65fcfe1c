"""Embeddings: the hidden states of the model itself, however the text is cut up, and OpenAI's words for them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import EngineError
from edgeslm.gguf_file import read_gguf
from edgeslm.runtime import llama_embedding
from edgeslm.runtime.llama import LlamaRunner
from edgeslm.runtime.llama_embedding import CHUNK, SMALLEST, Pooling, read_pooling
from edgeslm.runtime.runner import Embedder, RunnerOptions
from tests.conftest import write_tiny_gguf
from tests.runtime.fakes import FakeRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 265, 3 * CHUNK + 17)]
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, len(TOKENS))


def open_llama(path: Path, **changes: Any) -> LlamaRunner:
    pytest.importorskip("llama_cpp")
    return LlamaRunner(path, RunnerOptions(**{"threads": 1, "context": 256, **changes}))


def head_of(path: Path) -> NDArray[np.float32]:
    """[V, E] the matrix that makes logits of hidden states."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    return np.asarray(tensors["token_embd.weight"].data)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- the vectors ---


def test_a_vector_is_the_mean_of_all_hidden_states(tiny_gguf: Path) -> None:
    """The oracle: the head is linear, so it makes the mean of all logits out of the mean of all states."""
    runner, head = open_llama(tiny_gguf), head_of(tiny_gguf)
    assert isinstance(runner, Embedder)
    assert runner.embedding_size == 64
    for length in LENGTHS:
        vector = runner.embed(TOKENS[:length])
        assert vector is not None
        assert vector.shape == (64,)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert cosine(head @ vector, runner.logits(TOKENS[:length]).mean(axis=0)) > 1 - 1e-4
    runner.close()


@pytest.mark.parametrize(("declared", "place"), [(2, 0), (3, -1)])
def test_a_model_declares_its_pooling(tmp_path: Path, declared: int, place: int) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", pooling=declared)
    runner, head = open_llama(path), head_of(path)
    for length in LENGTHS:
        vector = runner.embed(TOKENS[:length])
        assert vector is not None
        assert cosine(head @ vector, runner.logits(TOKENS[:length])[place]) > 1 - 1e-4
    runner.close()


def test_what_a_file_may_declare(tmp_path: Path) -> None:
    for declared, kind in ((None, "mean"), (0, "mean"), (1, "mean"), (2, "first"), (3, "last")):
        file = read_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", pooling=declared))
        assert read_pooling(file) == Pooling(kind=kind, causal=True)
    for declared in (4, 99):
        path = write_tiny_gguf(tmp_path / "tiny.gguf", pooling=declared)
        assert read_pooling(read_gguf(path)) is None
    runner = open_llama(write_tiny_gguf(tmp_path / "tiny.gguf", pooling=4))
    assert runner.embedding_size == 0
    runner.close()


def test_a_model_that_looks_both_ways_reads_a_text_at_once(tmp_path: Path) -> None:
    """In chunks, the first tokens would not see the last ones."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", pooling=2, causal=False)
    runner = open_llama(path)
    first = runner.embed(TOKENS)
    other = runner.embed([*TOKENS[:-1], TOKENS[-1] - 1])
    assert first is not None
    assert other is not None
    assert cosine(first, other) < 1 - 1e-6
    runner.close()


def test_the_state_of_the_conversation_stays(tiny_gguf: Path) -> None:
    runner = open_llama(tiny_gguf)
    runner.prefill(TOKENS[:20])
    before = runner.last_logits().copy()
    first = runner.embed(TOKENS[20:90])
    assert runner.position == 20
    np.testing.assert_array_equal(runner.last_logits(), before)
    runner.step(7)
    after = runner.last_logits().copy()
    runner.reset()
    runner.prefill([*TOKENS[:20], 7])
    np.testing.assert_allclose(runner.last_logits(), after, atol=2e-2)
    second = runner.embed(TOKENS[20:90])
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, second)
    runner.close()


def test_memory_is_taken_by_the_first_text_and_grows_with_the_longest(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new_context = llama_embedding.new_context

    def counted(engine: Any, model: Any, options: RunnerOptions, name: str, **more: Any) -> Any:
        made.append(options.context or 0)
        return new_context(engine, model, options, name, **more)

    monkeypatch.setattr(llama_embedding, "new_context", counted)
    runner = open_llama(tiny_gguf, context=2048)
    runner.prefill(TOKENS)
    assert made == []
    for length in (3, 100, SMALLEST, SMALLEST + 1, 5, 1100, 2048):
        assert runner.embed([5] * length) is not None
    assert made == [512, 1024, 2048]
    with pytest.raises(EngineError, match="the context is full"):
        runner.embed([5] * 2049)
    runner.close()


def test_an_embedding_ends_between_two_chunks(tiny_gguf: Path) -> None:
    runner = open_llama(tiny_gguf)
    asked: list[bool] = []
    assert runner.embed(TOKENS, lambda: asked.append(True) or len(asked) > 2) is None  # type: ignore[func-returns-value]
    assert len(asked) == 3
    assert runner.embed(TOKENS) is not None
    runner.close()


@pytest.mark.workstation
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "granite"])
def test_vectors_are_those_of_torch(tmp_path: Path, family: str) -> None:
    """The oracle: the mean of last_hidden_state, as transformers computes it."""
    pytest.importorskip("llama_cpp")
    import torch
    import transformers

    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    source = write_hf_model(tmp_path / "hf", family, hidden=96, intermediate=192)
    path = tmp_path / "model.gguf"
    export_gguf.run(resolve(str(source)), QuantizeSpec(scheme="F32"), path)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = [token % model.config.vocab_size for token in TOKENS]
    runner = open_llama(path)
    for length in (1, CHUNK, len(tokens)):
        with torch.no_grad():
            states = model.model(torch.tensor([tokens[:length]])).last_hidden_state[0].numpy()
        vector = runner.embed(tokens[:length])
        assert vector is not None
        assert cosine(vector, states.mean(axis=0)) > 1 - 1e-3
    runner.close()


# --- the server ---


class FakeEmbedder(FakeRunner):
    """The vector of a text: its first token and its length; entered and gate: where a text begins."""

    embedding_size = 2

    def __init__(self, *answers: bytes, pause_s: float = 0.0, **more: Any) -> None:
        super().__init__(*answers, **more)
        self.embedded: list[list[int]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self._pause_s = pause_s

    def embed(self, tokens: Sequence[int], interrupted: Callable[[], bool]) -> NDArray[np.float32] | None:
        self.entered.set()
        assert self.gate.wait(20)
        time.sleep(self._pause_s)
        if interrupted():
            return None
        self.embedded.append(list(tokens))
        vector = np.array([tokens[0], len(tokens)], np.float32)
        return vector / np.float32(np.linalg.norm(vector))


@pytest.fixture
def tiny(tiny_gguf: Path) -> Iterator[Any]:
    pytest.importorskip("uvicorn")
    from tests.runtime.live import live, service_of

    with live(service_of(open_llama(tiny_gguf))) as server:
        yield server


@pytest.fixture
def fake() -> Iterator[Any]:
    """A server and its runner."""
    pytest.importorskip("uvicorn")
    from tests.runtime.live import live, service_of

    runner = FakeEmbedder(b"one", b"two", context=100)
    with live(service_of(runner, queue=1)) as server:
        yield server, runner


def test_openai_client(tiny: Any) -> None:
    """It asks for base64 unless told otherwise, and both are the runner's numbers."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0)
    texts = ["the man and the inn", "an inn"]
    answerer = tiny.service.answerer
    tokens = [answerer.text_tokens(text) for text in texts]
    expected = [answerer.runner.embed(one) for one in tokens]
    for given in (texts, tokens):
        for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            found = client.embeddings.create(model="tiny", input=given, **more)
            assert [entry.index for entry in found.data] == [0, 1]
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
            for entry, vector in zip(found.data, expected, strict=True):
                numbers = entry.embedding
                if isinstance(numbers, str):  # who asks for base64 by name gets it as it is
                    numbers = np.frombuffer(base64.b64decode(numbers), "<f4")
                np.testing.assert_allclose(np.asarray(numbers, np.float32), vector, atol=1e-6)
    for one in (texts[0], tokens[0]):
        [entry] = client.embeddings.create(model="tiny", input=one, dimensions=64, user="me").data
        np.testing.assert_allclose(entry.embedding, expected[0], atol=1e-6)
    assert client.models.retrieve("tiny").embedding_size == 64


def test_the_prefix_of_a_conversation_outlives_embeddings(tiny: Any) -> None:
    first = tiny.chat("the man in the inn", max_tokens=3)[1]
    assert tiny.ask("/v1/embeddings", {"input": ["the hen", "x" * 100]})[0] == 200
    again = tiny.chat("the man in the inn", max_tokens=3)[1]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "is missing"),
        ({"input": ""}, "input", "0 characters"),
        ({"input": []}, "input", "0 entries"),
        ({"input": [""]}, "input[0]", "0 characters"),
        ({"input": [[]]}, "input[0]", "0 entries"),
        ({"input": ["x", 3]}, "input[1]", ""),
        ({"input": [1.5]}, "input[0]", ""),
        ({"input": [True]}, "input[0]", ""),
        ({"input": [-1]}, "input[0]", ""),
        ({"input": [[3], [258]]}, "input[1]", "outside the vocabulary of 258"),
        ({"input": {}}, "input", ""),
        ({"input": ["x"] * 2049}, "input", "2049 entries"),
        ({"input": "x" * 100}, "input", "has 100 tokens, the limit is 99"),
        ({"input": ["x", "y" * 120]}, "input[1]", "has 120 tokens, the limit is 99"),
        ({"input": "x", "dimensions": 1}, "dimensions", "dimensions is 1, the model's vectors have 2"),
        ({"input": "x", "dimensions": 0}, "dimensions", ""),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "not one of float, base64, null"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_requests(fake: Any, body: Any, param: str, words: str) -> None:
    server, runner = fake
    status, answer, _ = server.ask("/v1/embeddings", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]
    assert not runner.embedded
    if "limit" in words:
        assert answer["error"]["code"] == "context_length_exceeded"


def test_right_requests(fake: Any) -> None:
    server, runner = fake
    status, body, _ = server.ask("/v1/embeddings", {"input": "x" * 99, "model": "tiny", "dimensions": 2})
    assert (status, body["object"], body["model"], body["data"][0]["object"]) == (
        200,
        "list",
        "tiny",
        "embedding",
    )
    assert server.ask("/v1/embeddings", {"input": [3.0, 4]})[0] == 200, "3.0 is a whole number in JSON"
    assert runner.embedded == [[120] * 99, [3, 4]]
    assert server.ask("/v1/embeddings", {"input": "x", "model": "other"})[0] == 404
    assert "edgeslm_prompt_tokens_total 101" in server.ask("/metrics")[1]
    assert server.ask("/v1/models")[1]["data"][0]["embedding_size"] == 2


def test_a_full_queue(fake: Any) -> None:
    from tests.runtime.live import until

    server, runner = fake
    runner.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, "/v1/embeddings", {"input": "a"})
        assert runner.entered.wait(20)
        second = pool.submit(server.ask, "/v1/embeddings", {"input": "b"})
        until(lambda: server.service.worker.waiting == 1)
        status, body, headers = server.ask("/v1/embeddings", {"input": "c"})
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        runner.gate.set()
        assert first.result()[0] == second.result()[0] == 200


def test_a_client_that_leaves() -> None:
    pytest.importorskip("uvicorn")
    from tests.runtime.live import live, service_of, until

    runner = FakeEmbedder(pause_s=0.01)
    with live(service_of(runner)) as server:
        body = json.dumps({"input": ["x"] * 2000})
        lines = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: len(runner.embedded) > 3)
        connection.close()
        until(lambda: not server.service.worker.running)
        assert len(runner.embedded) < 500
        assert server.ask("/v1/embeddings", {"input": "y"})[0] == 200
        until(lambda: "edgeslm_cancelled_total 1" in server.ask("/metrics")[1])


def test_the_end_of_the_server_is_told() -> None:
    pytest.importorskip("uvicorn")
    from tests.runtime.live import live, service_of, until

    runner = FakeEmbedder(pause_s=0.01)
    with ThreadPoolExecutor(1) as pool, live(service_of(runner), grace_s=0.2) as server:
        asked = pool.submit(server.ask, "/v1/embeddings", {"input": ["x"] * 2000})
        until(lambda: len(runner.embedded) > 3)
        server.server.should_exit = True
        status, body, _ = asked.result(20)
        assert (status, body["error"]["code"]) == (503, "stopping")


def test_a_model_without_hidden_states_says_so() -> None:
    pytest.importorskip("uvicorn")
    from tests.runtime.live import live, service_of

    with live(service_of(FakeRunner())) as server:
        status, body, _ = server.ask("/v1/embeddings", {"input": "x"})
        assert (status, body["error"]["code"]) == (501, "not_supported")
        assert "hidden states" in body["error"]["message"]
        assert server.ask("/v1/models")[1]["data"][0]["embedding_size"] is None
