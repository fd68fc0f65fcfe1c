"""Traps in a model: what makes it bigger than it looks, slower, or useless for chat.

Each is {kind, text, hint}: what is there, with numbers, and what to do about it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from edgeslm.gguf_file import GGML_TYPES
from edgeslm.safetensors_file import SafeTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from edgeslm.gguf_file import GgufFile, TensorInfo
    from edgeslm.onnx_file import OnnxTensor

    Stored = TensorInfo | SafeTensor
    Tensor = Stored | OnnxTensor
    Record = dict[str, Any]

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
