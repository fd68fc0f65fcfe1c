"""The tensors of a checkpoint, still in their files: name, shape, and slabs of rows as float32.

R rows, I elements in a row.  Nothing is mapped: slabs are read, so that the source's pages never
count as this process's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError
from edgeslm.gguf_file import GgufFile, row_bytes
from edgeslm.safetensors_file import SafeTensor, read_checkpoint
from edgeslm.stages import ggml
from edgeslm.stages.architectures import architecture_of, extra_tensors, row_order, tensor_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.rope import Config

SLAB_ELEMENTS = 1 << 22
"""Elements that one worker holds at a time: 16 MiB of float32."""

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to export, still in its file: R rows of I elements at an offset, or `values` in memory."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path | None = None
    offset: int = 0
    order: NDArray[np.intp] | None = None
    plus: float = 0.0
    values: NDArray[np.float32] | None = None

    @property
    def length(self) -> int:
        """I, the elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """R; a vector is one row."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """[stop - start, bytes of a row] as they lie in the file."""
        assert self.path is not None
        width = _row_bytes(self.type, self.length)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * width)
            data = np.fromfile(file, dtype=np.uint8, count=(stop - start) * width)
        if data.size != (stop - start) * width:
            raise ModelError(f"{self.path.name} ends inside tensor {self.name}", hint="copy the file again")
        return data.reshape(stop - start, width)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """[stop - start, I] float32, reordered and shifted as the architecture wants it."""
        if self.values is not None:
            return self.values.reshape(self.rows, self.length)[start:stop]
        if self.order is not None:
            values = self._decode(self.raw(0, self.rows))
            values = values.reshape(len(self.order), -1)[self.order].reshape(self.rows, self.length)[
                start:stop
            ]
        else:
            values = self._decode(self.raw(start, stop))
        return values + np.float32(self.plus) if self.plus else values

    def _decode(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.type not in FLOATS:
            return ggml.dequantize(self.type, data, self.length)
        values = data.view(FLOATS[self.type])
        if self.type == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


def hf_tensors(checkpoint: Checkpoint, config: Config, warnings: list[str]) -> list[Tensor]:
    stored = read_checkpoint(checkpoint.path)
    if config.get("tie_word_embeddings"):
        stored = _without_tied_head(stored, warnings)
    names = tensor_names(stored, config)
    offset = architecture_of(config).norm_offset
    tensors = []
    for hf_name, name in names.items():
        tensor = stored[hf_name]
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"tensor {hf_name} has elements of type {tensor.dtype}; F32, F16, BF16 and F64 can be exported",
                hint="dequantize the checkpoint first",
            )
        rows = tensor.shape[0] if tensor.shape else 1
        tensors.append(
            Tensor(
                name=name, shape=tensor.shape, type=tensor.dtype, path=tensor.path, offset=tensor.offset,
                order=row_order(hf_name, rows, config), plus=offset if hf_name.endswith("norm.weight") else 0.0,
            )
        )  # fmt: skip
    if architecture_of(config).needs_head and "output.weight" not in names.values():
        head = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
        tensors += [replace(head, name="output.weight")] if head else []
        warnings.append(
            f"llama.cpp's {architecture_of(config).gguf} has no tied head: the embedding is written twice"
        )
    tensors += [
        Tensor(name=n, shape=values.shape, type="F32", values=values) for n, values in extra_tensors(config)
    ]
    _check_complete(tensors, config)
    return tensors


def _without_tied_head(stored: Mapping[str, SafeTensor], warnings: list[str]) -> dict[str, SafeTensor]:
    """Drop a stored copy of the head: a tied model computes with the embedding, and the copy wastes its bytes."""
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("lm_head.weight")}
    if len(kept) != len(stored):
        warnings.append(
            "the checkpoint stores a copy of its tied head; it is left out, the embedding serves as head"
        )
    return kept


def _check_complete(tensors: Sequence[Tensor], config: Config) -> None:
    names = {tensor.name for tensor in tensors}
    family = architecture_of(config).gguf
    biased = [
        name
        for name in sorted(names)
        if name.endswith(("attn_output.bias", "gate.bias", "up.bias", "down.bias"))
    ]
    if biased and family not in ("llama", "granite"):
        raise ModelError(
            f"{biased[0]} and {len(biased) - 1} more biases have no place in llama.cpp's {family}",
            hint="train the model without attention_bias and mlp_bias",
        )
    if len(names) != len(tensors):
        twice = sorted({t.name for t in tensors if sum(t.name == other.name for other in tensors) > 1})
        raise ModelError(f"several tensors of the checkpoint would be written as {twice[0]}")
    layers = config["num_hidden_layers"]
    wanted = ["token_embd.weight", "output_norm.weight", *(f"blk.{i}.ffn_down.weight" for i in range(layers))]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}",
            hint="compare num_hidden_layers in config.json with the weights, and fetch all shards",
        )
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    wanted_shape = config["vocab_size"], config["hidden_size"]
    if embedding.shape != wanted_shape:
        raise ModelError(
            f"{embedding.name} has shape {embedding.shape}, config.json says {wanted_shape}",
            hint="the configuration and the weights are of different models",
        )


def gguf_tensors(source: GgufFile) -> list[Tensor]:
    return [
        Tensor(name=info.name, shape=info.shape, type=info.type, path=source.path, offset=info.offset)
        for info in source.tensors.values()
    ]


def slabs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of a bounded size that never cross from one expert to the next."""
    group = tensor.shape[-2] if len(tensor.shape) >= 3 else max(tensor.rows, 1)
    step = group if tensor.order is not None else max(1, SLAB_ELEMENTS // max(tensor.length, 1))
    for base in range(0, tensor.rows, group):
        for first in range(base, base + group, step):
            yield first, min(first + step, base + group)


def not_finite(values: NDArray[np.float32]) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def _row_bytes(type_name: str, length: int) -> int:
    return length * FLOATS[type_name].itemsize if type_name in FLOATS else row_bytes(type_name, length)
