"""A systemd unit for the server, shut off from everything that it does not need (systemd.exec(5))."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

UNIT = """\
# Save as /etc/systemd/system/edgeslm.service, then: systemctl enable --now edgeslm
[Unit]
Description=edgeslm: {name}
After=network.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=5
TimeoutStopSec=60
{credential}
# no account of its own on the disk, and nothing to write
DynamicUser=yes
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateDevices=yes
ReadOnlyPaths={paths}
UMask=0077

# no way to the kernel, to other processes or to more rights
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

# the network: this port only, and no connections of its own accord
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
{addresses}
[Install]
WantedBy=multi-user.target
"""
KEY_CREDENTIAL = "api-keys"


def unit(
    artifact: Path,
    arguments: Sequence[str],
    *,
    name: str,
    loopback: bool,
    key_file: Path | None = None,
    python: str = sys.executable,
) -> str:
    """The unit that runs `edgeslm serve` on an artifact.

    arguments: the options of the command but for --api-key-file: keys are handed over as a credential, so
    that their file may belong to root.  Raises DataError for a path that a unit can't hold.
    """
    paths = [str(artifact.resolve())]
    words = [python, "-m", "edgeslm", "serve", paths[0], *arguments]
    credential = ""
    if key_file is not None:
        credential = f"LoadCredential={KEY_CREDENTIAL}:{_word(str(key_file.resolve()))}\n"
    command = " ".join(map(_word, words))
    if key_file is not None:  # %d is the credentials' directory, which systemd fills in
        command += f" --api-key-file %d/{KEY_CREDENTIAL}"
    in_home = any(path.startswith(("/home/", "/root/")) for path in (*paths, python))
    return UNIT.format(
        name=name.replace("%", "%%").replace("\n", " "),
        command=command,
        credential=credential,
        home="read-only" if in_home else "yes",
        paths=_word(paths[0]),
        addresses="IPAddressDeny=any\nIPAddressAllow=localhost\n" if loopback else "",
    )


def arguments_of(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Options of the command line that differ from their defaults, as words; keys are the options' names."""
    words: list[str] = []
    for name, value in options.items():
        if value == defaults.get(name) or value is None:
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, str(value)]
    return words


def _word(text: str) -> str:
    """A word of a unit's command line: quoted, with % and $ as themselves."""
    if any(character < " " or character == "\x7f" for character in text):
        raise DataError(f"{text!r} can't stand in a systemd unit", hint="rename it")
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if any(character in text for character in " '\"\\;#") or not text else text
