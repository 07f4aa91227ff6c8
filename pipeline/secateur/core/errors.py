"""Every error a user can meet.

::

    SecateurError
    ├── RecipeError         the recipe (YAML) is wrong
    ├── ModelError          the parent, its checkpoint or its outputs are wrong
    ├── DataError           a data set, a label or an image is wrong
    ├── PlanError           no cut meets the budget
    ├── CalibrationError    activation ranges could not be found
    ├── RuntimeMissing      an optional library is not installed
    ├── BuildError          lowering or export failed
    ├── VerifyError         a finished bundle is worse than it may be   (exit 1)
    ├── DeviceError         a target or a device is unknown or unfit
    │   └── ConnectionLost  a device cannot be reached, or not any more
    ├── LibraryError        the library of earlier cuts, an entry or an archive cannot be used
    └── BundleError         a folder is no bundle, or cannot be read or written

A message says what is wrong, where, what was got and what was expected; the hint says what to
do. The command line prints both in one place (``cli.app``), so nobody else formats them.
"""

from __future__ import annotations

from pydantic_core import ValidationError


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def first_problem(error: BaseException) -> str:
    """Return where and what pydantic found wrong first; of another error its text."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


class SecateurError(Exception):
    """Base of all errors that are the user's to mend; never raised itself."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})"


class RecipeError(SecateurError):
    """A key of the recipe is missing, unknown or has a value that is not allowed."""


class ModelError(SecateurError):
    """The factory, the checkpoint or an output of the parent model is not what the recipe says."""


class DataError(SecateurError):
    """A data set, an image or a label cannot be used."""


class PlanError(SecateurError):
    """The budget cannot be met by removing whole channels on the target's grid."""


class CalibrationError(SecateurError):
    """Activation ranges for a lower precision could not be collected."""


class RuntimeMissing(SecateurError):
    """An optional library or program that this step needs is not installed."""


class BuildError(SecateurError):
    """Export or lowering failed, or its result differs from the model it came from."""


class VerifyError(SecateurError):
    """A bundle is damaged, or a task lost more accuracy than its ``max_drop`` allows."""

    exit_code = 1


class DeviceError(SecateurError):
    """A target profile or a device is unknown or unfit for what is asked of it."""


class ConnectionLost(DeviceError):
    """A device cannot be reached, or not any more; what was begun there can be resumed."""


class LibraryError(SecateurError):
    """The library of earlier cuts, one of its entries or an archive of them cannot be used."""


class BundleError(SecateurError):
    """A bundle cannot be read or written."""
