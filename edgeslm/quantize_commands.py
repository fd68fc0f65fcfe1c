"""The command that quantizes a model with no recipe; the options for ONNX are the recipe's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeslm.options import emit, json_option, progress_for, split_types
from edgeslm.specs import OnnxSpec
from edgeslm.table_options import as_tables, table_options

OWN = frozenset({"quantize__format", "quantize__scheme", "quantize__keep_going"})
"""Keys that have options of their own here."""


@click.command()
@click.argument("model")
@click.option("--to", "format_", type=click.Choice(["gguf", "onnx"]), default="gguf", show_default=True)
@click.option(
    "--scheme", help="A preset, a tensor type, or int8-dynamic, int4...  [default: Q4_K_M; ONNX: int4]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A .gguf file, or a bundle directory to create.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Text, JSONL or chat JSONL to measure importance on; or an "
    "importance matrix that llama-imatrix or edgeslm wrote.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="REGEX=TYPE",
    callback=split_types,
    help="GGUF: type of the tensors whose name matches; the first match counts.",
)
@click.option(
    "--keep-going", is_flag=True, help="Write what can be written when a tensor has NaN or infinity."
)
@table_options("quantize", but=OWN)
@json_option
def quantize(
    *,
    model: str,
    format_: str,
    scheme: str | None,
    out: Path,
    calibration: str | None,
    types: dict[str, str],
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL in one pass, with no recipe.

    MODEL is a Hugging Face directory or hub id (id@revision), a .gguf file, a PEFT adapter, or
    pkg://package/path.  The options from --block on are for ONNX.

    \b
    Example:  edgeslm quantize ./my-model --scheme Q4_K_M --calibration domain.txt --out my-model.gguf
              edgeslm quantize ./my-model --to onnx --scheme int4 --calibration domain.txt --out my-model
    """
    from edgeslm import console, quantizing

    onnx = OnnxSpec(**as_tables(options).get("quantize", {}).get("onnx", {}))
    result = quantizing.quantize(
        model, out, format=format_, scheme=scheme, calibration=calibration, types=types,
        keep_going=keep_going, onnx=onnx, progress=progress_for(as_json),
    )  # fmt: skip
    emit(result, as_json, console.quantize_text)
