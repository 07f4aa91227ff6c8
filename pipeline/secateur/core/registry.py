"""A folder is a registry: the file ``metrics/depth.py`` is the task kind ``depth``.

Third parties add entries through the entry-point group of the same name
(``secateur.metrics``, ``secateur.data`` …), each pointing at a module of the same form.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

from secateur.core.errors import RuntimeMissing


def entries(package: str) -> dict[str, str]:
    """Return ``{name: module path}`` of every entry in ``package`` and its entry-point group.

    A module is an entry when it is not listed in the package's ``NOT_ENTRIES``.
    """
    room = importlib.import_module(package)
    hidden: frozenset[str] = getattr(room, "NOT_ENTRIES", frozenset())
    found = {
        module.name: f"{package}.{module.name}"
        for module in pkgutil.iter_modules(room.__path__)
        if module.name not in hidden
    }
    found.update({point.name: point.value for point in entry_points(group=package)})
    return dict(sorted(found.items()))


def load(package: str, name: str) -> ModuleType:
    """Import and return the entry ``name``.

    Raises:
        KeyError: there is no such entry; callers turn it into an error in their own words.
        RuntimeMissing: a third party's module cannot be imported.
    """
    module = entries(package)[name]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a third party's code may raise anything
        if module == f"{package}.{name}":
            raise
        raise RuntimeMissing(
            f"'{name}' of {package} cannot be imported from {module}: {error!r}",
            hint="install what it needs, or mend it: it is no part of secateur",
        ) from error
