"""What a bundle, a GGUF file or a Hugging Face model holds, what memory it needs, and the traps in it.

Reads headers only (and bytes that are compared): neither torch nor an engine is needed.  Whatever
a file does not say, or says in a way that makes no sense, is None.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.bundle import Bundle, open_bundle
from edgeslm.errors import ModelError
from edgeslm.footprint import (
    Shape,
    compute_buffer_bytes,
    kv_cache_bytes,
    number,
    shape_of_config,
    shape_of_gguf,
)
from edgeslm.gguf_file import GGML_TYPES, GgufFile, TensorInfo, read_gguf
from edgeslm.safetensors_file import SafeTensor, read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Tensor = TensorInfo | SafeTensor
    Record = dict[str, Any]

MAX_JSON_BYTES = 2**27

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


def inspect_model(source: str | Path, *, context: int, verify: bool) -> Record:
    """The record edgeslm.inspect/1 of a bundle, a .gguf file, a Hugging Face directory or any model source.

    context: tokens to estimate memory for.  verify: hash every file of a bundle (BundleError names a
    changed one).  Raises ModelError or BundleError for what is damaged or missing.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        return _inspect_directory(path, path.resolve().name, context)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(f"{path} is an adapter of {base}, not a model", hint=f"edgeslm inspect {base}")
    if path.exists():
        return _inspect_bundle(open_bundle(path, verify=verify), context, verified=verify)
    from edgeslm.stages.checkpoint import resolve

    checkpoint = resolve(str(source))
    if checkpoint.kind == "hf":
        return _inspect_directory(checkpoint.path, checkpoint.name, context)
    return _inspect_bundle(open_bundle(checkpoint.path), context, verified=False)


def _inspect_bundle(bundle: Bundle, context: int, *, verified: bool) -> Record:
    """A bundle directory or a bare GGUF file."""
    file = read_gguf(bundle.weights)
    shape = shape_of_gguf(file)
    head = file.tensors.get("output.weight")
    embedding = file.tensors.get("token_embd.weight")
    tokenizer = _gguf_tokenizer(file, shape)
    name = bundle.name if bundle.manifest else file.get("general.name") or bundle.name
    return _record(
        path=bundle.path,
        kind="gguf" if bundle.manifest is None else "bundle",
        name=_printable(name),
        architecture=_printable(file.architecture) or None,
        file_bytes=bundle.size_bytes,
        tensors=file.tensors.values(),
        shape=shape,
        tied=None if embedding is None else head is None,
        tokenizer=tokenizer,
        context=context,
        traps=[
            *_row_traps(file.tensors.values()),
            *_head_traps(embedding, head, file.path, file.path),
            *_gguf_tokenizer_traps(file, tokenizer),
            *_template_traps(tokenizer),
        ],
        verified=True if verified and bundle.manifest is not None else None,
    )


def _inspect_directory(path: Path, name: str, context: int) -> Record:
    """A Hugging Face directory with safetensors."""
    config = _read_json(path / "config.json")
    text_config = config.get("text_config")
    config = {**config, **text_config} if isinstance(text_config, dict) else config
    tensors = read_checkpoint(path)
    head = _ending(tensors, "lm_head.weight")
    embedding = _ending(tensors, "embed_tokens.weight")
    tie = config.get("tie_word_embeddings")
    tied = tie if isinstance(tie, bool) else head is None
    shape = shape_of_config(config)
    tokenizer = _hf_tokenizer(path, shape)
    paths = {tensor.path for tensor in tensors.values()}
    return _record(
        path=path,
        kind="hf",
        name=_printable(name),
        architecture=_printable(config.get("model_type")) or None,
        file_bytes=sum(file.stat().st_size for file in paths),
        tensors=tensors.values(),
        shape=shape,
        tied=tied,
        tokenizer=tokenizer,
        context=context,
        traps=[
            *_row_traps(tensors.values()),
            *(_head_traps(embedding, head, embedding.path, head.path) if embedding and head else ()),
            *_hf_tokenizer_traps(path, tokenizer),
            *_template_traps(tokenizer),
        ],
        verified=None,
    )


def _record(
    *, path: Path, kind: str, name: str, architecture: str | None, file_bytes: int, tensors: Iterable[Tensor],
    shape: Shape, tied: bool | None, tokenizer: Record, context: int, traps: Sequence[Record],
    verified: bool | None,
) -> Record:  # fmt: skip
    tensors = list(tensors)
    parameters = sum(tensor.parameters for tensor in tensors)
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "schema": "edgeslm.inspect/1",
        "path": str(path),
        "kind": kind,
        "name": name,
        "architecture": architecture,
        "parameters": parameters,
        "file_bytes": file_bytes,
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / parameters if parameters else None,
        "context_length": shape.context_length,
        "hidden_size": shape.hidden_size,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": max(shape.kv_heads, default=None),
        "head_dim": shape.key_length,
        "tied_embeddings": tied,
        "tokenizer": tokenizer,
        "kinds": _kinds(tensors),
        "tensors": [
            {"name": _printable(t.name), "shape": list(t.shape), "type": _type(t), "bytes": t.nbytes}
            for t in tensors
        ],
        "memory": _memory(shape, context, weight_bytes),
        "traps": list(traps),
        "verified": verified,
    }


def _memory(shape: Shape, context: int, weight_bytes: int) -> Record:
    """Weights count whole: they are mapped, and every token reads them."""
    kv_cache, compute = kv_cache_bytes(shape, context), compute_buffer_bytes(shape, context)
    known = kv_cache is not None and compute is not None
    return {
        "context": context,
        "weights_bytes": weight_bytes,
        "kv_cache_bytes": kv_cache,
        "compute_bytes": compute,
        "total_bytes": weight_bytes + (kv_cache or 0) + (compute or 0) if known else None,
    }


def _kinds(tensors: Iterable[Tensor]) -> list[Record]:
    """Tensors of the same part of every layer together, in the order of their first one."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        kind = re.sub(r"^(.*\.)?(blk|layers|h|blocks)\.\d+\.", "", tensor.name)
        groups.setdefault(re.sub(r"\.(weight|bias)$", "", kind), []).append(tensor)
    result = []
    for kind, members in groups.items():
        parameters = sum(tensor.parameters for tensor in members)
        nbytes = sum(tensor.nbytes for tensor in members)
        result.append(
            {
                "kind": _printable(kind),
                "tensors": len(members),
                "types": dict(Counter(map(_type, members))),
                "parameters": parameters,
                "bytes": nbytes,
                "bits_per_weight": 8 * nbytes / parameters if parameters else None,
            }
        )
    return result


def _type(tensor: Tensor) -> str:
    return tensor.type if isinstance(tensor, TensorInfo) else tensor.dtype


# ------------------------------------------------------------------------------------------ facts


def _gguf_tokenizer(file: GgufFile, shape: Shape) -> Record:
    tokens = file.get("tokenizer.ggml.tokens")

    def special(key: str) -> str | None:
        token = number(file.get(f"tokenizer.ggml.{key}_token_id"))
        if token is None or not isinstance(tokens, list) or token >= len(tokens):
            return None
        return _printable(tokens[token])

    return {
        "model": _printable(file.get("tokenizer.ggml.model")) or None,
        "pre": _printable(file.get("tokenizer.ggml.pre")) or None,
        "vocab_size": shape.vocab_size,
        "bos": special("bos"),
        "eos": special("eos"),
        "chat_template": bool(file.get("tokenizer.chat_template")),
    }


def _hf_tokenizer(path: Path, shape: Shape) -> Record:
    settings = _read_json(path / "tokenizer_config.json", missing_ok=True)
    model = _read_json(path / "tokenizer.json", missing_ok=True).get("model")
    if isinstance(model, dict):
        kind = _printable(model.get("type")) or None
    else:
        kind = "SentencePiece" if (path / "tokenizer.model").is_file() else None

    def special(key: str) -> str | None:
        token = settings.get(key)
        return _printable(token.get("content") if isinstance(token, dict) else token) or None

    template = settings.get("chat_template") or any(path.glob("chat_template.*"))
    return {
        "model": kind,
        "pre": None,
        "vocab_size": shape.vocab_size,
        "bos": special("bos_token"),
        "eos": special("eos_token"),
        "chat_template": bool(template),
    }


def _printable(value: Any) -> str:
    """Text of a file for a terminal: no control characters, and not without end."""
    if not isinstance(value, str):
        return ""
    return "".join(character if character.isprintable() else "\ufffd" for character in value[:200])


def _ending(tensors: Mapping[str, SafeTensor], name: str) -> SafeTensor | None:
    return next((tensor for key, tensor in tensors.items() if key == name or key.endswith("." + name)), None)


def _read_json(path: Path, *, missing_ok: bool = False) -> Record:
    """A JSON object of a model directory."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ModelError(f"{path} is missing") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


# ------------------------------------------------------------------------------------------ traps


def _trap(kind: str, text: str, hint: str) -> Record:
    return {"kind": kind, "text": text, "hint": hint}


def _row_traps(tensors: Iterable[Tensor]) -> list[Record]:
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
        traps.append(_trap("rows", text, "choose blocks of 32: IQ4_NL, Q4_0, Q5_0 or Q8_0"))
    ragged = [tensor for tensor in matrices if tensor.shape[-1] % 32]
    if ragged:
        text = (
            f"{len(ragged)} of {len(matrices)} matrices have rows of {_lengths(ragged)} values, which fill "
            "no blocks of 32 either: they stay F16 (16 bits)"
        )
        traps.append(_trap("rows", text, "choose a model whose widths are multiples of 32, better of 256"))
    return traps


def _lengths(tensors: Sequence[Tensor]) -> str:
    lengths = sorted({tensor.shape[-1] for tensor in tensors})
    return ", ".join(map(str, lengths[:4])) + (" ..." if len(lengths) > 4 else "")


def _stored(tensors: Sequence[Tensor]) -> str:
    """What quantized matrices are stored as already."""
    types = Counter(_type(tensor) for tensor in tensors)
    if all(name in ("F32", "F16", "BF16", "F64") or name not in GGML_TYPES for name in types):
        return ""
    return "; here they are " + ", ".join(f"{name} ({number})" for name, number in types.most_common())


def _head_traps(
    embedding: Tensor | None, head: Tensor | None, embedding_path: Path, head_path: Path
) -> list[Record]:
    """An output head that repeats the embedding byte by byte."""
    if embedding is None or head is None:
        return []
    if (embedding.shape, _type(embedding)) != (head.shape, _type(head)):
        return []
    if not _same_bytes(embedding_path, embedding.offset, head_path, head.offset, head.nbytes):
        return []
    text = (
        f"{head.name} is a copy of {embedding.name}: {head.parameters:,} parameters and "
        f"{head.nbytes:,} bytes are there twice"
    )
    hint = f"leave {head.name} out: the engine then uses {embedding.name} for both"
    return [_trap("tied_head", text, hint)]


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


def _template_traps(tokenizer: Record) -> list[Record]:
    if tokenizer["chat_template"] or tokenizer["model"] is None:
        return []
    return [
        _trap(
            "chat_template",
            "no chat template: chat can't mark whose turn it is",
            "use the instruction-tuned model, or add chat_template to tokenizer_config.json and convert again",
        )
    ]


def _gguf_tokenizer_traps(file: GgufFile, tokenizer: Record) -> list[Record]:
    again = "convert the model again from its Hugging Face directory"
    if not isinstance(file.get("tokenizer.ggml.tokens"), list):
        return [_trap("tokenizer", "no tokenizer: text can't be turned into tokens", again)]
    pre = tokenizer["pre"]
    if tokenizer["model"] != "gpt2" or pre in PRE_TOKENIZERS:
        return []
    if pre is None:
        text = "no tokenizer.ggml.pre: llama.cpp splits text by a default rule, and answers get worse"
        return [_trap("tokenizer_pre", text, again)]
    text = f"tokenizer.ggml.pre is {pre!r}, which llama.cpp does not know: it refuses the model"
    return [_trap("tokenizer_pre", text, f"use a newer llama-cpp-python, or {again}")]


def _hf_tokenizer_traps(path: Path, tokenizer: Record) -> list[Record]:
    if tokenizer["model"] is not None:
        return []
    text = f"no tokenizer: {path} has neither tokenizer.json nor tokenizer.model"
    return [_trap("tokenizer", text, "copy the tokenizer's files there, or save it with save_pretrained")]
