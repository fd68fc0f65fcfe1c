"""A real OpenSSH server on loopback, a proxy that cuts its connections, and bundles to send."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.bundle import Bundle, write_bundle
from edgeslm.fleet.ssh import Access, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile {folder}/pid
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
UsePAM no
StrictModes no
"""


@dataclass(frozen=True, kw_only=True)
class Far:
    """The server as a client sees it."""

    folder: Path
    port: int
    pid: int

    def access(self, *, port: int | None = None, python: str | None = None, key: str = "key") -> Access:
        options = (
            f"Port={port or self.port}",
            f"IdentityFile={self.folder / key}",
            "IdentitiesOnly=yes",
            f"UserKnownHostsFile={self.folder / 'known'}",
            "HostKeyAlias=far",
        )
        return Access(options=options, batch=True, python=python)

    @staticmethod
    def target(directory: Path | str | None) -> Target:
        return Target(host="127.0.0.1", directory=None if directory is None else str(directory))


@pytest.fixture(scope="session")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """sshd with keys of its own, on a free port."""
    if not Path(SSHD).exists() or shutil.which("ssh") is None:
        pytest.skip("there is no sshd here: sudo apt install openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it when it is root
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "key", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True
        )
    shutil.copy(folder / "key.pub", folder / "authorized")
    kind, key, _ = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"far {kind} {key}\n")
    port = free_port()
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        if not answers(port):
            pytest.skip(f"sshd does not start: {(folder / 'log').read_text()}")
        yield Far(folder=folder, port=port, pid=server.pid)
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    for _ in range(100):
        with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1)):
            return True
        time.sleep(0.1)
    return False


@contextmanager
def resetting_proxy(port: int, *, propagate: bool = True) -> Iterator[tuple[int, Callable[[], None]]]:
    """(port, reset): a way to `port` whose connections end with a TCP reset when `reset` is called.

    propagate: whether the other side learns of the end, as it does not when a radio link is gone.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        if propagate:
            for each in (source, sink):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far_side = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend((near, far_side))
                for pair in ((near, far_side), (far_side, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    def reset() -> None:
        for each in open_sockets:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)
                each.close()
        open_sockets.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], reset
    finally:
        reset()
        listener.close()


def make_bundle(out: Path, *, seed: int = 0, size: int = 2**20, card: str = "a card\n") -> Bundle:
    """A bundle of random bytes, of which only the card differs where `seed` is the same."""
    weights = b"GGUF" + np.random.default_rng(seed).bytes(size)
    manifest = {"name": "tiny", "task": "causal-lm", "format": "gguf", "weights": "model.gguf"}
    return write_bundle(out, files={"model.gguf": weights, "extra/card.md": card}, manifest=manifest)


@pytest.fixture(scope="session")
def far_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has this edgeslm wherever it is started."""
    root = Path(__file__).resolve().parents[2]
    return interpreter(tmp_path_factory.mktemp("python") / "python3", root)


def interpreter(path: Path, *folders: Path) -> str:
    """This interpreter with folders in front of its path."""
    search = ":".join(map(str, folders))
    path.write_text(f'#!/bin/sh\nPYTHONPATH={search} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)
