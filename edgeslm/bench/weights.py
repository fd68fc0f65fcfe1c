"""The weights of an artifact as its speed depends on them: how many, how large, what a decode step reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeslm.gguf_file import read_gguf
from edgeslm.onnx_file import read_onnx

if TYPE_CHECKING:
    from edgeslm.bundle import Bundle
    from edgeslm.gguf_file import GgufFile
    from edgeslm.onnx_file import OnnxFile

GATHERED = ("per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")
"""GGUF tables of which a decode step reads one row; token_embd.weight too, unless it is also the head."""
GATHERED_INPUTS = {
    "ai.onnx:Gather": (0,),
    "com.microsoft:GatherBlockQuantized": (0, 2, 3),
    "com.microsoft:GroupQueryAttention": (7, 8),
    "com.microsoft:RotaryEmbedding": (2, 3),
}
"""ONNX operators to those of their inputs of which a decode step reads one row: embeddings and RoPE's tables."""

VIEWS = ("ai.onnx:Identity", "ai.onnx:Reshape", "ai.onnx:Squeeze", "ai.onnx:Transpose", "ai.onnx:Unsqueeze")
"""Operators whose result is their first input in another shape."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Sizes in bytes; a tied embedding counts once."""

    architecture: str
    parameters: int
    weight_bytes: int
    decode_bytes: int
    """What one decode step reads of them."""


def read_weights(bundle: Bundle) -> Weights:
    """The weights of a language model.  Raises ModelError for a damaged file."""
    if bundle.format == "gguf":
        file = read_gguf(bundle.weights)
        return Weights(
            architecture=file.architecture,
            parameters=sum(tensor.parameters for tensor in file.tensors.values()),
            weight_bytes=sum(tensor.nbytes for tensor in file.tensors.values()),
            decode_bytes=decode_bytes(file),
        )
    graph = read_onnx(bundle.weights)
    manifest = bundle.manifest or {}
    model, plan = manifest.get("model") or {}, manifest.get("quantization") or {}
    types = plan.get("types") or {}
    return Weights(
        architecture=str(model.get("architecture")),
        # A tensor of packed blocks does not tell how many weights it holds.
        parameters=int(model.get("parameters") or 0),
        weight_bytes=sum(int(found["bytes"]) for found in types.values()),
        decode_bytes=onnx_decode_bytes(graph),
    )


def decode_bytes(file: GgufFile) -> int:
    """Bytes of weights that one decode step reads: all but tables of which it takes a row.

    A tied token_embd is the head too and is read whole; of a mixture's experts only those in use.
    """
    tied = "output.weight" not in file.tensors
    experts, used = (file.get(f"{file.architecture}.{key}") for key in ("expert_count", "expert_used_count"))
    total = 0.0
    for tensor in file.tensors.values():
        if tensor.name in GATHERED or (tensor.name == "token_embd.weight" and not tied):
            continue
        total += tensor.nbytes * (used / experts if experts and used and "_exps." in tensor.name else 1)
    return int(total)


def onnx_decode_bytes(file: OnnxFile) -> int:
    """Bytes of initializers that one decode step reads: all but those of which every use takes a row."""
    whole: set[str] = set()
    for node in reversed(file.nodes):  # a node comes before those that use its outputs
        rows = GATHERED_INPUTS.get(node.operator, ())
        if node.operator in VIEWS and not whole.intersection(node.outputs):
            rows = (0,)
        whole.update(name for place, name in enumerate(node.inputs) if place not in rows)
    return sum(tensor.nbytes for tensor in file.tensors.values() if tensor.name in whole)
