"""edgeslm.fleet.ssh: names of devices, connections that fail with a way out, programs on the far side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import types
from pathlib import Path

import psutil
import pytest

from edgeslm.errors import EdgeslmError, RecipeError
from edgeslm.fleet.ssh import Access, Connection, Target, failure, parse_target
from tests.fleet.conftest import Far, free_port


@pytest.mark.parametrize(
    ("text", "host", "directory"),
    [
        ("pi5", "pi5", None),
        ("pi@raspberrypi.local", "pi@raspberrypi.local", None),
        ("pi@pi5:models/chat", "pi@pi5", "models/chat"),
        ("pi5:/srv/a b", "pi5", "/srv/a b"),
        ("pi5:~/x:y", "pi5", "~/x:y"),
        ("pi@[fe80::1%eth0]:/opt", "pi@fe80::1%eth0", "/opt"),
        ("[::1]", "::1", None),
    ],
)
def test_names_of_devices(text: str, host: str, directory: str | None) -> None:
    assert parse_target(text) == Target(host=host, directory=directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=id",
        "pi@-oProxyCommand=id",
        "@pi",
        "pi@",
        "a b",
        "pi5:",
        "a@b@c",
        "[::1",
        "a\nb",
        "::1",
    ],
)
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(RecipeError, match="is no device"):
        parse_target(text)


def program(folder: Path, text: str) -> types.ModuleType:
    """A module of this text, as the far side gets it."""
    module = types.ModuleType("far")
    module.__file__ = str(folder / "far.py")
    (folder / "far.py").write_text(text)
    return module


ECHO = """
import json, sys
request = json.loads(sys.stdin.buffer.readline())
rest = sys.stdin.buffer.read()
print("Welcome to this machine")
print("@edgeslm " + json.dumps({"request": request, "bytes": len(rest), "name": __name__}))
"""


def test_a_program_there_answers(far: Far, tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("edgeslm-*"))
    with Connection("127.0.0.1", far.access()) as connection:
        made = set(Path(tempfile.gettempdir()).glob("edgeslm-*")) - before
        assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in made)
        for _ in range(2):
            with connection.talk(program(tmp_path, ECHO), {"key": "Größe '\""}) as talk:
                assert talk.send(bytes(range(256)) * 1000)
                talk._hang_up()
                assert list(talk.answers()) == [
                    {"request": {"key": "Größe '\""}, "bytes": 256_000, "name": "__main__"}
                ]
                assert talk.finish()[0] == 0
    assert not made & set(Path(tempfile.gettempdir()).glob("edgeslm-*"))


def test_one_connection_for_everything(far: Far, tmp_path: Path) -> None:
    """The server sees one login for several commands, and none is left after the end."""

    def logins() -> int:
        return (far.folder / "log").read_text().count("Accepted publickey")

    before = logins()
    with Connection("127.0.0.1", far.access()) as connection:
        for _ in range(3):
            with connection.talk(program(tmp_path, ECHO), {}) as talk:
                talk._hang_up()
                assert list(talk.answers())
    assert logins() == before + 1


def test_words_reach_the_far_side_as_they_are(far: Far) -> None:
    words = [
        "python3",
        "-c",
        "import json,sys;print(json.dumps(sys.argv[1:]))",
        "a b",
        "$HOME",
        "'",
        '"',
        "*",
        "",
        "ü\n",
    ]
    with Connection("127.0.0.1", far.access()) as connection:
        done = subprocess.run(connection.command(words), capture_output=True, check=True)
    assert json.loads(done.stdout) == words[3:]


def test_an_error_of_the_far_program_reaches_the_user(far: Far, tmp_path: Path) -> None:
    text = 'print(\'@edgeslm {"error": "no room", "hint": "make some"}\')'
    with (
        Connection("127.0.0.1", far.access()) as connection,
        connection.talk(program(tmp_path, text), {}) as talk,
        pytest.raises(EdgeslmError, match=r"127\.0\.0\.1: no room") as caught,
    ):
        list(talk.answers())
    assert caught.value.hint == "make some"


def test_no_python_there(far: Far, tmp_path: Path) -> None:
    with (
        Connection("127.0.0.1", far.access(python="/nowhere/python3")) as connection,
        connection.talk(program(tmp_path, ECHO), {}) as talk,
    ):
        assert not list(talk.answers())
        error = talk.broken()
    assert "there is no python3" in error.message
    assert "--python" in error.hint


def test_the_connection_is_lost(far: Far, tmp_path: Path) -> None:
    text = "import time\nprint('@edgeslm {}', flush=True)\ntime.sleep(30)"
    with (
        Connection("127.0.0.1", far.access()) as connection,
        connection.talk(program(tmp_path, text), {}) as talk,
    ):
        answers = talk.answers()
        assert next(answers) == {}
        master = next(each for each in psutil.Process().children() if "-M" in each.cmdline())
        os.kill(master.pid, signal.SIGKILL)
        assert next(answers, None) is None
        error = talk.broken()
    assert "the connection was lost" in error.message
    assert "goes on" in error.hint


def test_a_foreign_key_is_refused(far: Far) -> None:
    with (
        pytest.raises(EdgeslmError, match="Permission denied") as caught,
        Connection("127.0.0.1", far.access(key="stranger")),
    ):
        pass
    assert "ssh-copy-id 127.0.0.1" in caught.value.hint


def test_an_unknown_host_key_is_refused(far: Far, tmp_path: Path) -> None:
    """The check of host keys is ssh's own and stays on."""
    access = far.access()
    options = (f"UserKnownHostsFile={tmp_path / 'none'}", "GlobalKnownHostsFile=/dev/null", *access.options)
    with (
        pytest.raises(EdgeslmError, match="Host key verification failed") as caught,
        Connection("127.0.0.1", Access(options=options, batch=True)),
    ):
        pass
    assert "fingerprint" in caught.value.hint


def test_a_changed_host_key_is_refused(far: Far, tmp_path: Path) -> None:
    kind, key, _ = (far.folder / "stranger.pub").read_text().split()
    (tmp_path / "known").write_text(f"far {kind} {key}\n")
    options = (f"UserKnownHostsFile={tmp_path / 'known'}", *far.access().options)
    with (
        pytest.raises(EdgeslmError, match="HAS CHANGED") as caught,
        Connection("pi@127.0.0.1", Access(options=options, batch=True)),
    ):
        pass
    assert "ssh-keygen -R 127.0.0.1" in caught.value.hint


def test_nobody_answers(far: Far) -> None:
    with (
        pytest.raises(EdgeslmError, match="Connection refused") as caught,
        Connection("127.0.0.1", far.access(port=free_port())),
    ):
        pass
    assert "is it on?" in caught.value.hint


def test_no_ssh_here() -> None:
    with (
        pytest.raises(EdgeslmError, match="no program 'no-such-ssh'") as caught,
        Connection("pi5", Access(ssh="no-such-ssh")),
    ):
        pass
    assert "openssh-client" in caught.value.hint


def test_what_ssh_says_is_kept_when_it_is_not_known() -> None:
    error = failure("pi5", "ssh: something new\r\n", "can't connect")
    assert error.message == "pi5: can't connect: ssh: something new"
