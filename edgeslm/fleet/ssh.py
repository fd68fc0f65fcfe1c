"""One connection to a device through the OpenSSH client, so that the user's configuration, keys, jump hosts
and host-key checks hold.

A master process holds the connection, its socket in a private directory; every command there goes through
it (ControlMaster in ssh_config(5)).  What runs on the far side is Python text sent over standard input:
nothing is installed there, and only a python3 is needed.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeslm.errors import EdgeslmError, RecipeError
from edgeslm.fleet.far_receive import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType, TracebackType

START = (
    "import sys;i=sys.stdin.buffer;"
    'exec(compile(i.read(int(i.readline())),"edgeslm","exec"),{"__name__":"__main__"})'
)
"""What the far python3 is started with: it reads its program, then the program reads the rest."""

OPTIONS = (
    "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3", "ForwardX11=no",
    "ClearAllForwardings=yes", "PermitLocalCommand=no", "RemoteCommand=none",
)  # fmt: skip
"""A dead line is noticed after half a minute; the user's options come first and win."""

MAX_LINE_BYTES = 2**26

REASONS = (
    ("HOST IDENTIFICATION HAS CHANGED", "its host key is another than before; if you know why: ssh-keygen -R {name}"),
    ("Host key verification failed", "connect once by hand and compare the fingerprint: ssh {host}"),
    ("Permission denied", "install your key there: ssh-copy-id {host}"),
    ("Could not resolve", "check the name, or give it a HostName in ~/.ssh/config"),
    ("Connection refused", "no SSH server answers there: is it on? (Raspberry Pi OS: sudo raspi-config)"),
    ("Connection timed out", "is the device on, and in this network?"),
    ("No route to host", "is the device on, and in this network?"),
    ("Bad configuration option", "see man ssh_config for the names of options"),
)  # fmt: skip
"""What ssh says to the way out."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device and the directory on it; directory None: edgeslm/NAME in the home directory."""

    host: str
    """As ssh takes it: an alias, a name or an address, with or without user@."""
    directory: str | None = None


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach the devices.  options: of ssh_config(5), KEY=VALUE.  python: the one that has edgeslm there."""

    options: tuple[str, ...] = ()
    batch: bool = False
    """Never ask for a password or about a host key: fail."""
    python: str | None = None
    ssh: str = "ssh"


def parse_target(text: str) -> Target:
    """'pi@pi5', 'pi5:models/chat' or 'pi@[fe80::1]:/opt/chat'.  Raises RecipeError."""
    match = re.fullmatch(r"((?:[^@:\[\]]+@)?)(?:\[([^\[\]]+)\]|([^@:\[\]]+))(?::(.+))?", text)
    if match is None or re.search(r"[\x00-\x20\x7f]", match[1] + (match[2] or match[3])) or text[0] in "-@":
        raise RecipeError(f"{text!r} is no device", hint="give [USER@]HOST or [USER@]HOST:DIRECTORY")
    host, directory = match[1] + (match[2] or match[3]), match[4]
    if "@-" in host or (directory and re.search(r"[\x00-\x1f\x7f]", directory)):
        raise RecipeError(f"{text!r} is no device", hint="give [USER@]HOST or [USER@]HOST:DIRECTORY")
    return Target(host=host, directory=directory)


class Connection:
    """An open connection; a context manager.  Raises EdgeslmError with what ssh said when there is none."""

    def __init__(self, host: str, access: Access) -> None:
        self.host = host
        self._access = access
        self._folder = tempfile.TemporaryDirectory(prefix="edgeslm-", dir=_short_folder())
        self._socket = Path(self._folder.name) / "s"
        self._complaints = (Path(self._folder.name) / "complaints").open("w+b")
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Connection:
        if self._master is None:
            self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Wait for the connection, as long as ssh and its questions take."""
        try:
            self._start_master()
        except BaseException:
            self.close()
            raise

    def _start_master(self) -> None:
        command = [self._access.ssh, "-M", "-N", "-T", *self._options(), "--", self.host]
        try:
            self._master = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._complaints
            )
        except FileNotFoundError:
            raise EdgeslmError(
                f"there is no program {self._access.ssh!r} here",
                hint="on Debian: sudo apt install openssh-client",
            ) from None
        while not self._socket.exists():
            if self._master.poll() is not None:
                raise failure(self.host, _said(self._complaints), "can't connect")
            time.sleep(0.02)

    def close(self) -> None:
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
        self._complaints.close()
        self._folder.cleanup()

    def _options(self) -> list[str]:
        given = [f"ControlPath={self._socket}", "ControlPersist=no", *self._access.options, *OPTIONS]
        given += ["BatchMode=yes"] if self._access.batch else []
        return [part for option in given for part in ("-o", option)]

    def command(self, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The local command that runs `words` there, for any shell that has single quotes."""
        mode = "-t" if terminal else "-T"
        options = ["-o", "ControlMaster=no", mode, *self._options()]
        return [self._access.ssh, *options, "--", self.host, shlex.join(words)]

    def talk(self, program: ModuleType, request: Mapping[str, Any]) -> Talk:
        """Run a far_* module there with `request`."""
        python = self._access.python or "python3"
        return Talk(self.host, self.command([python, "-I", "-c", START]), program, request)


class Talk:
    """A program on the far side that answers in JSON lines; a context manager.

    ended: its exit status, 255 where the connection broke, None while it runs.
    """

    def __init__(
        self, host: str, command: Sequence[str], program: ModuleType, request: Mapping[str, Any]
    ) -> None:
        self.host = host
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints
        )
        source = Path(str(program.__file__)).read_bytes()
        self.send(b"%d\n" % len(source) + source + json.dumps(request).encode() + b"\n")

    def __enter__(self) -> Talk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hang_up()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._complaints.close()

    def send(self, data: bytes) -> bool:
        """Whether the other side still takes data; why it does not is in its answers, or their absence."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def lines(self) -> Iterator[bytes]:
        """What the far side writes to its standard output."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(MAX_LINE_BYTES):
            yield line

    def answers(self) -> Iterator[dict[str, Any]]:
        """Its answers; what a login script prints is passed over.  Raises EdgeslmError for {error, hint}."""
        mark = MARK.encode()
        for line in self.lines():
            if not line.startswith(mark):
                continue
            answer = json.loads(line[len(mark) :])
            if "error" in answer:
                raise EdgeslmError(f"{self.host}: {answer['error']}", hint=str(answer.get("hint") or ""))
            yield answer

    def broken(self) -> EdgeslmError:
        """Why the answers ended too early."""
        self._hang_up()
        code = self._process.wait()
        said = _said(self._complaints)
        if code == 127:
            return EdgeslmError(
                f"{self.host}: there is no python3: {_last(said)}",
                hint="install Python 3.11 or newer there, or name one with --python",
            )
        if code in (255, -9, -13, -15):
            return failure(self.host, said, "the connection was lost")
        return EdgeslmError(f"{self.host}: the far side ended with {code}: {_last(said)}")

    def finish(self) -> tuple[int, str]:
        """Wait for the end: (exit status, standard error)."""
        code = self._process.wait()
        return code, _said(self._complaints)

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.close()


def failure(host: str, said: str, what: str) -> EdgeslmError:
    """An error with the reason that ssh gave, and the way out that goes with it."""
    name = host.rpartition("@")[2]
    for words, hint in REASONS:
        if words in said:
            return EdgeslmError(
                f"{host}: {what}: {_line_with(said, words)}", hint=hint.format(host=host, name=name)
            )
    return EdgeslmError(
        f"{host}: {what}: {_last(said)}", hint="run the same command again: it goes on where it stopped"
    )


def _line_with(said: str, words: str) -> str:
    return next(line for line in said.splitlines() if words in line).strip(" @\r")


def _last(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _said(complaints: IO[bytes]) -> str:
    complaints.seek(0)
    return complaints.read(2**20).decode("utf-8", "replace")


def _short_folder() -> str | None:
    """A socket's path has at most 104 bytes on macOS, where the temporary folder's is long."""
    return "/tmp" if sys.platform == "darwin" else None
