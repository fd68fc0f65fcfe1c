"""The errors that a user sees; every other exception is a bug and keeps its traceback.

EdgeslmError          exit code 2: the user's input, machine or data is at fault
├── RecipeError       a recipe, device profile or option
├── ModelError        a model source: missing, damaged, unsupported
├── DataError         a text or data file
├── BundleError       a bundle: missing, changed or incomplete file
├── EngineError       an inference engine: not installed, or it refused the model
└── GateError         exit code 1: the artifact was built and misses a bound of its gate
"""

from __future__ import annotations


class EdgeslmError(Exception):
    """What is wrong, with the value, and what to do about it.

    message: one sentence that names the value at fault.  hint: the way out, or "".
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RecipeError(EdgeslmError):
    """A recipe, a device profile or an option of a command."""


class ModelError(EdgeslmError):
    """A model source that is missing, damaged or not supported."""


class DataError(EdgeslmError):
    """A text or data file."""


class BundleError(EdgeslmError):
    """A bundle with a missing, changed or unexpected file."""


class EngineError(EdgeslmError):
    """An inference engine that is not installed or refuses the model."""


class GateError(EdgeslmError):
    """A built artifact that misses a bound of its recipe's gate."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of a library's message, which may go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
