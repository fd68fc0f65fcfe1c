"""Versions out of package metadata."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from edgeslm.versions import TRANSFORMERS, chosen_versions, engine_versions


def test_engine_versions_import_nothing() -> None:
    versions = engine_versions()
    assert versions["numpy"] == np.__version__
    assert versions["edgeslm"]
    assert {"python", "llama_cpp_python", "gguf", "torch", "transformers", "tokenizers"} <= set(versions)


def test_chosen_versions() -> None:
    assert chosen_versions("edgeslm", "numpy") == {
        name: engine_versions()[name] for name in ("edgeslm", "numpy")
    }


def test_the_package_asks_for_the_release_of_transformers_that_it_checks() -> None:
    root = Path(__file__).parents[1]
    first, second = (int(part) for part in TRANSFORMERS.split("."))
    assert f'"transformers>={first}.{second},<{first}.{second + 1}"' in (root / "pyproject.toml").read_text()
    assert re.search(
        rf"^transformers=={re.escape(TRANSFORMERS)}\.", (root / "constraints.txt").read_text(), re.M
    )
