"""The importance matrix: mean squared activation per input channel of each weight, in llama.cpp's format.

The text is cut as llama-imatrix does it (llama.cpp, tools/imatrix/imatrix.cpp): windows of C tokens that
do not overlap, BOS in place of a window's first token where the model begins with BOS.

C tokens of a window, I input channels of a weight, S tokens.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import replacing
from edgeslm.errors import DataError, ModelError
from edgeslm.gguf_file import read_gguf, tensor_bytes
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.architectures import module_names
from edgeslm.stages.chats import renderer
from edgeslm.stages.data import Document, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.specs import CalibrateSpec
    from edgeslm.stages.checkpoint import Checkpoint

    ChatRenderer = Callable[[str, Sequence[Mapping[str, str]], str, str], str]

READ_AHEAD = 16
"""Windows are spread over so many times the text that is needed: its first pages are not typical."""
LEGACY_SUFFIXES = (".dat", ".imatrix")
SUMS, COUNTS = ".in_sum2", ".counts"

Statistics = dict[str, tuple["NDArray[np.float64]", int]]
"""Weight name to the [I] sums of squared inputs and the number of tokens that they are of."""


def run(
    checkpoint: Checkpoint,
    found: Iterable[Document],
    spec: CalibrateSpec,
    out: Path,
    *,
    chat: ChatRenderer,
    sources: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Measure the importance matrix of a model on documents and write it to `out`.

    chat: renders messages, given template, messages, BOS and EOS as text.  sources: names of the texts,
    noted in the file.  Raises DataError for too little text, ModelError for a model that torch can't run
    and for activations that are not finite.
    """
    windows = token_windows(checkpoint, found, spec, chat=chat, progress=progress)
    model = checkpoint.load()
    statistics = measure(model, torch_names(model), windows, progress)
    write_importance(out, statistics, windows=len(windows), context=spec.context, sources=sources)
    return out


def token_windows(
    checkpoint: Checkpoint,
    found: Iterable[Document],
    spec: CalibrateSpec,
    *,
    chat: ChatRenderer,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """[windows, C] token ids of calibration text, spread over it; BOS is first where the tokenizer puts one.

    Raises DataError for too little text.
    """
    tokenizer = checkpoint.tokenizer()
    stream = token_stream(found, tokenizer, chat)
    windows = choose_windows(stream, context=spec.context, tokens=spec.tokens)
    bos = begin_token(tokenizer)
    if bos is not None:
        windows[:, 0] = bos
    if windows.size < spec.tokens // spec.context * spec.context and progress is not None:
        progress.note(f"calibration: the text has {windows.size} tokens, {spec.tokens} were asked for")
    return windows


def token_stream(found: Iterable[Document], tokenizer: Any, chat: ChatRenderer) -> Iterator[int]:
    """Token ids of the documents with a blank line between them; only rendered chats hold special tokens."""
    bos = begin_token(tokenizer)
    if bos is not None:
        yield bos

    as_text = renderer(tokenizer, lambda template, turns, bos, eos, _asks: chat(template, turns, bos, eos))
    for index, document in enumerate(found):
        text = ("\n\n" if index else "") + render(document, lambda messages: as_text(messages, False))
        plain = document.messages is None
        yield from tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)


def begin_token(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode("a")
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def choose_windows(stream: Iterable[int], *, context: int, tokens: int) -> NDArray[np.int64]:
    """[windows, C] windows that do not overlap, spread evenly over the first READ_AHEAD * `tokens` tokens.

    With no more text than asked for, these are all its windows.  Raises DataError when there is none.
    """
    wanted = max(1, tokens // context)
    ids = np.fromiter(islice(stream, READ_AHEAD * wanted * context), dtype=np.int64)
    available = len(ids) // context
    if available == 0:
        raise DataError(
            f"the calibration text has {len(ids)} tokens, but one window takes {context}",
            hint="give more text or a smaller context",
        )
    every = ids[: available * context].reshape(available, context)
    count = min(wanted, available)
    return every[[index * available // count for index in range(count)]]


def torch_names(model: Any) -> dict[str, str]:
    """Module path in `model` -> GGUF weight name, for each linear layer and the head."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "tie_word_embeddings": bool(tied),
    }
    names = module_names(config)
    found = {}
    for path, _module in model.named_modules():
        plain = path.replace("language_model.", "")
        if plain in names:
            found[path] = names[plain]
    missing = set(names.values()) - set(found.values())
    if missing:
        raise ModelError(f"{type(model).__name__} has no layer for {sorted(missing)[0]}")
    return found


def measure(
    model: Any, names: Mapping[str, str], windows: NDArray[np.int64], progress: Progress | None = None
) -> Statistics:
    """Run the windows through the model, one at a time, summing squares of what enters each layer.

    windows: [windows, C] token ids.  The head's logits are never computed: its input is the decoder's output.
    Raises ModelError naming the weight whose inputs are not finite.
    """
    import torch

    sums: dict[str, Any] = {}

    def add(name: str, inputs: Any) -> None:
        squares = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0).double()
        sums[name] = sums[name] + squares if name in sums else squares

    def hook(name: str) -> Any:
        return lambda _module, inputs: add(name, inputs[0])

    modules = dict(model.named_modules())
    head = next(path for path, module in modules.items() if module is model.get_output_embeddings())
    handles = [
        modules[path].register_forward_pre_hook(hook(name)) for path, name in names.items() if path != head
    ]
    decoder = model.get_decoder()
    try:
        with (
            torch.inference_mode(),
            (progress or Quiet()).task("calibrate", windows.size, "tokens") as advance,
        ):
            for window in torch.from_numpy(windows):
                add(names[head], decoder(input_ids=window[None], use_cache=False).last_hidden_state)
                advance(len(window))
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                f"the inputs of {name} are not finite",
                hint="the weights hold NaN or overflow: check the model, or quantize without calibration text",
            )
    return {name: (sums[name].numpy(), windows.size) for name in sorted(sums)}


def write_importance(
    out: Path, statistics: Statistics, *, windows: int, context: int, sources: Sequence[str] = ()
) -> None:
    """Write llama.cpp's GGUF importance matrix (save_imatrix), beside `out` and renamed into place."""
    import gguf

    with replacing(out) as beside:
        writer = gguf.GGUFWriter(str(beside), "imatrix")
        writer.add_type("imatrix")
        if sources:
            writer.add_array("imatrix.datasets", list(sources))
        writer.add_uint32("imatrix.chunk_count", windows)
        writer.add_uint32("imatrix.chunk_size", context)
        for name, (sums, count) in sorted(statistics.items()):
            writer.add_tensor(name + SUMS, sums.astype(np.float32))
            writer.add_tensor(name + COUNTS, np.array([count], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def is_importance(path: Path) -> bool:
    """Whether a file is an importance matrix rather than text."""
    if path.suffix.lower() in LEGACY_SUFFIXES:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load_importance(path: Path) -> dict[str, NDArray[np.float32]]:
    """Weight name -> [I] mean squared input, out of llama.cpp's GGUF or legacy format, theirs or ours.

    The division is in float32 as llama-quantize has it, so that the same file quantizes to the same bytes.
    Raises ModelError for a file that is neither format, cut off, or holds values that are not finite.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        means = _load_gguf(path) if magic == b"GGUF" else _load_legacy(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    for name, values in means.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ModelError(f"{path}: the importance of {name} is not finite and positive")
    if not means:
        raise ModelError(f"{path}: holds no importance")
    return means


def _load_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    file = read_gguf(path)
    if file.get("general.type") != "imatrix":
        raise ModelError(
            f"{path}: a GGUF file of the type {file.get('general.type', 'model')!r}, no importance matrix",
            hint="give text, or the file that llama-imatrix or edgeslm wrote",
        )
    means = {}
    for key, info in file.tensors.items():
        if not key.endswith(SUMS):
            continue
        name = key.removesuffix(SUMS)
        counts_info = file.tensors.get(name + COUNTS)
        if counts_info is None or info.type != "F32" or counts_info.type != "F32":
            raise ModelError(f"{path}: {name} has no counts in F32 beside its sums")
        sums = tensor_bytes(file, info).view(np.float32).reshape(-1)
        counts = tensor_bytes(file, counts_info).view(np.float32).reshape(-1)
        if counts.size == 0 or sums.size == 0 or sums.size % counts.size:
            raise ModelError(f"{path}: {name} has {sums.size} sums and {counts.size} counts")
        counts = np.rint(counts)[:, None]
        # Nothing is known of a matrix that no token went through: llama-quantize takes 1 for it.
        rows = sums.reshape(counts.size, -1)
        means[name] = (
            np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1)).astype(np.float32).reshape(-1)
        )
    return means


def _load_legacy(path: Path) -> dict[str, NDArray[np.float32]]:
    """int32 entries; each: length, name, calls, number of values, values = mean * calls in float32."""
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or count > len(data) - at:
            raise ModelError(
                f"{path}: neither a GGUF nor a legacy importance matrix, or cut off at byte {at}",
                hint="give the file that llama-imatrix or edgeslm wrote",
            )
        at += count
        return data[at - count : at]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    means = {}
    for _ in range(integer()):
        name = take(integer()).decode("utf-8", errors="replace")
        calls, values = integer(), integer()
        sums = np.frombuffer(take(4 * values), dtype="<f4")
        means[name] = (sums / np.float32(max(calls, 1))).astype(np.float32)
    return means
