"""The command that brings a bundle to devices, and what --on of other commands stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm.options import ARTIFACT, SSH, emit, json_option, progress_for, save, ssh_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeslm.fleet.ssh import Access, Target

    Record = Mapping[str, Any]

NOT_SENT = ("artifact", "on", "out", "as_json", *SSH)
"""Parameters that are about this side."""


@click.command()
@click.argument("artifact", type=ARTIFACT)
@click.argument("devices", nargs=-1, required=True, metavar="[USER@]HOST[:DIR]...")
@ssh_options
@click.option("--force", is_flag=True, help="Copy although a check of the device speaks against it.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record to this file.")
@json_option
def deploy(
    *, artifact: Path, devices: tuple[str, ...], force: bool, out: Path | None, as_json: bool, **access: Any
) -> None:
    """Copy ARTIFACT to devices over SSH and switch to it there in one step.

    The device is examined first.  Only files that are not there are sent, each is verified there, and
    DIR/current points to the old release until the new one is whole: a call that was cut short is gone on
    with by the next one.  Default of DIR: edgeslm/NAME in the home directory.

    \b
    Example:  edgeslm deploy smollm2-q4 pi@raspberrypi.local
              edgeslm deploy smollm2-q4 pi4 pi5:/srv/chat --ssh-batch
    """
    from edgeslm import console_fleet
    from edgeslm.fleet.deploy import deploy as deploy_to

    record = deploy_to(
        artifact, _targets(devices), access=_access(access), force=force, progress=progress_for(as_json)
    )
    save(record, out)
    _tell(record, as_json, console_fleet.deploy_text)


def bench_on(artifact: Path, on: Sequence[str], access: Record, *, out: Path | None, as_json: bool) -> None:
    """`edgeslm bench` on the devices of --on, with the options that this call was given."""
    from edgeslm import console_fleet
    from edgeslm.fleet import remote

    record = remote.bench_on(
        artifact, _targets(on), given_options(click.get_current_context()), access=_access(access),
        progress=progress_for(as_json),
    )  # fmt: skip
    if out is not None and len(on) == 1 and record["records"]:
        save(record["records"][0], out)
    elif out is not None and record["records"]:
        remote.write_comparison(record["records"], out)
    _tell(record, as_json, console_fleet.bench_text)


def run_on(artifact: Path, device: str, name: str, words: Sequence[str], access: Record) -> None:
    """A command that talks to a model, on the device of --on; ends with its exit status."""
    from edgeslm.fleet import remote

    options = given_options(click.get_current_context(), ("as_json",))
    status = remote.run_on(
        artifact, _targets([device])[0], name, [*options, *words], access=_access(access),
        progress=progress_for(True),
    )  # fmt: skip
    if status:
        raise SystemExit(status)


def given_options(context: click.Context, also: Sequence[str] = ()) -> list[str]:
    """The options of this call that were given and are not about this side, as words.

    also: names of NOT_SENT that go over as well.
    """
    words: list[str] = []
    for option in context.command.params:
        name = str(option.name)
        source = context.get_parameter_source(name)
        given = source not in (click.core.ParameterSource.DEFAULT, None)
        if not isinstance(option, click.Option) or not given or (name in NOT_SENT and name not in also):
            continue
        value = context.params[name]
        long = max(option.opts, key=len)
        if option.is_flag:
            words.append(long if value else option.secondary_opts[0])
        elif option.multiple:
            words += [word for each in value for word in (long, str(each))]
        elif isinstance(value, tuple):
            words += [long, ",".join(map(str, value))]
        elif name == "flash_attention":
            words += [long, {None: "auto", True: "on", False: "off"}[value]]
        else:
            words += [long, str(value)]
    return words


def _tell(record: Record, as_json: bool, render: Callable[[Record], str]) -> None:
    """Print a record and raise for the devices that failed; of one device that failed the error says it all."""
    from edgeslm.fleet.deploy import raise_for_failures

    hosts = record["hosts"]
    if as_json or len(hosts) > 1 or hosts[0]["status"] != "failed":
        emit(record, as_json, render)
    raise_for_failures(hosts)


def _targets(devices: Sequence[str]) -> list[Target]:
    from edgeslm.errors import RecipeError
    from edgeslm.fleet.ssh import parse_target

    targets = [parse_target(device) for device in devices]
    twice = {target.host for target in targets if targets.count(target) > 1}
    if twice:
        raise RecipeError(f"{', '.join(sorted(twice))} is named twice", hint="name each device once")
    return targets


def _access(values: Record) -> Access:
    from edgeslm.fleet.ssh import Access

    return Access(options=values["ssh_option"], batch=values["ssh_batch"], python=values["python"])
