"""A folder is a registry: the file ``metrics/depth.py`` is the task kind ``depth``.

Third parties add entries through the entry-point group of the same name
(``secateur.metrics``, ``secateur.data`` …), each pointing at a module of the same form.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType


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
    """
    return importlib.import_module(entries(package)[name])
