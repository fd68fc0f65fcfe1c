"""Options that several commands share, how their values are read, and how a record is printed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgeslm.progress import Progress

ARTIFACT = click.Path(path_type=Path)


def progress_for(as_json: bool) -> Progress:
    from edgeslm.progress import Quiet, for_terminal

    return Quiet() if as_json else for_terminal()


def emit(record: Mapping[str, Any], as_json: bool, render: Callable[[Mapping[str, Any]], str]) -> None:
    """Print a record: as JSON for machines or as text for people."""
    click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False) if as_json else render(record))


def save(record: Mapping[str, Any], out: Path | None) -> None:
    """Write a record to the file that --out names."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


class LazyCommand(click.Command):
    """A command whose module loads when it is used, not when it is listed."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self.module = module

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> click.Command:
        """The command itself."""
        command: click.Command = getattr(import_module(self.module), str(self.name))
        return command


def processes_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """How many processes a launcher (accelerate launch, torchrun) started, as it says in the environment."""
    return click.option("--processes", envvar="WORLD_SIZE", type=int, default=1, hidden=True)(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json, the same everywhere."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")(
        function
    )


def runner_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a runner, the same for every command that loads a model."""
    options = (
        click.option("-c", "--context", type=click.IntRange(min=8), help="Tokens that the KV cache holds."),
        click.option("-b", "--batch", type=click.IntRange(min=1), default=2048, show_default=True,
                     help="Most tokens in one call of the engine."),
        click.option("-ub", "--ubatch", type=click.IntRange(min=1), default=512, show_default=True,
                     help="Most tokens computed at once."),
        click.option("--kv-type", help="Element type of the KV cache.  [default: f16; ONNX: as its graph has it]"),
        click.option("-ngl", "--gpu-layers", type=click.IntRange(min=0),
                     help="GGUF: layers that the GPU computes, where llama.cpp has one; 0: none.  [default: all]"),
        click.option("--provider", type=click.Choice(["cpu", "coreml", "xnnpack", "nnapi"]),
                     help="ONNX: the execution provider.  [default: cpu]"),
        click.option("-fa", "--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto",
                     callback=_flash, show_default=True),
        click.option("--mmap/--no-mmap", default=True, show_default=True, help="Map the file or read it."),
        click.option("--mlock", is_flag=True, help="Keep the weights in memory."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


SSH = ("ssh_option", "ssh_batch", "python")
"""Parameters of ssh_options."""


def ssh_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How devices are reached over SSH, the same for every command that works on one."""
    options = (
        click.option("--ssh-option", multiple=True, metavar="KEY=VALUE",
                     help="An option of ssh_config, such as Port=2222; may be given several times."),
        click.option("--ssh-batch", is_flag=True, help="SSH: fail rather than ask for a password or about a host key."),
        click.option("--python", metavar="PATH",
                     help="On the device: the Python that has edgeslm.  [default: looked for]"),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def on_option(*, multiple: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--on, and with it the options of ssh_options."""
    several = "; may be given several times" if multiple else ""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        return click.option(
            "--on",
            multiple=multiple,
            metavar="[USER@]HOST[:DIR]",
            help=f"Run on this device, over SSH{several}.",
        )(ssh_options(function))

    return add


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How the next token is chosen."""
    options = (
        click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True,
                     help="0 takes the likeliest token every time."),
        click.option("--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="0: no limit."),
        click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True),
        click.option("--repeat-penalty", type=click.FloatRange(min=0.01), default=1.0, show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _flash(_context: click.Context, _parameter: click.Parameter, value: str) -> bool | None:
    return {"auto": None, "on": True, "off": False}[value]


def split_numbers(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """'1,2,4' as (1, 2, 4)."""
    try:
        numbers = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 up, such as 1,2,4")
    return numbers


def split_rates(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """('failure=0.01', ...) as a mapping; the last '=' divides."""
    if not all(value.rpartition("=")[0] for value in values):
        raise click.BadParameter(f"{', '.join(values)!r} is not CLASS=NUMBER, such as failure=0.01")
    try:
        return {
            name: float(number) for name, _, number in (value.rpartition("=") for value in values) if name
        }
    except ValueError:
        raise click.BadParameter(f"{', '.join(values)!r} is not CLASS=NUMBER, such as failure=0.01") from None


def split_types(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """('attn_v=Q8_0', ...) as a mapping; the last '=' divides, since a pattern may hold one."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not REGEX=TYPE, such as 'ffn_down=Q6_K'")
    return dict(value.rsplit("=", 1) for value in values)
