"""Versions of what a result depends on, by package metadata: nothing is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from edgeslm import __version__

PACKAGES = ("llama_cpp_python", "onnxruntime", "numpy", "tokenizers", "gguf", "onnx", "torch", "transformers",
            "accelerate", "peft", "scikit-learn")  # fmt: skip
"""What a result's bytes or figures may depend on."""

TRANSFORMERS = "4.57"
"""The release of transformers whose modules the exporters and loaders know: 5 has moved and renamed some."""


def engine_versions() -> dict[str, str | None]:
    """Versions that a result depends on, by package metadata: nothing is imported.  None: not installed."""
    versions: dict[str, str | None] = {"edgeslm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def chosen_versions(*names: str) -> dict[str, str | None]:
    """Those of engine_versions that decide one result."""
    versions = engine_versions()
    return {name: versions[name] for name in names}
