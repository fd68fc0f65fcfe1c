"""What the server refuses, and how it behaves with clients that are slow, gone, too many or hostile."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from edgeslm.errors import DataError, EngineError
from edgeslm.runtime.generate import PREFILL_CHUNK
from edgeslm.runtime.http_io import read_keys
from tests.runtime.fakes import FakeRunner
from tests.runtime.live import Live, ask, live, process, raw, service_of, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHAT = "/v1/chat/completions"


def endless() -> bytes:
    return b"x" * 4000


class Held(FakeRunner):
    """Stops at each step until it is let go; entered: the steps begun."""

    def __init__(self, *answers: bytes) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        super().__init__(*answers, context=8192, on_step=self._hold)

    def _hold(self, _count: int) -> None:
        self.entered.set()
        assert self.gate.wait(20)


@pytest.fixture
def one() -> Iterator[Live]:
    with live(service_of(FakeRunner(*[b"fine"] * 500, context=300), max_body_bytes=20_000)) as server:
        yield server


def post(body: bytes | str, *lines: str, path: str = CHAT, close: bool = True) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"Content-Length: {len(data)}")
    head += ["Connection: close"] if close else []
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def test_full_queue_says_when_to_come_back() -> None:
    runner = Held(*[b"ab"] * 4)
    with live(service_of(runner, queue=1)) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.chat)
        assert runner.entered.wait(20)
        second = pool.submit(server.chat)
        until(lambda: server.service.worker.waiting == 1)
        status, body, headers = server.chat()
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        runner.gate.set()
        assert first.result()[0] == second.result()[0] == 200
        assert "edgeslm_rejected_total 1" in server.ask("/metrics")[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    runner = FakeRunner(endless(), b"next", on_step=lambda _: time.sleep(0.005), context=8192)
    with live(service_of(runner)) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": stream})
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(post(body, close=False))
        until(lambda: runner.steps > 3)
        connection.close()
        until(lambda: not server.service.worker.running)
        assert runner.steps < 500
        assert server.chat()[1]["choices"][0]["message"]["content"] == "next"
        until(lambda: "edgeslm_cancelled_total 1" in server.ask("/metrics")[1])


def test_a_client_that_leaves_during_the_prompt_ends_it_there() -> None:
    class Slow(FakeRunner):
        def prefill(self, tokens: Any) -> None:
            time.sleep(0.05)
            super().prefill(tokens)

    runner = Slow(b"x", b"next", context=100_000)
    with live(service_of(runner)) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"prompt": "p" * PREFILL_CHUNK * 100, "stream": True})
        connection.sendall(post(body, path="/v1/completions", close=False))
        until(lambda: len(runner.computed) >= 2)
        connection.close()
        until(lambda: not server.service.worker.running)
        assert len(runner.computed) < 50
        assert server.ask("/v1/completions", {"prompt": "q"})[0] == 200


def test_a_client_that_leaves_the_queue_is_not_computed() -> None:
    runner = Held(b"ab", b"cd", b"ef")
    with live(service_of(runner, queue=3)) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat)
        assert runner.entered.wait(20)
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(post(json.dumps({"messages": [{"role": "user", "content": "gone"}]})))
        until(lambda: server.service.worker.waiting == 1)
        connection.close()
        until(lambda: server.service.worker.waiting == 0)
        runner.gate.set()
        assert first.result()[0] == 200
        assert server.chat()[1]["choices"][0]["message"]["content"] == "cd"


def test_a_slow_reader_does_not_hold_up_the_others() -> None:
    runner = FakeRunner(b"y" * 3000, b"next", context=8192)
    with live(service_of(runner)) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(post(json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})))
        until(lambda: runner.steps > 0)
        assert server.chat()[1]["choices"][0]["message"]["content"] == "next"
        slow.close()


def test_a_slow_writer_does_not_hold_up_the_others(one: Live) -> None:
    half = post('{"messages": [{"role": "user", "content": "x"}]}')
    with socket.create_connection(("127.0.0.1", one.port)) as slow:
        slow.sendall(half[:-10])
        assert one.chat()[0] == 200
        slow.sendall(half[-10:])
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")


def test_long_prompts(one: Live) -> None:
    for text in ("x" * 400, "x" * 300):
        status, body, _ = one.chat(text)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert one.chat("x" * 200)[0] == 200
    with live(service_of(FakeRunner(b"a"), max_prompt_tokens=20)) as short:
        assert short.ask("/v1/completions", {"prompt": "x" * 21})[0] == 400
        assert short.ask("/v1/completions", {"prompt": "x" * 20})[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb(one: Live, chunked: bool) -> None:
    """Told at once or after the limit; and never in memory."""
    import psutil

    before = psutil.Process().memory_info().rss
    block = b"x" * 2**20
    peak = [before]
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as connection:
        if chunked:
            connection.sendall(post(b"", "Transfer-Encoding: chunked", close=False))
        else:
            connection.sendall(post(b"", f"Content-Length: {100 * len(block)}", close=False))
        for _ in range(100):
            connection.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n" if chunked else block)
            peak.append(psutil.Process().memory_info().rss)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer
    assert max(peak) - before < 20 * 2**20
    assert one.chat()[0] == 200


def test_a_body_that_waits_for_leave_is_refused_unsent(one: Live) -> None:
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as connection:
        connection.sendall(post(b"", "Content-Length: 1000000000", "Expect: 100-continue", close=False))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


WRONG: list[tuple[Any, str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"stop": 3}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [{}]}, "tools"),
    ({"stream_options": []}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}},
        "response_format",
    ),
    ({"grammar": "root ::= root"}, "grammar"),
    ({"grammar": "root ::= (" * 200}, "grammar"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=str)
def test_wrong_values_are_named(one: Live, body: Any, param: str) -> None:
    whole = (
        body if "messages" in body or not body else {"messages": [{"role": "user", "content": "x"}], **body}
    )
    status, answer, _ = one.ask(CHAT, whole)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param


def test_another_model_is_not_found(one: Live) -> None:
    status, body, _ = one.chat(model="gpt-9")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert one.ask("/v1/models/gpt-9")[0] == 404


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post("{"), 400),
        (post(b"\xff\xfe"), 400),
        (post('{"a": NaN}'), 400),
        (post("[" * 5000), 400),
        (post("9" * 5000), 400),
        (post('"text"'), 400),
        (post('{"messages": "\\ud800"}'), 400),
        (post("{}").replace(b"application/json", b"text/plain"), 415),
        (post("{}", "Content-Length: abc"), 400),
        (post("{}", "Content-Length: -5"), 400),
        (post("zz\r\n{}", "Transfer-Encoding: chunked"), 400),
        (post("{}").replace(b"POST", b"DELETE"), 405),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
        (b"GET / HTTQ/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /" + b"a" * 100_000, 400),
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_requests(one: Live, data: bytes, status: int) -> None:
    answer = raw(one.port, data)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert one.ask("/healthz")[0] == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "grammar",
          "top_logprobs", "response_format", "stream_options", "model", "n", "input", "windows")  # fmt: skip
GOOD = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "windows": [[[1]]]}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings", "/classify", "/predict"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
def test_no_value_makes_it_fail(one: Live, path: str, changes: dict[str, Any]) -> None:
    body = json.dumps({**GOOD, "max_tokens": 3, **changes}).encode("utf-8", errors="replace")
    status, answer, _ = one.ask(path, body)
    assert status in (200, 400, 404, 501), answer
    if status != 200:
        assert answer["error"]["message"]


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who may ask\nfirst-key\n\n  second-key  \n")
    with live(service_of(FakeRunner(*[b"a"] * 9), keys=read_keys(file))) as server:
        for header in (None, "Bearer", "Bearer wrong", "Basic first-key", "Bearer first-key2", "Bearer é"):
            given_ = {} if header is None else {"Authorization": header.encode("utf-8").decode("latin-1")}
            status, body, headers = server.ask("/v1/models", headers=given_)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for key in ("first-key", "second-key"):
            assert server.ask("/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
            named = {"Authorization": f"Bearer {key}", "Host": "pi.example"}
            assert server.ask("/v1/models", headers=named)[0] == 200
        assert server.ask("/metrics")[0] == 401
        assert server.ask("/healthz")[0] == server.ask("/")[0] == 200
    file.write_text("# none\n")
    with pytest.raises(DataError, match="no API key"):
        read_keys(file)
    with pytest.raises(DataError, match="can't be read"):
        read_keys(tmp_path / "missing")


def test_a_failing_engine_is_told_and_survived() -> None:
    def fail(count: int) -> None:
        if count == 3:
            raise EngineError("the engine broke", hint="mend it")

    runner = FakeRunner(b"abcdef", b"again", b"whole", on_step=fail)
    with live(service_of(runner)) as server:
        status, text, _ = server.chat(stream=True)
        assert status == 200
        assert '"error": {"message": "the engine broke (mend it)"' in text
        assert "[DONE]" not in text
        assert server.chat()[1]["choices"][0]["message"]["content"] == "again"
    runner = FakeRunner(b"abcdef", on_step=lambda _: fail(3))
    with live(service_of(runner)) as server:
        status, body, _ = server.chat()
        assert (status, body["error"]["type"]) == (500, "server_error")


def test_stopping_lets_the_answer_end_and_tells_the_others() -> None:
    runner = Held(b"abc")
    with ThreadPoolExecutor(3) as pool, live(service_of(runner)) as server:
        first = pool.submit(server.chat)
        assert runner.entered.wait(20)
        second = pool.submit(server.chat)
        until(lambda: server.service.worker.waiting == 1)
        server.server.should_exit = True
        status, body, _ = second.result(20)
        assert (status, body["error"]["code"]) == (503, "stopping")
        runner.gate.set()
        status, body, _ = first.result(20)
        assert (status, body["choices"][0]["message"]["content"]) == (200, "abc")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_to_end_is_told(stream: bool) -> None:
    runner = FakeRunner(endless(), on_step=lambda _: time.sleep(0.01), context=8192)
    with ThreadPoolExecutor(1) as pool, live(service_of(runner), grace_s=0.2) as server:
        asked = pool.submit(server.chat, stream=stream)
        until(lambda: runner.steps > 3)
        server.server.should_exit = True
        status, body, _ = asked.result(20)
        if stream:
            assert status == 200
            assert '"code": "stopping"' in body
        else:
            assert (status, body["error"]["code"]) == (503, "stopping")


def test_a_signal_ends_it_in_order(tiny_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    with process(tiny_gguf) as (server, port), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "the", "max_tokens": 200, "temperature": 0}
        assert ask(port, "/v1/completions", body)[0] == 200
        asked = pool.submit(ask, port, "/v1/completions", {**body, "prompt": "an inn"})
        time.sleep(0.02)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(20) == 0
        with suppress(OSError):  # unless the connection came after the end
            assert asked.result()[0] in (200, 503)


def test_a_port_in_use_is_said(tiny_gguf: Path) -> None:
    from click.testing import CliRunner

    from edgeslm.cli import cli

    pytest.importorskip("llama_cpp")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli, ["serve", str(tiny_gguf), "--port", port, "-t", "1"])
    assert "can't listen" in str(done.exception)
