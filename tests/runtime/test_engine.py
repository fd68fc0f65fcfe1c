"""Loading the C library: what is missing becomes one clear error, what it says becomes part of one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgeslm.errors import EngineError
from edgeslm.runtime.engine import Engine, load_engine


class FakeApi(SimpleNamespace):
    """What Engine asks of llama_cpp.llama_cpp."""

    def __init__(self, info: bytes = b"") -> None:
        super().__init__(
            llama_log_callback=lambda function: function,
            llama_log_set=lambda _callback, _data: None,
            llama_backend_init=lambda: None,
            llama_print_system_info=lambda: info,
            _lib=SimpleNamespace(),
        )


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        EngineError, match=r"llama-cpp-python is not installed.*pip install 'edgeslm\[gguf\]'"
    ):
        load_engine.__wrapped__()


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("libgomp.so.1: cannot open shared object file", "apt-get install libgomp1"),
        ("libllama.so: wrong ELF class: ELFCLASS32", "another processor"),
        ("libfoo.so: undefined symbol", "edgeslm doctor"),
    ],
)
def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, said: str, way_out: str) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"Failed to load shared library: {said}")

    monkeypatch.setitem(sys.modules, "llama_cpp", Broken("llama_cpp"))
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)
    with pytest.raises(EngineError) as error:
        load_engine.__wrapped__()
    assert said in error.value.message
    assert way_out in error.value.hint


def test_a_failure_quotes_the_errors_of_this_chapter() -> None:
    engine = Engine(FakeApi())
    engine._log(4, b"old\n", None)
    engine.forget_log()
    for level, text in [
        (2, b"chatter\n"),
        (3, b"careful\n"),
        (4, b"first "),
        (5, b"line\n"),
        (4, b"again\n"),
        (4, b"again\n"),
    ]:
        engine._log(level, text, None)
    assert (
        str(engine.failure("it broke", hint="mend it"))
        == "it broke; llama.cpp says: first line | again (mend it)"
    )


def test_a_failure_without_errors_quotes_warnings_or_nothing() -> None:
    engine = Engine(FakeApi())
    assert engine.failure("it broke").message == "it broke"
    engine._log(3, b"caf\xff\n", None)
    assert engine.failure("it broke").message == "it broke; llama.cpp says: caf\ufffd"


def test_amx_is_read_from_the_librarys_own_words() -> None:
    assert Engine(FakeApi(b"CPU : AVX512 = 1 | AMX_INT8 = 1 | ")).has_amx
    assert not Engine(FakeApi(b"CPU : AVX512 = 1 | ")).has_amx


def test_a_library_without_thread_pools() -> None:
    assert Engine(FakeApi()).new_threadpool(2) is None


def test_there_is_one_engine() -> None:
    pytest.importorskip("llama_cpp")
    assert load_engine() is load_engine()
