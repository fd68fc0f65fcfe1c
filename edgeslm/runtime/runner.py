"""The Runner protocol: what every engine offers to generation, benchmarks and quality measurement."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from edgeslm.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle

RUNNERS = {"gguf": "edgeslm.runtime.llama:LlamaRunner", "onnx": "edgeslm.runtime.ort_lm:OrtRunner"}
"""Weight format to the class that runs it, resolved when a bundle is opened; its `open` takes the bundle."""

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Types that the key-value cache may have."""


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How an engine runs a model; None leaves the choice to the runner, which reports what it chose."""

    threads: int | None = None
    """Threads of prefill and decode; None: the physical cores that this process may use."""
    context: int | None = None
    """Tokens that the KV cache holds; None: the model's own length, at most 4096."""
    batch: int = 2048
    """Most tokens submitted to one decode call (llama.cpp n_batch)."""
    ubatch: int = 512
    """Most tokens computed at once (llama.cpp n_ubatch; in ONNX Runtime the tokens of one run)."""
    kv_type: str | None = None
    """Element type of the KV cache, one of KV_TYPES; None: f16 in llama.cpp, in ONNX what the graph has."""
    flash_attention: bool | None = None
    """None: as the engine sees fit."""
    mmap: bool = True
    mlock: bool = False
    gpu_layers: int | None = None
    """Layers that a GPU computes, where llama.cpp was built for one (n_gpu_layers); None: all, 0: none."""
    provider: str | None = None
    """ONNX Runtime's execution provider, one of ort_session.PROVIDERS; None: the CPU."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a loaded model says of itself."""

    architecture: str
    description: str
    parameters: int
    weight_bytes: int
    vocab_size: int
    context_length: int
    """The context that the model was trained for, in tokens."""
    bos_token: int | None
    eos_token: int | None
    adds_bos: bool
    stop_tokens: frozenset[int]
    """Every token that ends a generation (end of text, of turn, of message)."""
    chat_template: str | None


class Runner(Protocol):
    """One loaded model with one sequence of state.  V vocabulary size, S tokens.

    Tokens are appended to the state by prefill and step; reset starts over.  Raises EngineError
    when the engine refuses, and EdgeslmError when the context is full.
    """

    facts: ModelFacts
    options: RunnerOptions
    """With every None replaced by what is in force."""
    load_s: float
    """Seconds that loading took: weights mapped or read, context allocated, no warm-up."""
    notes: tuple[str, ...]
    """What could not be done as the options ask, in words for the user."""

    @property
    def position(self) -> int:
        """Tokens in the state."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; add_special: BOS/EOS as the model wants; parse_special: read <|...|> forms."""

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token (may be part of a UTF-8 character); special: render control tokens too."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append `tokens`, computing logits for the last of them only."""

    def step(self, token: int) -> None:
        """Append one token: one decode step."""

    def synchronize(self) -> None:
        """Return when all submitted work is done."""

    def last_logits(self) -> NDArray[np.float32]:
        """[V] logits after the newest token: a view that the next prefill, step or reset makes invalid."""

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """[S - first, V] logits at positions first.. of a fresh sequence; resets before and after."""

    def reset(self, keep: int = 0) -> None:
        """Forget all tokens but the first `keep`, or all where the engine can't go back: see position."""

    def close(self) -> None:
        """Free the engine's memory; the runner can't be used afterwards."""


@runtime_checkable
class Embedder(Protocol):
    """What a Runner may be besides: one that gives vectors of texts, and leaves its state as it is."""

    @property
    def embedding_size(self) -> int:
        """E numbers of a vector; 0 where the model gives none after all."""

    def embed(self, tokens: Sequence[int], interrupted: Callable[[], bool]) -> NDArray[np.float32] | None:
        """[E] the vector of `tokens` [S], of length 1; None when interrupted on the way."""


def open_runner(bundle: Bundle, options: RunnerOptions) -> Runner:
    """Load a bundle's weights into the engine for its format; raises BundleError when there is none."""
    if bundle.format not in RUNNERS:
        raise BundleError(
            f"{bundle.path}: no engine runs the format {bundle.format!r}",
            hint=f"this version runs {', '.join(RUNNERS)}",
        )
    if bundle.is_classifier:
        raise BundleError(
            f"{bundle.path}: a bundle for {(bundle.manifest or {}).get('task')} generates no text",
            hint="edgeslm eval and edgeslm bench measure it; edgeslm classify or predict uses it",
        )
    module, name = RUNNERS[bundle.format].split(":")
    runner: Runner = getattr(import_module(module), name).open(bundle, options)
    return runner
