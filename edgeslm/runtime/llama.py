"""LlamaRunner: a GGUF model on llama.cpp, through the plain C functions of llama-cpp-python.

V vocabulary size, S tokens.  The parameters of model and context are those that llama-bench uses
for equal options (tools/llama-bench/llama-bench.cpp: to_llama_mparams, to_llama_cparams), so that
a measurement here is a measurement of llama.cpp.  Nothing is allocated per token.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import EngineError, ModelError
from edgeslm.gguf_file import read_gguf
from edgeslm.runtime.engine import load_engine, new_context
from edgeslm.runtime.fit import PLAIN_KV_TYPES, check_memory, completed
from edgeslm.runtime.guard import can_tokenize, check_runnable
from edgeslm.runtime.host import memory_bytes
from edgeslm.runtime.llama_embedding import EmbeddingContext, read_pooling
from edgeslm.runtime.runner import ModelFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle
    from edgeslm.gguf_file import GgufFile
    from edgeslm.runtime.engine import Engine
    from edgeslm.runtime.runner import RunnerOptions

_NULL_TOKEN = -1
NO_GPU = "this llama.cpp was built for the CPU alone: all layers stay there"


class LlamaRunner:
    """One GGUF model in llama.cpp with one sequence of state; implements edgeslm.runtime.runner.Runner and Embedder."""

    @classmethod
    def open(cls, bundle: Bundle, options: RunnerOptions) -> LlamaRunner:
        """The runner of a bundle or bare file."""
        return cls(bundle.weights, options)

    def __init__(
        self, weights: Path, options: RunnerOptions, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Load `weights`.

        Raises ModelError for a damaged file, RecipeError for impossible options and EngineError
        when the model does not fit the machine or llama.cpp refuses it.
        """
        file = read_gguf(weights)
        check_runnable(file)
        options = completed(options, file)
        check_memory(file, options, memory_bytes())
        self._engine = engine = load_engine()
        self._api = api = engine.api
        start = clock()
        self._handles = handles = _Handles(engine)
        self._free = weakref.finalize(self, handles.free)
        handles.model = _load_model(engine, weights, options)
        self._vocab = api.llama_model_get_vocab(handles.model)
        handles.context = self._context = new_context(engine, handles.model, options, weights.name)
        self._memory = api.llama_get_memory(self._context)
        handles.pool = engine.new_threadpool(options.threads or 1)
        if handles.pool is not None:
            engine.attach_threadpool(self._context, handles.pool)
        self.load_s = clock() - start
        if not self._memory or not api.llama_model_has_decoder(handles.model):
            raise EngineError(
                f"{weights.name}: {file.architecture} does not generate text",
                hint="use a causal language model",
            )
        self.options = replace(
            options,
            context=api.llama_n_ctx(self._context),
            batch=api.llama_n_batch(self._context),
            ubatch=api.llama_n_ubatch(self._context),
            flash_attention=_flash_in_force(engine, options),
            gpu_layers=_gpu_layers(engine, handles.model, options),
        )
        self.notes = () if engine.has_gpu or not options.gpu_layers else (NO_GPU,)
        self.facts = _facts(api, handles.model, self._vocab, file)
        self._can_tokenize = api.llama_vocab_type(self._vocab) != 0 and can_tokenize(file)
        self._pooling = read_pooling(file)
        self.embedding_size = int(api.llama_model_n_embd_out(handles.model)) if self._pooling else 0
        self._position = 0
        self._prepare_batches()

    def _prepare_batches(self) -> None:
        """The two batches that every call reuses; their arrays belong to numpy.

        With no positions, sequence ids and output flags llama.cpp appends to sequence 0 and
        computes the logits of the last token only, as llama-bench has it.
        """
        api, size = self._api, self.options.batch
        self._tokens = np.zeros(size, np.int32)
        self._flags = np.zeros(size, np.int8)
        self._batch = api.llama_batch()
        self._batch.token = self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._flagged = api.llama_batch()
        self._flagged.token = self._batch.token
        self._flagged.logits = self._flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return self._position

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; add_special: BOS/EOS as the model wants; parse_special: read <|...|> forms."""
        data = text.encode("utf-8", errors="replace")
        if not self._can_tokenize:
            raise ModelError(
                "the model's tokenizer is missing or incomplete",
                hint="convert it again together with its tokenizer",
            )
        tokens = np.empty(len(data) + 8, np.int32)
        for _ in range(2):
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count: int = self._api.llama_tokenize(
                self._vocab, data, len(data), pointer, len(tokens), add_special, parse_special
            )
            if count >= 0:
                return list(map(int, tokens[:count]))
            tokens = np.empty(-count, np.int32)
        raise EngineError(f"llama.cpp could not tokenize {len(data)} bytes of text")

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token (may be part of a UTF-8 character); special: render control tokens too."""
        if not 0 <= token < self.facts.vocab_size:
            raise EngineError(f"token {token} is outside the vocabulary of {self.facts.vocab_size}")
        size = 64
        while True:
            piece = ctypes.create_string_buffer(size)
            count: int = self._api.llama_token_to_piece(self._vocab, token, piece, size, 0, special)
            if count >= 0:
                return piece.raw[:count]
            size = -count

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append `tokens`, computing logits for the last only.  Raises EngineError if they don't fit."""
        self._make_room(len(tokens))
        for start in range(0, len(tokens), self.options.batch):
            self._submit(self._batch, tokens[start : start + self.options.batch])

    def step(self, token: int) -> None:
        """Append one token: one decode step.  Raises EngineError when the context is full."""
        self._make_room(1)
        self._tokens[0] = token
        self._batch.n_tokens = 1
        code = self._api.llama_decode(self._context, self._batch)
        if code:
            raise self._refusal(code)
        self._position += 1

    def synchronize(self) -> None:
        """Return when all submitted work is done."""
        self._api.llama_synchronize(self._context)

    def last_logits(self) -> NDArray[np.float32]:
        """[V] logits after the newest token: a view that the next prefill, step or reset makes invalid."""
        pointer = self._api.llama_get_logits_ith(self._context, -1) if self._position else None
        if not pointer:
            raise EngineError("there are no logits before the first token")
        return np.ctypeslib.as_array(pointer, (self.facts.vocab_size,))

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """[S - first, V] logits at positions first.. of a fresh sequence; resets before and after.

        Chunks have at most `ubatch` tokens, so that the engine's own buffer of logits stays bounded.
        """
        if not 0 <= first <= len(tokens):
            raise ValueError(f"first={first} is outside the {len(tokens)} tokens")
        self._make_room(len(tokens), taken=0)
        self.reset()
        result = np.empty((len(tokens) - first, self.facts.vocab_size), np.float32)
        for start in range(0, len(tokens), self.options.ubatch):
            chunk = tokens[start : start + self.options.ubatch]
            skipped = min(max(first - start, 0), len(chunk))
            self._flags[:skipped] = 0
            self._flags[skipped : len(chunk)] = 1
            self._submit(self._flagged, chunk)
            rows = len(chunk) - skipped
            if rows:
                view = np.ctypeslib.as_array(
                    self._api.llama_get_logits(self._context), (rows, self.facts.vocab_size)
                )
                result[start + skipped - first :][:rows] = view
        self.reset()
        return result

    def reset(self, keep: int = 0) -> None:
        """Forget all tokens but the first `keep`; position tells how many stayed.

        A cache with sliding windows, or a recurrent state, can't always go back: then all are forgotten.
        """
        api = self._api
        keep = min(keep, self._position)
        # Removed even when nothing seems to follow: Ctrl-C may have come before a computation was counted.
        if keep > 0 and api.llama_memory_seq_rm(self._memory, 0, keep, -1):
            window = api.llama_model_n_swa(self._handles.model)
            oldest = api.llama_memory_seq_pos_min(self._memory, 0)
            # The next token sees the positions above keep - window, so the cache must reach back to there;
            # -1: the windows' cache has nothing left.
            if 0 <= oldest <= max(0, keep - window + 1):
                self._position = keep
                return
        api.llama_memory_clear(self._memory, False)
        self._position = 0

    def embed(
        self, tokens: Sequence[int], interrupted: Callable[[], bool] = lambda: False
    ) -> NDArray[np.float32] | None:
        """[E] the pooled hidden states of `tokens` [S], of length 1; None when interrupted between two chunks.

        Computed in a context of its own, which the first call makes.  Raises EngineError if they don't fit.
        """
        self._make_room(len(tokens), taken=0)
        handles = self._handles
        if handles.embedding is None:
            assert self._pooling is not None
            handles.embedding = EmbeddingContext(
                self._engine, handles.model, self.options, self._pooling, handles.pool
            )
        return handles.embedding.vector(tokens, interrupted)

    def close(self) -> None:
        """Free the engine's memory; the runner can't be used afterwards."""
        self._free()

    def _submit(self, batch: Any, tokens: Sequence[int]) -> None:
        """Decode at most `batch` tokens in one call."""
        self._tokens[: len(tokens)] = tokens
        batch.n_tokens = len(tokens)
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise self._refusal(code)
        self._position += len(tokens)

    def _make_room(self, count: int, taken: int | None = None) -> None:
        context = self.options.context or 0
        taken = self._position if taken is None else taken
        if taken + count > context:
            raise EngineError(
                f"the context is full: {taken} of {context} tokens taken, {count} more don't fit",
                hint="use a larger context (--context) or a shorter text",
            )

    def _refusal(self, code: int) -> EngineError:
        """The error of a decode call; the state is then what llama.cpp says it is."""
        self._position = self._api.llama_memory_seq_pos_max(self._memory, 0) + 1
        return self._engine.failure(f"llama.cpp could not compute (code {code})")


class _Handles:
    """The C objects of a runner, freed in order, once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model: Any = None
        self.context: Any = None
        self.embedding: EmbeddingContext | None = None
        self.pool: int | None = None

    def free(self) -> None:
        if self.embedding is not None:
            self.embedding.free()
        if self.context:
            self._engine.api.llama_free(self.context)
        if self.pool is not None:
            self._engine.free_threadpool(self.pool)
        if self.model:
            self._engine.api.llama_model_free(self.model)
        self.context = self.embedding = self.pool = self.model = None


def _load_model(engine: Engine, weights: Path, options: RunnerOptions) -> Any:
    api = engine.api
    parameters = api.llama_model_default_params()
    parameters.load_mode = {
        (True, False): api.LLAMA_LOAD_MODE_AUTO,
        (True, True): api.LLAMA_LOAD_MODE_MMAP_MLOCK,
        (False, True): api.LLAMA_LOAD_MODE_MLOCK,
        (False, False): api.LLAMA_LOAD_MODE_NONE,
    }[options.mmap, options.mlock]
    # Built by GCC, ggml's AMX kernels load an empty tile configuration and kill the process
    # (ggml-org/llama.cpp#26954): where they would be chosen, no weights are repacked.
    parameters.use_extra_bufts = not engine.has_amx
    if options.gpu_layers is not None:
        parameters.n_gpu_layers = options.gpu_layers
    engine.forget_log()
    model = api.llama_model_load_from_file(os.fsencode(weights), parameters)
    if not model:
        raise engine.failure(
            f"{weights.name}: llama.cpp does not load this model",
            hint="edgeslm inspect shows its architecture; a newer llama-cpp-python may know it",
        )
    return model


def _gpu_layers(engine: Engine, model: Any, options: RunnerOptions) -> int:
    """How many layers a GPU computes, the output counted as one."""
    if not engine.has_gpu:
        return 0
    layers = int(engine.api.llama_model_n_layer(model)) + 1
    return layers if options.gpu_layers is None else min(layers, options.gpu_layers)


def _flash_in_force(engine: Engine, options: RunnerOptions) -> bool:
    """Whether flash attention runs."""
    if options.flash_attention is not None:
        return options.flash_attention
    return options.kv_type not in PLAIN_KV_TYPES or engine.chose_flash_attention()


def _facts(api: Any, model: Any, vocab: Any, file: GgufFile) -> ModelFacts:
    text = ctypes.create_string_buffer(256)
    api.llama_model_desc(model, text, len(text))
    size = api.llama_vocab_n_tokens(vocab)
    ends = frozenset(token for token in range(size) if api.llama_vocab_is_eog(vocab, token))
    template = file.get("tokenizer.chat_template")

    def known(token: int) -> int | None:
        return None if token == _NULL_TOKEN else token

    return ModelFacts(
        architecture=file.architecture,
        description=text.value.decode("utf-8", errors="replace"),
        parameters=api.llama_model_n_params(model),
        weight_bytes=api.llama_model_size(model),
        vocab_size=size,
        context_length=api.llama_model_n_ctx_train(model),
        bos_token=known(api.llama_vocab_bos(vocab)),
        eos_token=known(api.llama_vocab_eos(vocab)),
        adds_bos=api.llama_vocab_get_add_bos(vocab),
        stop_tokens=ends,
        chat_template=template if isinstance(template, str) else None,
    )
