"""A checkpoint as a GGUF file: one streaming pass from the source's bytes to the quantized file.

    source tensors --plan--> types, sizes and offsets --header--> file of its final size
    workers: read a slab of rows -> float32 -> ggml_quantize_chunk -> write at the slab's offset

Memory is bounded by one slab per worker (a whole tensor where its rows are reordered), never by the
model.  The file is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import os
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bundle import file_sha256, replacing
from edgeslm.errors import EdgeslmError, ModelError
from edgeslm.gguf_file import GGML_TYPES, GgufFile, read_gguf, row_bytes
from edgeslm.progress import Quiet
from edgeslm.safetensors_file import SafeTensor, read_checkpoint
from edgeslm.stages import ggml
from edgeslm.stages.architectures import (
    Config,
    add_metadata,
    architecture_of,
    check_carried,
    complete,
    extra_tensors,
    row_order,
    tensor_names,
)
from edgeslm.stages.plan import Placed, Plan, Weight, make_plan
from edgeslm.stages.vocab import add_vocab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.recipe import QuantizeSpec
    from edgeslm.stages.checkpoint import Checkpoint

SLAB_ELEMENTS = 1 << 22
"""Elements that one worker holds at a time: 16 MiB of float32."""

_NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F64": np.dtype("<f8")}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written GGUF file; plan and model as a bundle's manifest keeps them."""

    path: Path
    plan: dict[str, Any]
    model: dict[str, Any]
    warnings: list[str]


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
        if self.type not in _NUMPY:
            return ggml.dequantize(self.type, data, self.length)
        values = data.view(_NUMPY[self.type])
        if self.type == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


def run(
    checkpoint: Checkpoint,
    spec: QuantizeSpec,
    out: Path,
    *,
    importance: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write `checkpoint` as the GGUF file `out` with the types of `spec`.

    importance: an importance matrix file (llama.cpp's), used by every type that can use it.
    Raises ModelError for what the format can't carry and for weights that are not finite (both only
    warned of with spec.keep_going), RecipeError for the spec's mistakes.  Nothing is left at `out` then.
    """
    import gguf

    progress = progress or Quiet()
    weights = _load_importance(importance)
    warnings: list[str] = []
    if checkpoint.kind == "gguf":
        source = read_gguf(checkpoint.path)
        tensors = _gguf_tensors(source)
        writer = gguf.GGUFWriter(None, source.architecture)
        layers, ratio = _gguf_layout(source)
    else:
        config = complete(checkpoint.config())
        tensors = _hf_tensors(checkpoint, config, warnings)
        _raise_or_warn(config, spec.keep_going, warnings)
        writer = gguf.GGUFWriter(None, architecture_of(config).gguf)
        layers, ratio = (
            config["num_hidden_layers"],
            config["num_attention_heads"] // config["num_key_value_heads"],
        )
    plan = make_plan(
        (Weight(name=t.name, shape=t.shape, source_type=t.type if checkpoint.kind == "gguf" else "F32") for t in tensors),
        spec.scheme, layers=layers, heads_per_kv_head=ratio, overrides=spec.types, importance=bool(weights),
    )  # fmt: skip
    by_name = {tensor.name: tensor for tensor in tensors}
    if spec.keep_going:
        plan = _keep_unfit(plan, by_name, warnings)
    _check_importance(plan, weights, warnings)
    for placed in plan.tensors:
        writer.add_tensor_info(
            placed.weight.name, placed.weight.shape, np.dtype(np.float32), placed.nbytes,
            raw_dtype=gguf.GGMLQuantizationType(GGML_TYPES[placed.type].id),
        )  # fmt: skip
    if checkpoint.kind == "gguf":
        facts = _copy_metadata(writer, source, plan)
    else:
        facts = _write_metadata(writer, checkpoint, config, plan, by_name)
    _stream(writer, plan, by_name, weights, out, threads or _usable_cores(), progress)
    record = {**plan.record(), "importance": file_sha256(importance) if importance else None}
    model = {
        **facts,
        "parameters": sum(placed.weight.parameters for placed in plan.tensors),
        "source": checkpoint.source,
        "source_sha256": checkpoint.digest,
    }
    return Exported(path=out, plan=record, model=model, warnings=warnings)


# --- sources ---


def _hf_tensors(checkpoint: Checkpoint, config: Config, warnings: list[str]) -> list[Tensor]:
    stored = read_checkpoint(checkpoint.path)
    if config.get("tie_word_embeddings"):
        stored = _without_tied_head(stored, warnings)
    names = tensor_names(stored, config)
    offset = architecture_of(config).norm_offset
    tensors = []
    for hf_name, name in names.items():
        tensor = stored[hf_name]
        if tensor.dtype not in _NUMPY:
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
    sizes = {"token_embd.weight": (config["vocab_size"], config["hidden_size"])}
    for tensor in tensors:
        wanted_shape = sizes.get(tensor.name)
        trimmed = architecture_of(config).trims_vocab and tensor.shape[0] >= config["vocab_size"]
        if wanted_shape and tensor.shape != wanted_shape and not trimmed:
            raise ModelError(
                f"{tensor.name} has shape {tensor.shape}, config.json says {wanted_shape}",
                hint="the configuration and the weights are of different models",
            )


def _raise_or_warn(config: Config, keep_going: bool, warnings: list[str]) -> None:
    errors, later = check_carried(config)
    if errors and not keep_going:
        raise ModelError(
            f"llama.cpp would compute something else than this model: {'; '.join(errors)}",
            hint="--keep-going writes the file all the same",
        )
    warnings += errors + later


def _gguf_tensors(source: GgufFile) -> list[Tensor]:
    return [
        Tensor(name=info.name, shape=info.shape, type=info.type, path=source.path, offset=info.offset)
        for info in source.tensors.values()
    ]


def _gguf_layout(source: GgufFile) -> tuple[int, int]:
    """(blocks, query heads per key-value head) of a GGUF file; (0, 1) where it doesn't say."""

    def first(key: str, default: int) -> int:
        value = source.get(f"{source.architecture}.{key}", default)
        return int(value[0] if isinstance(value, list) else value)

    heads = first("attention.head_count", 1)
    return first("block_count", 0), heads // max(first("attention.head_count_kv", heads), 1)


# --- metadata ---


def _write_metadata(
    writer: Any, checkpoint: Checkpoint, config: Config, plan: Plan, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    import gguf

    total, shared, expert, experts = writer.get_total_parameter_count()
    card = gguf.Metadata.load(None, checkpoint.path, None, total)
    if card.name is None or checkpoint.path.name != checkpoint.name:
        card.name = checkpoint.name
    if card.size_label is None:
        card.size_label = gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(writer)
    add_metadata(writer, config)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab = add_vocab(writer, checkpoint.path, config, architecture_of(config).vocab)
    if tensors["token_embd.weight"].shape[0] != len(vocab.tokens):
        raise ModelError(
            f"the tokenizer has {len(vocab.tokens)} tokens, the embedding {tensors['token_embd.weight'].shape[0]} rows"
        )
    return {
        "architecture": architecture_of(config).gguf,
        "context_length": config["max_position_embeddings"],
        "vocab_size": len(vocab.tokens),
        "tokenizer": f"{vocab.model}/{vocab.pre}",
        "licence": card.license,
    }


def _copy_metadata(writer: Any, source: GgufFile, plan: Plan) -> dict[str, Any]:
    """The source's own metadata, tokenizer included, as it is; only what describes the types is new."""
    import gguf

    fresh = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
    for key, field in source.fields.items():
        if key in fresh or key.startswith("split.") or field.value == []:
            continue
        if field.kind == "array" and field.item_kind == "array":
            raise ModelError(f"{source.path.name}: {key} is an array of arrays, which no GGUF reader expects")
        item = gguf.GGUFValueType[_GGUF_KINDS[field.item_kind]] if field.item_kind else None
        writer.add_key_value(key, field.value, gguf.GGUFValueType[_GGUF_KINDS[field.kind]], item)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens = source.get("tokenizer.ggml.tokens", [])
    return {
        "architecture": source.architecture,
        "context_length": source.get(f"{source.architecture}.context_length"),
        "vocab_size": len(tokens),
        "tokenizer": f"{source.get('tokenizer.ggml.model', 'none')}/{source.get('tokenizer.ggml.pre', 'default')}",
        "licence": source.get("general.license"),
    }


_GGUF_KINDS = {
    "u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "u64": "UINT64",
    "i64": "INT64", "f32": "FLOAT32", "f64": "FLOAT64", "bool": "BOOL", "str": "STRING", "array": "ARRAY",
}  # fmt: skip


# --- importance and unfit weights ---


def _load_importance(path: Path | None) -> dict[str, NDArray[np.float32]]:
    if path is None:
        return {}
    from edgeslm.stages.calibrate import load_importance

    return load_importance(path)


def _check_importance(plan: Plan, weights: Mapping[str, NDArray[np.float32]], warnings: list[str]) -> None:
    """Every quantized matrix should have its channels weighed; a wrong size means another model's matrix."""
    if not weights:
        return
    without = []
    for placed in plan.tensors:
        weight = placed.weight
        if len(weight.shape) < 2 or placed.type in ("F32", "F16", "BF16"):
            continue
        channels = weights.get(weight.name)
        if channels is None:
            without.append(weight.name)
        elif channels.size != weight.parameters // weight.shape[-2]:
            raise ModelError(
                f"the importance matrix has {channels.size} channels for {weight.name}, the weight {weight.shape[-1]}",
                hint="it was made for another model",
            )
    if without:
        warnings.append(f"no importance for {len(without)} of the quantized tensors, first {without[0]}")


def _keep_unfit(plan: Plan, tensors: Mapping[str, Tensor], warnings: list[str]) -> Plan:
    """Leave tensors with NaN or infinity in F32, said aloud."""
    kept = []
    for placed in plan.tensors:
        tensor = tensors[placed.weight.name]
        bad = 0 if tensor.type not in _NUMPY else sum(_unfit(tensor.read(a, b)) for a, b in _slabs(tensor))
        if bad:
            warnings.append(f"{tensor.name} has {bad} values that are not finite; it stays in F32")
            kept.append(replace(placed, type="F32", reason=f"{bad} values are not finite"))
        else:
            kept.append(placed)
    return replace(plan, tensors=tuple(kept))


def _unfit(values: NDArray[np.float32]) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


# --- the streaming pass ---


def _stream(
    writer: Any, plan: Plan, tensors: Mapping[str, Tensor], importance: Mapping[str, NDArray[np.float32]], out: Path,
    threads: int, progress: Progress,
) -> None:  # fmt: skip
    """Header first, then every slab at its own offset, from all workers."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as beside:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = _padded(writer.fout[0].tell())
        writer.close()
        jobs, end = _jobs(plan, tensors, importance, start)
        descriptor = os.open(beside, os.O_RDWR)
        try:
            _reserve(descriptor, end, out)
            with progress.task(
                f"writing {plan.scheme}", total=sum(job.elements for job in jobs), unit="weights"
            ) as done:
                _run_all(
                    [lambda job=job: job(descriptor) for job in jobs],
                    [j.elements for j in jobs],
                    threads,
                    done,
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One slab of one tensor: read, encode, write."""

    placed: Placed
    tensor: Tensor
    importance: NDArray[np.float32] | None
    start: int
    stop: int
    position: int

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * self.tensor.length

    def __call__(self, descriptor: int) -> None:
        data = memoryview(self._encode()).cast("B")
        position = self.position
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written

    def _encode(self) -> NDArray[Any]:
        tensor, kind = self.tensor, self.placed.type
        if kind == tensor.type and kind not in _NUMPY:
            return np.ascontiguousarray(tensor.raw(self.start, self.stop))
        values = tensor.read(self.start, self.stop)
        if not self.placed.reason.endswith("not finite") and (bad := _unfit(values)):
            raise ModelError(
                f"{tensor.name} has {bad} values that are not finite in rows {self.start} to {self.stop - 1}",
                hint="the checkpoint is damaged or training diverged; --keep-going leaves such tensors in F32",
            )
        if kind == "F32":
            return np.ascontiguousarray(values)
        try:
            return ggml.quantize(kind, values, self.importance)
        except ModelError as error:
            raise ModelError(f"{tensor.name}: {error.message}", hint=error.hint) from error


def _jobs(
    plan: Plan, tensors: Mapping[str, Tensor], importance: Mapping[str, NDArray[np.float32]], start: int
) -> tuple[list[_Job], int]:
    """All slabs with their places in the file, and the file's size."""
    jobs, position = [], start
    for placed in plan.tensors:
        tensor = tensors[placed.weight.name]
        width = row_bytes(placed.type, tensor.length)
        channels = importance.get(tensor.name)
        for first, last in _slabs(tensor):
            jobs.append(
                _Job(
                    placed=placed, tensor=tensor, start=first, stop=last, position=position + first * width,
                    importance=_expert_channels(channels, tensor, first),
                )
            )  # fmt: skip
        position += _padded(placed.nbytes)
    return jobs, position


def _expert_channels(
    channels: NDArray[np.float32] | None, tensor: Tensor, row: int
) -> NDArray[np.float32] | None:
    """The importance of the expert that a row belongs to; a matrix has one for all its rows."""
    if channels is None or len(tensor.shape) < 3:
        return channels
    return channels.reshape(-1, tensor.length)[row // tensor.shape[-2]]


def _slabs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of a bounded size that never cross from one expert to the next."""
    group = tensor.shape[-2] if len(tensor.shape) >= 3 else max(tensor.rows, 1)
    step = group if tensor.order is not None else max(1, SLAB_ELEMENTS // max(tensor.length, 1))
    for base in range(0, tensor.rows, group):
        for first in range(base, base + group, step):
            yield first, min(first + step, base + group)


def _run_all(
    jobs: Sequence[Callable[[], None]], sizes: Sequence[int], threads: int, done: Callable[[float], None]
) -> None:
    """Run jobs on `threads` workers; the first failure, or Ctrl-C, cancels what has not begun."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(job) for job in jobs]
        for future, size in zip(futures, sizes, strict=True):
            future.add_done_callback(lambda _, size=size: done(size))
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        failed = next((future for future in finished if future.exception()), None)
        if failed is not None:
            pool.shutdown(cancel_futures=True)
            failed.result()


def _reserve(descriptor: int, size: int, out: Path) -> None:
    """Take the whole file's room before any work is done in it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise EdgeslmError(
            f"{out} needs {size / 2**20:,.0f} MiB: {error.strerror}",
            hint="free some space, or write elsewhere",
        ) from error


def _row_bytes(type_name: str, length: int) -> int:
    return length * _NUMPY[type_name].itemsize if type_name in _NUMPY else row_bytes(type_name, length)


def _padded(size: int) -> int:
    """Tensors start at multiples of GGUF's default alignment."""
    return -(-size // 32) * 32


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
