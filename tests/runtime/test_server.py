"""The server in the words of OpenAI's own client, with curl, and against the bare runner."""

from __future__ import annotations

import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor
from shutil import which
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from edgeslm.bundle import open_bundle
from edgeslm.runtime.generate import Generation
from edgeslm.runtime.jobs import Worker
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.runner import RunnerOptions, open_runner
from edgeslm.runtime.sampling import Sampling, softmax
from edgeslm.runtime.service import Service
from tests.onnx_models import CHANNELS, LABELS, ROWS, write_classifier
from tests.runtime.fakes import END, FakeRunner
from tests.runtime.live import Live, live, service_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Live]:
    pytest.importorskip("llama_cpp")
    runner = open_runner(open_bundle(tiny_gguf), RunnerOptions(threads=1, context=256))
    with live(service_of(runner)) as server:
        yield server


@pytest.fixture
def client(tiny: Live) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the man and the inn"}]


def test_models(client: Any) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat_whole_and_streamed_are_the_same(client: Any) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 7, "temperature": 1.0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_greedy_completion_is_the_runners(client: Any, tiny: Live, tiny_gguf: Path) -> None:
    runner = open_runner(open_bundle(tiny_gguf), RunnerOptions(threads=1, context=256))
    tokens = runner.tokenize("the man", add_special=True, parse_special=True)
    generation = Generation(runner, tokens, sampling=Sampling(temperature=0), max_tokens=20)
    expected = "".join(generation)
    answer = client.completions.create(model="tiny", prompt="the man", temperature=0, max_tokens=20)
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens == len(generation.tokens)
    by_tokens = client.completions.create(model="tiny", prompt=tokens, temperature=0, max_tokens=20)
    assert by_tokens.choices[0].text == expected
    runner.close()


def test_a_seed_repeats_and_none_does_not(client: Any) -> None:
    def text(**more: Any) -> str:
        return str(client.completions.create(
            model="tiny", prompt="in", max_tokens=30, temperature=50.0, top_p=1.0,
            extra_body={"top_k": 0, "min_p": 0}, **more,
        ).choices[0].text)  # fmt: skip

    assert text(seed=5) == text(seed=5)
    assert len({text() for _ in range(4)}) > 1
    assert len({text(seed=seed) for seed in range(4)}) > 1


def test_logprobs_are_the_models(client: Any, tiny_gguf: Path) -> None:
    """The oracle: log softmax of the logits of the whole text, computed at once."""
    prompt = "the inn"
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    found = client.completions.create(**asked).choices[0]
    runner = open_runner(open_bundle(tiny_gguf), RunnerOptions(threads=1, context=256))
    tokens = runner.tokenize(prompt, add_special=True, parse_special=True)
    generation = Generation(runner, tokens, sampling=Sampling(temperature=0), max_tokens=6)
    list(generation)
    logits = runner.logits([*tokens, *generation.tokens], len(tokens) - 1)
    runner.close()
    assert len(found.logprobs.token_logprobs) == len(generation.tokens)
    for row, token, value in zip(logits, generation.tokens, found.logprobs.token_logprobs, strict=False):
        assert value == pytest.approx(math.log(softmax(row, 1.0)[token]), abs=1e-3)
    assert all(len(top) <= 3 for top in found.logprobs.top_logprobs)
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    for entry in chat.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0


def test_json_schema_is_valid_every_time(client: Any) -> None:
    """A random model is the hardest one: it never means to write JSON."""
    jsonschema = pytest.importorskip("jsonschema")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(100):
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"who {seed}"}], seed=seed, response_format=form,
            max_tokens=90, temperature=(0.0, 0.7, 2.0)[seed % 3],
        ).choices[0]  # fmt: skip
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), PERSON)


def test_json_object_and_grammar(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, response_format={"type": "json_object"}
    ).choices[0]
    assert isinstance(json.loads(answer.message.content), dict)
    grammar = 'root ::= ("yes" | "no") "!"{2,3}'
    for seed in range(5):
        text = client.completions.create(
            model="tiny", prompt="is it?", seed=seed, extra_body={"grammar": grammar}, max_tokens=20
        ).choices[0].text  # fmt: skip
        assert text in ("yes!!", "yes!!!", "no!!", "no!!!")


def test_stop_strings(tiny: Live) -> None:
    with live(service_of(FakeRunner(b"one two three", b"one two three"))) as server:
        status, body, _ = server.chat(stop="two")
        assert (status, body["choices"][0]["message"]["content"]) == (200, "one ")
        assert body["choices"][0]["finish_reason"] == "stop"
        status, body, _ = server.chat(stop=["x", "three"], max_completion_tokens=100, max_tokens=3)
        assert body["choices"][0]["message"]["content"] == "one two "


def test_characters_of_several_tokens_stay_whole() -> None:
    with live(service_of(FakeRunner("né😀".encode()))) as server:
        status, text, _ = server.chat(stream=True)
        assert status == 200
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert [event["choices"][0]["delta"].get("content") for event in events] == ["", "n", "é", "😀", None]
        assert text.endswith("data: [DONE]\n\n")


def test_eight_clients_at_once(client: Any) -> None:
    def answer(number: int) -> str:
        return str(client.completions.create(
            model="tiny", prompt=f"{number} men in the inn", temperature=0, max_tokens=10
        ).choices[0].text)  # fmt: skip

    alone = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8))) == alone


def test_prefix_is_kept() -> None:
    runner = FakeRunner(b"one", b"two")
    with live(service_of(runner)) as server:
        _, first, _ = server.chat("a question of some length")
        _, second, _ = server.chat("a question of some length, and more")
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
def test_curl(tiny: Live) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True})
    command = ["curl", "-sSN", "--fail-with-body", f"{tiny.url}/v1/chat/completions", "-H",
               "Content-Type: application/json", "-d", body]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("data: [DONE]\n\n")
    page = subprocess.run(["curl", "-sS", tiny.url], capture_output=True, text=True, timeout=60, check=True)
    assert "<textarea" in page.stdout


def test_a_model_without_a_template_completes_but_does_not_chat() -> None:
    with live(service_of(FakeRunner(b"text", template=None))) as server:
        status, body, _ = server.chat()
        assert status == 400
        assert "/v1/completions" in body["error"]["message"]
        assert server.ask("/v1/completions", {"prompt": "x"})[1]["choices"][0]["text"] == "text"


def test_what_a_language_model_can_not_do_is_said(tiny: Live) -> None:
    for path, body in (("/classify", {"input": "x"}), ("/predict", {"windows": [[[1]]]})):
        status, answer, _ = tiny.ask(path, body)
        assert (status, answer["error"]["code"]) == (501, "not_supported")


def test_no_tokens_but_the_end() -> None:
    with live(service_of(FakeRunner([END]))) as server:
        status, body, _ = server.chat(logprobs=True)
        assert status == 200
        assert body["choices"][0]["message"]["content"] == ""
        assert body["choices"][0]["logprobs"]["content"] == []
        assert body["usage"]["completion_tokens"] == 0


def test_metrics_and_health(tiny: Live) -> None:
    tiny.chat(max_tokens=2)
    status, text, headers = tiny.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'edgeslm_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "edgeslm_time_to_first_token_seconds_bucket" in text
    assert tiny.ask("/healthz")[:2] == (200, {"status": "ok", "model": "tiny"})
    assert tiny.ask("/openapi.json")[1]["openapi"].startswith("3.1")


def test_text_classifier(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = write_classifier(tmp_path / "mails")
    classifier = OrtClassifier(bundle, threads=1)
    texts = ["win money now", "meeting at noon"]
    expected = classifier.decision.posterior(classifier.predict_texts(texts))
    with live(Service(name="mails", classifier=classifier, worker=Worker(2))) as server:
        status, body, _ = server.ask("/classify", {"input": texts})
        assert status == 200
        for result, row in zip(body["results"], expected, strict=True):
            assert list(result["probabilities"]) == list(LABELS)
            np.testing.assert_allclose(list(result["probabilities"].values()), row)
            assert result["label"] == LABELS[int(row.argmax())]
        assert len(server.ask("/classify", {"input": "one"})[1]["results"]) == 1
        assert server.ask("/v1/models")[1]["data"][0]["labels"] == list(LABELS)
        assert server.chat()[0] == server.ask("/v1/embeddings", {"input": "x"})[0] == 501
        assert server.ask("/classify", {"input": []})[0] == 400


def test_sensor_classifier(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    classifier = OrtClassifier(write_classifier(tmp_path / "bearing", "sensors"), threads=1)
    window: Any = [[1.0, 2.0, 40.0]] * (ROWS - 1) + [[None, 3.0, 41.0]]
    expected = classifier.predict_readings([[[np.nan if v is None else v for v in row] for row in window]])
    with live(Service(name="bearing", classifier=classifier, worker=Worker(2))) as server:
        status, body, _ = server.ask("/predict", {"windows": [window]})
        assert status == 200
        np.testing.assert_allclose(list(body["results"][0]["probabilities"].values()), expected[0])
        status, body, _ = server.ask("/predict", {"windows": [window[1:]]})
        assert status == 400
        assert ", ".join(CHANNELS) in body["error"]["message"]
        assert server.ask("/predict", {"windows": [[["x"]]]})[0] == 400
