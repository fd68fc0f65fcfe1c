"""The commands about this machine and where to begin: doctor, init, devices."""

from __future__ import annotations

from pathlib import Path

import click

from edgeslm.options import emit, json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has and what to install for what is missing.

    \b
    Example:  edgeslm doctor
    """
    from edgeslm import console
    from edgeslm.doctor import diagnose

    emit(diagnose(), as_json, console.doctor_text)


@click.command()
@click.argument("model")
@click.option("--device", default="x86-64-laptop", show_default=True, help="A profile of `edgeslm devices`.")
@click.option("--out", type=click.Path(path_type=Path), help="Recipe file to create.  [default: print it]")
@json_option
def init(model: str, device: str, out: Path | None, as_json: bool) -> None:
    """Write a commented recipe for MODEL.

    \b
    Example:  edgeslm init HuggingFaceTB/SmolLM2-135M-Instruct --device rpi5-8gb --out chat.toml
    """
    from edgeslm.device import load_device
    from edgeslm.recipe import recipe_template, write_template

    load_device(device)  # an unknown profile is an error before anything is written
    text = recipe_template(model, device)
    if out is not None:
        write_template(text, out)
    emit(
        {"recipe": text, "path": str(out) if out else None},
        as_json,
        lambda _: f"wrote {out}" if out else text,
    )


@click.command()
@click.argument("name", required=False)
@json_option
def devices(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show one with the source of every value.

    \b
    Example:  edgeslm devices rpi5-8gb
    """
    from edgeslm import console
    from edgeslm.device import describe_devices

    emit(describe_devices(name), as_json, console.devices_text)
