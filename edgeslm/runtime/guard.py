"""What llama.cpp asserts instead of checking: such a file would end the process, so it is refused here.

Found by mutating the metadata and tensor types of a small model and loading each mutant
(llama.cpp of llama-cpp-python 0.3.36); everything else that was tried, llama.cpp refuses itself.
"""

from __future__ import annotations

import math
from collections import Counter
from math import prod
from typing import TYPE_CHECKING

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from edgeslm.gguf_file import GgufFile

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS."""
_NOT_COMPUTABLE = ("I8", "I16", "I32", "I64", "F64", "Q8_K")
"""Types that ggml stores and has no product for."""
_DAMAGED = "the file is damaged or was not made by a converter: get it again"


def check_runnable(file: GgufFile) -> None:
    """Raise ModelError for values that make llama.cpp abort while loading or computing."""
    layers = file.get(f"{file.architecture}.block_count")
    if layers is not None and not (isinstance(layers, int) and 0 < layers <= MAX_LAYERS):
        raise _error(file, f"{file.architecture}.block_count is {layers!r}, not 1 to {MAX_LAYERS}")
    for key, field in file.fields.items():
        if key.endswith("epsilon") and not (isinstance(field.value, float) and 0 <= field.value < math.inf):
            raise _error(file, f"{key} is {field.value!r}")
    for name, tensor in file.tensors.items():
        if not name.endswith((".weight", ".bias")):
            continue
        vector = prod(tensor.shape[:-1]) == 1
        if tensor.type in _NOT_COMPUTABLE or (vector and tensor.type != "F32"):
            usable = "vectors must be F32" if vector else "ggml can't multiply with it"
            raise _error(file, f"tensor {name} has type {tensor.type}: {usable}")
    tokens = file.get("tokenizer.ggml.tokens", [])
    named = [token for token in tokens if token]
    if len(set(named)) != len(named):
        twice, _ = Counter(named).most_common(1)[0]
        raise _error(file, f"the token {twice!r} is in the vocabulary more than once")


def can_tokenize(file: GgufFile) -> bool:
    """Whether every text has tokens: SentencePiece without byte tokens aborts at an unknown character."""
    if file.get("tokenizer.ggml.model") != "llama":
        return True
    tokens = set(file.get("tokenizer.ggml.tokens", []))
    return all(f"<0x{byte:02X}>" in tokens or (byte < 128 and chr(byte) in tokens) for byte in range(256))


def _error(file: GgufFile, what: str) -> ModelError:
    return ModelError(f"{file.path.name}: {what}", hint=_DAMAGED)
