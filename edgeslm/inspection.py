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

from edgeslm import traps
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
from edgeslm.gguf_file import GgufFile, TensorInfo, read_gguf
from edgeslm.onnx_file import OnnxTensor, read_onnx
from edgeslm.operators import minimum
from edgeslm.safetensors_file import SafeTensor, read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Tensor = TensorInfo | SafeTensor | OnnxTensor
    Record = dict[str, Any]

MAX_JSON_BYTES = 2**27


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
    if bundle.format == "onnx":
        return _inspect_onnx(bundle, context, verified=verified)
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
        found=[
            *traps.row_traps(file.tensors.values()),
            *traps.head_traps(embedding, head, file.path, file.path),
            *traps.gguf_tokenizer_traps(file, tokenizer),
            *traps.template_traps(tokenizer),
        ],
        verified=True if verified and bundle.manifest is not None else None,
    )


def _inspect_onnx(bundle: Bundle, context: int, *, verified: bool) -> Record:
    """A bundle in the format onnx: what its manifest says, and the graph and tensors of its file."""
    file = read_onnx(bundle.weights)
    manifest = bundle.manifest or {}
    model = manifest.get("model") or {}
    facts = model.get("preprocessing")
    facts = facts if isinstance(facts, dict) else {}
    shape = shape_of_config({
        "max_position_embeddings": facts.get("max_tokens") or model.get("context_length"),
        "vocab_size": model.get("vocab_size"), "num_hidden_layers": model.get("layers"),
        "num_key_value_heads": model.get("kv_heads"), "head_dim": model.get("head_dim"),
    })  # fmt: skip
    quantization = manifest.get("quantization") or {}
    # A language model's levels are compared with each other; a classifier's loss was measured at the one it has.
    held = (manifest.get("quality") or {}).get("accuracy_level") or quantization.get("accuracy_audit")
    lost = (quantization.get("onnx") or {}).get("kl_nats")
    found = traps.onnx_traps(file, audited=bool(held) or lost is not None)
    record = _record(
        path=bundle.path, kind="bundle", name=_printable(bundle.name), tensors=file.tensors.values(), shape=shape,
        architecture=_printable(model.get("architecture")) or None, file_bytes=bundle.size_bytes, tied=None,
        tokenizer=_bundle_tokenizer(bundle, shape), context=context, found=found, verified=verified or None,
    )  # fmt: skip
    record |= {
        "opset": file.opset,
        "ir_version": file.ir_version,
        "operators": [_printable(operator) for operator in file.operators],
        "onnxruntime": minimum(file),
        "data_files": [_printable(path.name) for path in file.data_files],
    }
    # The weights in blocks are fewer bytes than parameters: the manifest counts what they stand for.
    parameters = number(model.get("parameters"))
    if parameters is not None and quantization.get("scheme") != "F32":
        record |= {
            "parameters": parameters,
            "bits_per_weight": 8 * record["weight_bytes"] / max(parameters, 1),
        }
    if not bundle.is_classifier:
        kv_cache = kv_cache_bytes(shape, context)
        kv_cache = None if kv_cache is None else 2 * kv_cache  # float32, where llama.cpp has f16
        return record | {"memory": {**record["memory"], "kv_cache_bytes": kv_cache, "kv_type": "f32"}}
    labels = model.get("labels")
    return record | {
        "memory": None,
        "labels": [_printable(label) for label in labels] if isinstance(labels, list) else [],
        "preprocessing": facts,
        "decision": manifest.get("decision"),
    }


def _bundle_tokenizer(bundle: Bundle, shape: Shape) -> Record:
    """What the manifest of an ONNX bundle says of its tokenizer; empty where it has none."""
    model = (bundle.manifest or {}).get("model") or {}
    kind = _printable(model.get("tokenizer"))
    if not kind:
        return {}
    record: Record = {"model": kind, "vocab_size": shape.vocab_size}
    if bundle.is_classifier:
        return record
    return record | {
        "pre": None,
        "bos": _printable(model.get("bos_token")) or None,
        "eos": _printable(model.get("eos_token")) or None,
        "chat_template": (bundle.path / "chat_template.jinja").is_file(),
    }


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
        found=[
            *traps.row_traps(tensors.values()),
            *(traps.head_traps(embedding, head, embedding.path, head.path) if embedding and head else ()),
            *traps.hf_tokenizer_traps(path, tokenizer),
            *traps.template_traps(tokenizer),
        ],
        verified=None,
    )


def _record(
    *, path: Path, kind: str, name: str, architecture: str | None, file_bytes: int, tensors: Iterable[Tensor],
    shape: Shape, tied: bool | None, tokenizer: Record, context: int, found: Sequence[Record],
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
            {"name": _printable(t.name), "shape": list(t.shape), "type": traps.type_of(t), "bytes": t.nbytes}
            for t in tensors
        ],
        "memory": _memory(shape, context, weight_bytes),
        "traps": list(found),
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
        "kv_type": "f16",
        "compute_bytes": compute,
        "total_bytes": weight_bytes + (kv_cache or 0) + (compute or 0) if known else None,
    }


def _kinds(tensors: Iterable[Tensor]) -> list[Record]:
    """Tensors of the same part of every layer together, in the order of their first one."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        kind = re.sub(r"^(.*\.)?(blk|layers?|h|blocks)\.\d+\.", "", tensor.name)
        # What an ONNX exporter turned or joined has a number for its name.
        groups.setdefault(re.sub(r"(\.(weight|bias)|(?<=^onnx::\w{2})\w*_\d+)$", "", kind), []).append(tensor)
    result = []
    for kind, members in groups.items():
        parameters = sum(tensor.parameters for tensor in members)
        nbytes = sum(tensor.nbytes for tensor in members)
        result.append(
            {
                "kind": _printable(kind),
                "tensors": len(members),
                "types": dict(Counter(map(traps.type_of, members))),
                "parameters": parameters,
                "bytes": nbytes,
                "bits_per_weight": 8 * nbytes / parameters if parameters else None,
            }
        )
    return result


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
