"""Versions out of package metadata."""

from __future__ import annotations

import numpy as np

from edgeslm.versions import chosen_versions, engine_versions


def test_engine_versions_import_nothing() -> None:
    versions = engine_versions()
    assert versions["numpy"] == np.__version__
    assert versions["edgeslm"]
    assert {"python", "llama_cpp_python", "gguf", "torch", "transformers", "tokenizers"} <= set(versions)


def test_chosen_versions() -> None:
    assert chosen_versions("edgeslm", "numpy") == {
        name: engine_versions()[name] for name in ("edgeslm", "numpy")
    }
