"""The command that makes a device able to install without a network: wheelhouse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm.options import ARTIFACT, emit, json_option, progress_for

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.argument("bundle", type=ARTIFACT, required=False)
@click.option("--for", "profile", required=True, metavar="PROFILE", help="A profile of `edgeslm devices`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--python",
    type=click.Choice(["3.11", "3.12", "3.13"]),
    default="3.11",
    show_default=True,
    help="The device's Python; 3.11 is Raspberry Pi OS 12's.",
)
@click.option("--serve", is_flag=True, help="The HTTP server too.")
@click.option(
    "--cache",
    "cache_home",
    type=click.Path(path_type=Path),
    envvar="XDG_CACHE_HOME",
    help="Where compiled wheels are kept, below edgeslm/wheels.  [default: $XDG_CACHE_HOME or ~/.cache]",
)
@json_option
def wheelhouse(
    *,
    bundle: Path | None,
    profile: str,
    out: Path,
    python: str,
    serve: bool,
    cache_home: Path | None,
    as_json: bool,
) -> None:
    """Make a directory from which a 64-bit Arm Linux device installs edgeslm without a network.

    With BUNDLE only the engine that it needs.  llama.cpp is compiled here for the device's processor, once
    (about three minutes of one core), with Debian's gcc-aarch64-linux-gnu and g++-aarch64-linux-gnu.

    \b
    Example:  edgeslm wheelhouse --for rpi5-8gb --out wheels chat-bundle
              scp -r wheels pi5: && ssh pi5 sh wheels/install.sh
    """  # fmt: skip
    from edgeslm.wheelhouse import make_wheelhouse

    cache = (cache_home or Path.home() / ".cache") / "edgeslm" / "wheels"
    record = make_wheelhouse(
        profile, out, bundle, python=python, serve=serve, cache=cache, progress=progress_for(as_json)
    )
    emit(record, as_json, _text)


def _text(record: Mapping[str, Any]) -> str:
    from edgeslm import layout, wording

    files = record["files"]
    compiled = [f"{file['name']} {file['version']}" for file in files if file["compiled_here"]]
    return layout.facts([
        ("wheelhouse", f"{record['path']}, {wording.count(len(files), 'wheel')}, "
                       f"{wording.size(sum(file['bytes'] for file in files))}"),
        ("for", f"{record['profile']}: Python {record['python']}, glibc {record['glibc']} or newer, "
                f"{record['architecture']} with {' '.join(record['instruction_sets'])}"),
        ("holds", f"edgeslm[{','.join(record['extras'])}]"),
        ("compiled here", ", ".join(compiled) or "nothing"),
        ("on the device", f"sh {Path(record['path']).name}/install.sh"),
    ])  # fmt: skip
