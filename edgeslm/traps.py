"""Traps in a model: what makes it bigger than it looks, slower, or useless for chat.

Each is {kind, text, hint}: what is there, with numbers, and what to do about it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm import operators
from edgeslm.gguf_file import GGML_TYPES
from edgeslm.safetensors_file import SafeTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.gguf_file import GgufFile, TensorInfo
    from edgeslm.onnx_file import OnnxFile, OnnxTensor

    Stored = TensorInfo | SafeTensor
    Tensor = Stored | OnnxTensor
    Record = dict[str, Any]

MIN_COPY_BYTES = 2**16
"""Smaller weights may be equal by chance, or be there twice for all it matters."""
_LOOKUPS = ("ai.onnx:Gather", "com.microsoft:GatherBlockQuantized")
_PRODUCTS = ("ai.onnx:MatMul", "ai.onnx:Gemm", "ai.onnx:MatMulInteger", "com.microsoft:MatMulNBits")
_WORDS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2", "I8": "u1", "U8": "u1"}
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama-quantize writes for rows that don't fill blocks of 256 (llama-quant.cpp, tensor_type_fallback)."""

# llama-vocab.cpp of the llama.cpp in llama-cpp-python 0.3.36; another name makes it refuse the model.
PRE_TOKENIZERS = frozenset(
    """default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano
    deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de
    gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4 granite-embed-multi-311m sarvam-moe
    jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35
    stablelm2 olmo dbrx smaug-bpe poro-chat chatglm-bpe glm4 glm5 viking jais tekken smollm codeshell bloom
    gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie
    granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe bailingmoe2
    llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2
    solar-open mellum2""".split()  # noqa: SIM905
)


def trap(kind: str, text: str, hint: str) -> Record:
    return {"kind": kind, "text": text, "hint": hint}


def row_traps(tensors: Iterable[Tensor]) -> list[Record]:
    """Matrices whose rows fill no blocks of 256 values, or not even blocks of 32."""
    matrices = [
        tensor
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.name.endswith("weight") and "norm" not in tensor.name
    ]
    traps = []
    uneven = [tensor for tensor in matrices if tensor.shape[-1] % 256 and tensor.shape[-1] % 32 == 0]
    if uneven:
        costs = ", ".join(
            f"{wanted} becomes {got} ({GGML_TYPES[got].bits:g} bits for {GGML_TYPES[wanted].bits:.3g})"
            for wanted, got in FALLBACKS.items()
        )
        text = (
            f"{len(uneven)} of {len(matrices)} matrices have rows of {_lengths(uneven)} values, which don't "
            f"fill the blocks of 256 of a K-quant: {costs}{_stored(uneven)}"
        )
        traps.append(trap("rows", text, "choose blocks of 32: IQ4_NL, Q4_0, Q5_0 or Q8_0"))
    ragged = [tensor for tensor in matrices if tensor.shape[-1] % 32]
    if ragged:
        text = (
            f"{len(ragged)} of {len(matrices)} matrices have rows of {_lengths(ragged)} values, which fill "
            "no blocks of 32 either: they stay F16 (16 bits)"
        )
        traps.append(trap("rows", text, "choose a model whose widths are multiples of 32, better of 256"))
    return traps


def _lengths(tensors: Sequence[Tensor]) -> str:
    lengths = sorted({tensor.shape[-1] for tensor in tensors})
    return ", ".join(map(str, lengths[:4])) + (" ..." if len(lengths) > 4 else "")


def _stored(tensors: Sequence[Tensor]) -> str:
    """What quantized matrices are stored as already."""
    types = Counter(type_of(tensor) for tensor in tensors)
    if all(name in ("F32", "F16", "BF16", "F64") or name not in GGML_TYPES for name in types):
        return ""
    return "; here they are " + ", ".join(f"{name} ({number})" for name, number in types.most_common())


def head_traps(
    embedding: Stored | None, head: Stored | None, embedding_path: Path, head_path: Path
) -> list[Record]:
    """An output head that repeats the embedding byte by byte."""
    if embedding is None or head is None:
        return []
    if (embedding.shape, type_of(embedding)) != (head.shape, type_of(head)):
        return []
    if not _same_bytes(embedding_path, embedding.offset, head_path, head.offset, head.nbytes):
        return []
    text = (
        f"{head.name} is a copy of {embedding.name}: {head.parameters:,} parameters and "
        f"{head.nbytes:,} bytes are there twice"
    )
    hint = f"leave {head.name} out: the engine then uses {embedding.name} for both"
    return [trap("tied_head", text, hint)]


def _same_bytes(one: Path, one_offset: int, other: Path, other_offset: int, nbytes: int) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        first.seek(one_offset)
        second.seek(other_offset)
        while nbytes > 0:
            part = first.read(min(nbytes, 2**20))
            if not part or part != second.read(len(part)):
                return False
            nbytes -= len(part)
    return True


def onnx_traps(file: OnnxFile, audited: bool) -> list[Record]:
    """Traps of an ONNX graph.  audited: whether its accuracy level was held against exact activations."""
    return [*_copied_tables(file), *_accuracy_traps(file, audited), *_operator_traps(file)]


def _copied_tables(file: OnnxFile) -> list[Record]:
    """A table of vectors that a product has once more: as it is, or turned."""
    tables = dict.fromkeys(node.inputs[0] for node in file.nodes if node.operator in _LOOKUPS and node.inputs)
    weights = dict.fromkeys(node.inputs[1] for node in file.nodes
                            if node.operator in _PRODUCTS and len(node.inputs) > 1)  # fmt: skip
    found = []
    for table in filter(None, map(file.tensors.get, tables)):
        for weight in filter(None, map(file.tensors.get, weights)):
            if weight.name == table.name or table.nbytes < MIN_COPY_BYTES or not _same_values(table, weight):
                continue
            text = (
                f"{weight.name} is a copy of {table.name}: {weight.parameters:,} values and "
                f"{weight.nbytes:,} bytes are there twice"
            )
            found.append(trap("tied_head", text, "export it again: edgeslm keeps tied weights once"))
    return found


def _same_values(one: OnnxTensor, other: OnnxTensor) -> bool:
    if one.nbytes != other.nbytes or one.type != other.type or one.offset is None or other.offset is None:
        return False
    if one.path == other.path and one.offset == other.offset:
        return False  # the same bytes under two names
    if _same_bytes(one.path, one.offset, other.path, other.offset, one.nbytes):
        return True
    if len(one.shape) != 2 or other.shape != one.shape[::-1] or one.type not in _WORDS:
        return False
    first, second = _mapped(one), _mapped(other)
    step = max(1, 2**20 // one.shape[1])
    return all(
        np.array_equal(first[start : start + step], second[:, start : start + step].T)
        for start in range(0, one.shape[0], step)
    )


def _mapped(tensor: OnnxTensor) -> NDArray[Any]:
    """The values [rows, columns] where they lie, as whole numbers of their size."""
    assert tensor.offset is not None
    return np.memmap(tensor.path, _WORDS[tensor.type], "r", tensor.offset, tensor.shape)


def _accuracy_traps(file: OnnxFile, audited: bool) -> list[Record]:
    levels = [
        node.attributes.get("accuracy_level", 0)
        for node in file.nodes
        if node.operator == "com.microsoft:MatMulNBits"
    ]
    found = []
    if levels and not all(levels):
        text = (
            f"{levels.count(0)} of {len(levels)} MatMulNBits have no accuracy_level: activations stay float32, "
            "which is exact and about half as fast"
        )
        found.append(trap("accuracy_level", text, "set accuracy_level = 4 in [quantize.onnx] and audit it"))
    if 4 in levels and not audited:
        text = (
            f"{levels.count(4)} of {len(levels)} MatMulNBits have accuracy_level 4: activations become 8 bits, "
            "which can change the answers, and nobody has compared them"
        )
        found.append(trap("accuracy_level", text, "build it with edgeslm, which audits the level"))
    return found


def _operator_traps(file: OnnxFile) -> list[Record]:
    foreign = operators.unknown(file)
    if not foreign:
        return []
    text = f"it needs operators that ONNX Runtime does not bring along: {', '.join(foreign[:4])}"
    return [trap("operators", text, "export the model without custom operators")]


def template_traps(tokenizer: Record) -> list[Record]:
    if tokenizer["chat_template"] or tokenizer["model"] is None:
        return []
    return [
        trap(
            "chat_template",
            "no chat template: chat can't mark whose turn it is",
            "use the instruction-tuned model, or add chat_template to tokenizer_config.json and convert again",
        )
    ]


def gguf_tokenizer_traps(file: GgufFile, tokenizer: Record) -> list[Record]:
    again = "convert the model again from its Hugging Face directory"
    if not isinstance(file.get("tokenizer.ggml.tokens"), list):
        return [trap("tokenizer", "no tokenizer: text can't be turned into tokens", again)]
    pre = tokenizer["pre"]
    if tokenizer["model"] != "gpt2" or pre in PRE_TOKENIZERS:
        return []
    if pre is None:
        text = "no tokenizer.ggml.pre: llama.cpp splits text by a default rule, and answers get worse"
        return [trap("tokenizer_pre", text, again)]
    text = f"tokenizer.ggml.pre is {pre!r}, which llama.cpp does not know: it refuses the model"
    return [trap("tokenizer_pre", text, f"use a newer llama-cpp-python, or {again}")]


def hf_tokenizer_traps(path: Path, tokenizer: Record) -> list[Record]:
    if tokenizer["model"] is not None:
        return []
    text = f"no tokenizer: {path} has neither tokenizer.json nor tokenizer.model"
    return [trap("tokenizer", text, "copy the tokenizer's files there, or save it with save_pretrained")]


def type_of(tensor: Tensor) -> str:
    """The type of its values, as the file's format calls it."""
    return tensor.dtype if isinstance(tensor, SafeTensor) else tensor.type
