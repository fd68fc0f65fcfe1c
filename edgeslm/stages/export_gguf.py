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

from edgeslm.atomic import replacing
from edgeslm.bundle import file_sha256
from edgeslm.device import probe
from edgeslm.errors import EdgeslmError, ModelError
from edgeslm.gguf_file import GGML_TYPES, GgufFile, read_gguf, row_bytes
from edgeslm.progress import Quiet
from edgeslm.stages import ggml
from edgeslm.stages.architectures import (
    architecture_of,
    check_carried,
    complete,
)
from edgeslm.stages.gguf_metadata import copy_metadata, write_metadata
from edgeslm.stages.plan import Placed, Plan, Weight, make_plan
from edgeslm.stages.tensors import FLOATS, Tensor, gguf_tensors, hf_tensors, not_finite, slabs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.rope import Config


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written GGUF file; plan and model as a bundle's manifest keeps them."""

    path: Path
    plan: dict[str, Any]
    model: dict[str, Any]
    warnings: list[str]


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
    progress = progress or Quiet()
    warnings: list[str] = []
    weights = _load_importance(importance)
    source = _open_gguf(checkpoint) if checkpoint.kind == "gguf" else _open_hf(checkpoint, spec, warnings)
    plan = make_plan(
        (Weight(name=t.name, shape=t.shape, source_type=source.kept_type(t)) for t in source.tensors),
        spec.scheme, layers=source.layers, heads_per_kv_head=source.heads_per_kv_head, overrides=spec.types,
        importance=bool(weights),
    )  # fmt: skip
    by_name = {tensor.name: tensor for tensor in source.tensors}
    if spec.keep_going:
        plan = _keep_unfit(plan, by_name, warnings)
    _check_importance(plan, weights, warnings)
    _declare(source.writer, plan)
    facts = source.write_metadata(plan)
    _stream(
        source.writer, plan, lambda start: _jobs(plan, by_name, weights, start), out=out,
        threads=threads or probe()["usable_cores"] or 1, progress=progress,
    )  # fmt: skip
    record = {**plan.record(), "importance": file_sha256(importance) if importance else None}
    model = {
        **facts,
        "parameters": sum(placed.weight.parameters for placed in plan.tensors),
        "source": checkpoint.source,
        "source_sha256": checkpoint.digest,
    }
    return Exported(path=out, plan=record, model=model, warnings=warnings)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What the two kinds of source have in common once they are open."""

    tensors: list[Tensor]
    writer: Any
    layers: int
    heads_per_kv_head: int
    write_metadata: Callable[[Plan], dict[str, Any]]
    """Puts the metadata into the writer and returns the model facts of the manifest."""
    keeps_types: bool
    """Whether what is not quantized stays as stored (GGUF) or becomes F32 (Hugging Face)."""

    def kept_type(self, tensor: Tensor) -> str:
        return tensor.type if self.keeps_types else "F32"


def _open_hf(checkpoint: Checkpoint, spec: QuantizeSpec, warnings: list[str]) -> _Source:
    import gguf

    config = complete(checkpoint.config())
    tensors = hf_tensors(checkpoint, config, warnings)
    _raise_or_warn(config, spec.keep_going, warnings)
    writer = gguf.GGUFWriter(None, architecture_of(config).gguf)
    return _Source(
        tensors=tensors,
        writer=writer,
        layers=config["num_hidden_layers"],
        heads_per_kv_head=config["num_attention_heads"] // config["num_key_value_heads"],
        write_metadata=lambda plan: write_metadata(writer, checkpoint, config, plan, warnings),
        keeps_types=False,
    )


def _open_gguf(checkpoint: Checkpoint) -> _Source:
    import gguf

    file = read_gguf(checkpoint.path)
    writer = gguf.GGUFWriter(None, file.architecture)
    layers, ratio = _gguf_layout(file)
    return _Source(
        tensors=gguf_tensors(file),
        writer=writer,
        layers=layers,
        heads_per_kv_head=ratio,
        write_metadata=lambda plan: copy_metadata(writer, file, plan),
        keeps_types=True,
    )


def _declare(writer: Any, plan: Plan) -> None:
    import gguf

    for placed in plan.tensors:
        writer.add_tensor_info(
            placed.weight.name, placed.weight.shape, np.dtype(np.float32), placed.nbytes,
            raw_dtype=gguf.GGMLQuantizationType(GGML_TYPES[placed.type].id),
        )  # fmt: skip


def _raise_or_warn(config: Config, keep_going: bool, warnings: list[str]) -> None:
    errors, later = check_carried(config)
    if errors and not keep_going:
        raise ModelError(
            f"llama.cpp would compute something else than this model: {'; '.join(errors)}",
            hint="--keep-going writes the file all the same",
        )
    warnings += errors + later


def _gguf_layout(source: GgufFile) -> tuple[int, int]:
    """(blocks, query heads per key-value head) of a GGUF file; (0, 1) where it doesn't say."""

    def first(key: str, default: int) -> int:
        value = source.get(f"{source.architecture}.{key}", default)
        return int(value[0] if isinstance(value, list) else value)

    heads = first("attention.head_count", 1)
    return first("block_count", 0), heads // max(first("attention.head_count_kv", heads), 1)


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
        bad = 0 if tensor.type not in FLOATS else sum(not_finite(tensor.read(a, b)) for a, b in slabs(tensor))
        if bad:
            warnings.append(f"{tensor.name} has {bad} values that are not finite; it stays in F32")
            kept.append(replace(placed, type="F32", reason=f"{bad} values are not finite", finite=False))
        else:
            kept.append(placed)
    return replace(plan, tensors=tuple(kept))


# --- the streaming pass ---


def _stream(
    writer: Any, plan: Plan, jobs_from: Callable[[int], tuple[list[_Job], int]], *, out: Path, threads: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Header first, then every slab at its own offset, from all workers."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as beside:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = _padded(writer.fout[0].tell())
        writer.close()
        jobs, end = jobs_from(start)
        descriptor = os.open(beside, os.O_RDWR)
        try:
            _reserve(descriptor, end, out)
            total = sum(job.elements for job in jobs)
            with progress.task(f"writing {plan.scheme}", total=total, unit="weights") as done:
                _run_all(jobs, descriptor, threads, done)
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
        data = memoryview(self._encode().view(np.uint8).data).cast("B")
        position = self.position
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written

    def _encode(self) -> NDArray[Any]:
        tensor, kind = self.tensor, self.placed.type
        if kind == tensor.type and kind not in FLOATS:
            return np.ascontiguousarray(tensor.raw(self.start, self.stop))
        values = tensor.read(self.start, self.stop)
        if self.placed.finite and (bad := not_finite(values)):
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
        for first, last in slabs(tensor):
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
    channels_of: NDArray[np.float32] = channels.reshape(-1, tensor.length)[row // tensor.shape[-2]]
    return channels_of


def _run_all(jobs: Sequence[_Job], descriptor: int, threads: int, done: Callable[[float], None]) -> None:
    """Run jobs on `threads` workers; the first failure, or Ctrl-C, cancels what has not begun."""

    def run_one(job: _Job) -> None:
        job(descriptor)
        done(job.elements)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run_one, job) for job in jobs]
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


def _padded(size: int) -> int:
    """Tensors start at multiples of GGUF's default alignment."""
    return -(-size // 32) * 32
