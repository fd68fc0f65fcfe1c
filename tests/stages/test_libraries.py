"""Another release of transformers, which a package beside edgeslm may bring, is said before it is used."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.workstation

from edgeslm.errors import ModelError  # noqa: E402
from edgeslm.stages.libraries import need_transformers  # noqa: E402


def test_this_release_will_do() -> None:
    need_transformers("chat")


def test_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.23.0")
    with pytest.raises(ModelError, match=r"chat: loading it needs transformers 4\.57, 5\.23\.0") as caught:
        need_transformers("chat")
    assert "transformers==4.57.*" in caught.value.hint


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="needs transformers") as caught:
        need_transformers("chat")
    assert "edgeslm[workstation]" in caught.value.hint
