"""Whether the libraries that models are loaded with are here, in the release that this code knows."""

from __future__ import annotations

from edgeslm.errors import ModelError
from edgeslm.versions import TRANSFORMERS


def need_transformers(name: str) -> None:
    """Raises ModelError when torch or transformers is missing or broken, or transformers is another release.

    name: the model that is to be loaded.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name}: loading it needs {error.name}", hint="pip install 'edgeslm[workstation]'"
        ) from error
    except ImportError as error:
        why = (str(error).strip().splitlines() or ["it does not import"])[0]
        raise ModelError(
            f"{name}: loading it needs transformers, and {why}",
            hint="pip install --upgrade 'edgeslm[workstation]'",
        ) from error
    found = transformers.__version__
    if found.split(".")[:2] != TRANSFORMERS.split("."):
        raise ModelError(
            f"{name}: loading it needs transformers {TRANSFORMERS}, {found} is installed",
            hint=f"pip install 'transformers=={TRANSFORMERS}.*'  (another package has replaced it: give each "
            "its own virtual environment, or install that one with --no-deps)",
        )
