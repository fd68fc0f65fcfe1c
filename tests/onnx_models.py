"""Tiny ONNX classifiers and their bundles, written byte by byte: no torch and no onnx package.

onnx/onnx.proto gives the field numbers; the onnx package, where it is installed, is the tests' oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bundle import write_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle

LABELS = ("ham", "spam", "other")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "win", "money", "now", "meeting", "at", "noon", "hello")
CHANNELS = ("rms", "kurtosis", "temperature")
NORMALIZATION = {
    "channels": list(CHANNELS), "center": [1.0, 3.0, 40.0], "scale": [0.5, 2.0, 10.0], "kind": "standard",
}  # fmt: skip
ROWS = 4
_KINDS = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}


def varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, array: NDArray[Any], *more: bytes) -> bytes:
    """A TensorProto with raw data."""
    dims = b"".join(field(1, extent) for extent in array.shape)
    return dims + field(2, _KINDS[array.dtype]) + field(8, name) + field(9, array.tobytes()) + b"".join(more)


def value_info(name: str, kind: int, shape: tuple[int | str, ...]) -> bytes:
    axes = b"".join(
        field(1, field(1, extent) if isinstance(extent, int) else field(2, extent)) for extent in shape
    )
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, axes)))


def node(operator: str, inputs: tuple[str, ...], output: str, **integers: int) -> bytes:
    data = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operator)
    for name, value in integers.items():
        data += field(5, field(1, name) + field(3, value) + field(20, 2))
    return data


def model(graph: bytes, *, opset: int = 17, producer: str = "hand") -> bytes:
    return field(1, 8) + field(2, producer) + field(7, graph) + field(8, field(1, "") + field(2, opset))


def graph(nodes: list[bytes], tensors: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    parts = ((1, nodes), (5, tensors), (11, inputs), (12, outputs))
    return field(2, "g") + b"".join(field(number, each) for number, several in parts for each in several)


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    return {
        "embedding": drawn(len(WORDS), 5), "head": drawn(5, len(LABELS)), "bias": drawn(len(LABELS)),
        "sensor_head": drawn(ROWS * len(CHANNELS), 2), "sensor_bias": drawn(2),
    }  # fmt: skip


def text_model(labels: int = len(LABELS), seed: int = 0) -> bytes:
    """Sum of the unmasked tokens' vectors, times a matrix, plus a bias."""
    held = weights(seed)
    axes = {name: np.asarray([axis], np.int64) for name, axis in (("one", 1), ("two", 2))}
    nodes = [
        node("Gather", ("embedding", "input_ids"), "vectors", axis=0),
        node("Cast", ("attention_mask",), "mask", to=1),
        node("Unsqueeze", ("mask", "two"), "wide"),
        node("Mul", ("vectors", "wide"), "kept"),
        node("ReduceSum", ("kept", "one"), "sum", keepdims=0),
        node("MatMul", ("sum", "head"), "scores"),
        node("Add", ("scores", "bias"), "logits"),
    ]
    tensors = [tensor(name, held[name]) for name in ("embedding", "head", "bias")]
    tensors += [tensor(name, value) for name, value in axes.items()]
    inputs = [value_info(name, 7, ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    return model(graph(nodes, tensors, inputs, [value_info("logits", 1, ("batch", labels))]))


def sensor_model(seed: int = 0) -> bytes:
    """One linear layer over all readings of a window."""
    held = weights(seed)
    nodes = [
        node("Flatten", ("readings",), "flat", axis=1),
        node("MatMul", ("flat", "sensor_head"), "scores"),
        node("Add", ("scores", "sensor_bias"), "logits"),
    ]
    tensors = [tensor(name, held[name]) for name in ("sensor_head", "sensor_bias")]
    inputs = [value_info("readings", 1, ("batch", ROWS, len(CHANNELS)))]
    return model(graph(nodes, tensors, inputs, [value_info("logits", 1, ("batch", 2))]))


def tokenizer_json() -> str:
    """Words by white space with [CLS] before them; it pads and cuts by itself, as real files may."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(3)
    return str(tokenizer.to_str())


def manifest(kind: str, **changes: Any) -> dict[str, Any]:
    if kind == "text":
        labels, preprocessing = list(LABELS), {"kind": "text", "max_tokens": 6, "pad_id": 0}
        parameters = 10 * 5 + 5 * 3 + 3
    else:
        labels = ["failure", "normal"]
        preprocessing = {
            "kind": "sensors", "channels": list(CHANNELS), "rows": ROWS, "stride": 2, "normalization": NORMALIZATION,
        }  # fmt: skip
        parameters = ROWS * 3 * 2 + 2
    types = {"F32": {"tensors": 3, "parameters": parameters, "bytes": 4 * parameters}}
    record = {
        "name": f"tiny-{kind}",
        "task": "text-classification" if kind == "text" else "sensor-classification",
        "format": "onnx",
        "weights": "model.onnx",
        "model": {
            "architecture": "hand", "parameters": parameters, "labels": labels, "preprocessing": preprocessing,
            "opset": 17, "source": "hand", "source_sha256": "77" * 32,
        },
        "quantization": {"scheme": "F32", "bits_per_weight": 32.0, "importance": None, "types": types,
                         "fallbacks": []},
    }  # fmt: skip
    return record | changes


def write_classifier(out: Path, kind: str = "text", *, data: bytes | None = None, **changes: Any) -> Bundle:
    """A bundle of the kind text or sensors.  data: another graph; changes: of the manifest."""
    files: dict[str, Any] = {"model.onnx": data or (text_model() if kind == "text" else sensor_model())}
    if kind == "text":
        files["tokenizer.json"] = tokenizer_json()
    return write_bundle(out, files=files, manifest=manifest(kind, **changes))


def text_logits(token_rows: list[list[int]], seed: int = 0) -> NDArray[np.float64]:
    """What text_model gives for each row of tokens, by hand."""
    held = weights(seed)
    sums = np.stack([held["embedding"][row].astype(np.float64).sum(axis=0) for row in token_rows])
    return np.asarray(sums @ held["head"] + held["bias"])
