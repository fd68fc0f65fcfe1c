"""A server in a thread of the test's own process, and one in a process of its own."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.runtime.answering import Answerer
from edgeslm.runtime.jobs import Worker
from edgeslm.runtime.service import Service
from edgeslm.runtime.serving import close_service, new_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeslm.runtime.runner import Runner

ROOT = Path(__file__).resolve().parents[2]


class Live:
    """A running server: where it is, and short ways to ask it."""

    def __init__(self, service: Service, server: Any, port: int) -> None:
        self.service, self.server, self.port = service, server, port
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is) and headers of one request."""
        return ask(self.port, path, body, method=method, headers=headers)

    def chat(self, text: str = "hi", **more: Any) -> tuple[int, Any, dict[str, str]]:
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})


def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method or ("GET" if body is None else "POST"), path, body=data, headers=given)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    found = {name.lower(): value for name, value in answer.getheaders()}
    is_json = found.get("content-type", "").startswith("application/json")
    return answer.status, json.loads(content) if is_json else content.decode(), found


def raw(port: int, data: bytes, timeout_s: float = 20) -> bytes:
    """Everything that a server says to some bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        found = b""
        with suppress(OSError):  # it may have said enough and closed
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            found += chunk
        return found


def service_of(
    runner: Runner, *, queue: int = 8, max_prompt_tokens: int | None = None, **more: Any
) -> Service:
    return Service(name="tiny", answerer=Answerer(runner, max_prompt_tokens), worker=Worker(queue), **more)


@contextmanager
def live(service: Service, *, grace_s: float = 5) -> Iterator[Live]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = new_server(service, "127.0.0.1", port, grace_s=grace_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Live(service, server, port)
    finally:
        service.worker.interrupt()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        close_service(service)


@contextmanager
def process(artifact: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`edgeslm serve` and its port."""
    command = [sys.executable, "-m", "edgeslm", "serve", str(artifact), "--port", "0", "-t", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stderr is not None
        try:
            said = ""
            while not (match := re.search(r"answers at http://\S+:(\d+)", said)):
                line = server.stderr.readline()
                assert line, said
                said += line
            yield server, int(match[1])
        finally:
            if server.poll() is None:
                server.kill()


def until(ready: Any, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)
