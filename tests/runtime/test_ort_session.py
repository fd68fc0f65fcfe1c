"""Sessions on builds of ONNX Runtime that have a provider, lack it, or whose provider refuses the model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeslm.errors import EngineError, RecipeError
from edgeslm.runtime.ort_session import PROVIDERS, Opened, open_session

CPU = PROVIDERS["cpu"]
MODEL = Path("model.onnx")


class Build:
    """An onnxruntime with some providers; refuses: those that fail at loading; idle: those that don't start."""

    def __init__(self, *has: str, refuses: tuple[str, ...] = (), idle: tuple[str, ...] = ()) -> None:
        self.has, self.refuses, self.idle = [PROVIDERS[name] for name in has], refuses, idle
        self.asked: list[Any] = []

    def module(self) -> Any:
        def session(path: Path, options: Any, *, providers: list[Any]) -> Any:
            self.asked.append((path, options.intra_op_num_threads, providers))
            names = [one if isinstance(one, str) else one[0] for one in providers]
            for name in self.refuses:
                if PROVIDERS[name] in names:
                    raise RuntimeError(f"\n{name}: no such operator\nat line 3")
            started = [name for name in names if name not in [PROVIDERS[idle] for idle in self.idle]]
            return SimpleNamespace(get_providers=lambda: started)

        return SimpleNamespace(
            SessionOptions=SimpleNamespace, InferenceSession=session, get_available_providers=lambda: self.has
        )


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(build: Build, provider: str | None) -> Opened:
        monkeypatch.setitem(sys.modules, "onnxruntime", build.module())
        return open_session(MODEL, threads=3, provider=provider)

    return use


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_the_cpu_is_the_default(asked: str | None, use: Any) -> None:
    build = Build("cpu", "coreml")
    opened = use(build, asked)
    assert (opened.provider, opened.notes) == ("cpu", ())
    assert build.asked == [(MODEL, 3, [CPU])]


def test_a_provider_with_the_cpu_behind_it(use: Any) -> None:
    build = Build("coreml", "xnnpack", "cpu")
    opened = use(build, "coreml")
    assert (opened.provider, opened.notes) == ("coreml", ())
    assert build.asked[-1][2] == [(PROVIDERS["coreml"], {}), CPU]
    use(build, "xnnpack")
    assert build.asked[-1][2] == [(PROVIDERS["xnnpack"], {"intra_op_num_threads": "3"}), CPU]


def test_a_missing_provider(use: Any) -> None:
    opened = use(Build("cpu"), "coreml")
    assert opened.provider == "cpu"
    assert opened.notes == ("this build of ONNX Runtime has no coreml: the model runs on the CPU",)


def test_a_provider_that_refuses(use: Any) -> None:
    build = Build("nnapi", "cpu", refuses=("nnapi",))
    opened = use(build, "nnapi")
    assert opened.provider == "cpu"
    assert "nnapi refuses this model" in opened.notes[0]
    assert "nnapi: no such operator" in opened.notes[0]
    assert build.asked[-1][2] == [CPU]


def test_a_provider_that_does_not_start(use: Any) -> None:
    opened = use(Build("coreml", "cpu", idle=("coreml",)), "coreml")
    assert (opened.provider, opened.notes) == (
        "cpu", ("coreml did not start: the model runs on the CPU",)
    )  # fmt: skip


def test_what_is_refused_everywhere_is_an_error(use: Any) -> None:
    with pytest.raises(
        EngineError, match=r"model\.onnx: ONNX Runtime does not load this model: cpu: no such operator "
    ):
        use(Build("cpu", refuses=("cpu",)), None)
    with pytest.raises(RecipeError, match="unknown execution provider 'tpu'"):
        use(Build("cpu"), "tpu")
