"""A server's life: a bundle loaded, a port opened, requests until a signal, and an orderly end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from edgeslm.errors import EngineError, RecipeError
from edgeslm.runtime.answering import Answerer
from edgeslm.runtime.http_io import LOOPBACK, read_keys
from edgeslm.runtime.jobs import Worker
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.runner import open_runner
from edgeslm.runtime.server import make_app
from edgeslm.runtime.service import MAX_BODY_BYTES, Service

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from edgeslm.bundle import Bundle
    from edgeslm.runtime.runner import RunnerOptions

GRACE_S = 30.0
"""How long the answer under way may go on after the signal to stop."""
LINGER_S = 10
"""And how long an interrupted one may take to notice, between two chunks of a prompt."""
QUEUE = 8


def open_service(
    bundle: Bundle,
    options: RunnerOptions,
    *,
    queue: int = QUEUE,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    api_key_file: Path | None = None,
    host: str = LOOPBACK[1],
    version: str = "",
) -> Service:
    """Load a bundle behind a worker; close it with close_service.  Raises what loading raises."""
    keys = read_keys(api_key_file) if api_key_file is not None else frozenset()
    limits: dict[str, Any] = {
        "keys": keys, "max_body_bytes": max_body_bytes, "version": version,
        "hosts": LOOPBACK if is_loopback(host) else (),
    }  # fmt: skip
    if bundle.is_classifier:
        classifier = OrtClassifier(bundle, threads=options.threads)
        return Service(name=bundle.name, classifier=classifier, worker=Worker(queue), **limits)
    runner = open_runner(bundle, options)
    answerer = Answerer(runner, max_prompt_tokens)
    return Service(name=bundle.name, answerer=answerer, worker=Worker(queue), **limits)


def close_service(service: Service) -> None:
    """End the worker, then free the engine; an engine that won't come to an end is left to the process's."""
    service.worker.interrupt()
    ended = service.worker.close(LINGER_S + GRACE_S)
    service.reading.shutdown()
    if ended and service.answerer is not None:
        service.answerer.runner.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in LOOPBACK or host.startswith("127.")


def run(
    service: Service, host: str, port: int, *, ready: Callable[[str], None], grace_s: float = GRACE_S
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the address.  Raises EngineError without uvicorn."""
    server = new_server(service, host, port, grace_s=grace_s)
    listener = _listen(host, port)
    name, actual = listener.getsockname()[:2]
    ready(f"http://{f'[{name}]' if ':' in name else name}:{actual}")
    server.run(sockets=[listener])


def new_server(service: Service, host: str, port: int, *, grace_s: float = GRACE_S) -> Any:
    """uvicorn's server of a service, which ends a request in flight in order."""
    try:
        import uvicorn
    except ImportError as error:
        raise EngineError(
            f"the server needs uvicorn and starlette (no module named {error.name!r})",
            hint="pip install 'edgeslm[serve]'",
        ) from error

    class Server(uvicorn.Server):
        """Tells the worker when the end begins, and leaves with the exit code 0."""

        def handle_exit(self, _sig: int, _frame: Any) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.worker.stop()
            timer = asyncio.get_running_loop().call_later(grace_s, service.worker.interrupt)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

    config = uvicorn.Config(
        make_app(service), host=host, port=port, log_level="warning", access_log=False, lifespan="off",
        server_header=False, timeout_graceful_shutdown=int(grace_s) + LINGER_S, timeout_keep_alive=15,
        limit_concurrency=64, ws="none",
    )  # fmt: skip
    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise RecipeError(
            f"can't listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="another program may use this port: choose another --port",
        ) from error
    return listener
