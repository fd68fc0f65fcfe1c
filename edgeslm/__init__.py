"""edgeslm: from a fine-tuned small language model to a measured bundle on an edge device.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeslm.bundle import Bundle as Bundle
    from edgeslm.bundle import open_bundle as open_bundle
    from edgeslm.errors import EdgeslmError as EdgeslmError
    from edgeslm.recipe import Recipe as Recipe
    from edgeslm.recipe import load_recipe as load_recipe

__version__ = "0.1.0"

_PUBLIC = {
    "Bundle": "edgeslm.bundle",
    "EdgeslmError": "edgeslm.errors",
    "Recipe": "edgeslm.recipe",
    "load_recipe": "edgeslm.recipe",
    "open_bundle": "edgeslm.bundle",
}

__all__ = ["Bundle", "EdgeslmError", "Recipe", "__version__", "load_recipe", "open_bundle"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgeslm' has no attribute {name!r}")
