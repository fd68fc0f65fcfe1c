"""llama.cpp's C library, loaded once: its log, its threads, and its failures in words."""

from __future__ import annotations

import ctypes
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeslm.errors import EngineError
from edgeslm.gguf_file import GGML_TYPES
from edgeslm.runtime.fit import DEFAULT_KV_TYPE

if TYPE_CHECKING:
    from edgeslm.runtime.runner import RunnerOptions

_WARN, _ERROR, _CONTINUED = 3, 4, 5
"""Log levels of ggml.h."""
_WATCHED = "Flash Attention"
_PARAMS_BYTES = 4096
"""Room for ggml_threadpool_params, which ggml fills in itself (it has under 600 bytes)."""


class Engine:
    """The loaded library: `api` is llama-cpp-python's module of C functions.  Use load_engine, not this."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self._lines: deque[tuple[int, str]] = deque(maxlen=100)
        # The C side keeps a bare pointer to the callback, so this object has to outlive every use of it.
        self._callback = api.llama_log_callback(self._log)
        api.llama_log_set(self._callback, None)
        api.llama_backend_init()

    def _log(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        if level == _CONTINUED and self._lines:
            level, start = self._lines.pop()
            line = start + line
        if level in (_WARN, _ERROR) or _WATCHED in line:
            self._lines.append((level, line))

    def forget_log(self) -> None:
        """Start a new chapter: what was said before is no part of the next failure."""
        self._lines.clear()

    def chose_flash_attention(self) -> bool:
        """What a context made since forget_log chose by itself; llama.cpp tells it in the log only."""
        return any(f"{_WATCHED} enabled" in line for _, line in self._lines)

    def failure(self, what: str, hint: str = "") -> EngineError:
        """An error that ends with what llama.cpp said last: its errors, or its warnings if it had none."""
        for level in (_ERROR, _WARN):
            lines = [line.strip() for kind, line in self._lines if kind == level and line.strip()]
            if lines:
                # llama.cpp repeats a failure on its way up: the first lines name the cause.
                return EngineError(f"{what}; llama.cpp says: {' | '.join(dict.fromkeys(lines[:3]))}", hint)
        return EngineError(what, hint)

    @property
    def has_amx(self) -> bool:
        """Whether the library was built with Intel's matrix extensions and would use them."""
        return b"AMX_INT8 = 1" in self.api.llama_print_system_info()

    @property
    def has_gpu(self) -> bool:
        """Whether the library was built for a GPU (Metal, CUDA, Vulkan) and finds one."""
        return bool(self.api.llama_supports_gpu_offload())

    def new_threadpool(self, threads: int) -> int | None:
        """A ggml thread pool with ggml's own defaults, as llama-bench makes it; None where there is none.

        A build without OpenMP starts new threads for every graph unless it is given a pool.
        """
        try:
            library = self.api._lib
            fill, create = library.ggml_threadpool_params_init, library.ggml_threadpool_new
        except AttributeError:
            return None
        parameters = ctypes.create_string_buffer(_PARAMS_BYTES)
        fill.argtypes, fill.restype = [ctypes.c_void_p, ctypes.c_int], None
        create.argtypes, create.restype = [ctypes.c_void_p], ctypes.c_void_p
        fill(parameters, threads)
        pool: int | None = create(parameters)
        return pool

    def attach_threadpool(self, context: int, pool: int) -> None:
        attach = self.api._lib.llama_attach_threadpool
        attach.argtypes, attach.restype = [ctypes.c_void_p] * 3, None
        attach(context, pool, None)

    def free_threadpool(self, pool: int) -> None:
        free = self.api._lib.ggml_threadpool_free
        free.argtypes, free.restype = [ctypes.c_void_p], None
        free(pool)


@cache
def load_engine() -> Engine:
    """The engine of this process: the C library has one log and one back end, so there is one of these."""
    try:
        from llama_cpp import llama_cpp as api
    except ModuleNotFoundError as error:
        raise EngineError(
            f"llama-cpp-python is not installed (no module named {error.name!r})",
            hint="pip install 'edgeslm[gguf]'",
        ) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise EngineError(
            f"llama-cpp-python does not load: {error}", hint=_loading_hint(str(error))
        ) from error
    return Engine(api)


def new_context(
    engine: Engine, model: Any, options: RunnerOptions, name: str, *, hidden_states: bool = False
) -> Any:
    """A context of a loaded model.  hidden_states: it also gives those of every token.  Raises EngineError."""
    api = engine.api
    parameters = api.llama_context_default_params()
    parameters.n_ctx = options.context
    parameters.n_batch = options.batch
    parameters.n_ubatch = options.ubatch
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = GGML_TYPES[(options.kv_type or DEFAULT_KV_TYPE).upper()].id
    parameters.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
    parameters.swa_full = False
    if options.gpu_layers == 0:  # else a GPU would still hold the cache and take large products
        parameters.offload_kqv = parameters.op_offload = False
    if hidden_states:
        parameters.embeddings, parameters.pooling_type = True, api.LLAMA_POOLING_TYPE_NONE
    engine.forget_log()
    context = api.llama_init_from_model(model, parameters)
    if not context:
        raise engine.failure(
            f"{name}: llama.cpp makes no context of {options.context} tokens with KV type {options.kv_type}",
            hint="use the KV type f16, flash attention on auto or a shorter context",
        )
    return context


def _loading_hint(text: str) -> str:
    if "libgomp" in text:
        return "install OpenMP's runtime: apt-get install libgomp1"
    if "wrong ELF class" in text or "incompatible architecture" in text:
        return "built for another processor: pip install --force-reinstall --no-cache-dir llama-cpp-python"
    return "edgeslm doctor shows what is wrong; pip install --force-reinstall 'edgeslm[gguf]' builds it again"
