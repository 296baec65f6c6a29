"""A class path that leads to no class: the nearest one that does."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

from lightning_lora.errors import did_you_mean

_NO_ATTRIBUTE = re.compile(r"Problem with given class_path '(.+?)':\s+module '(.+?)' has no attribute '(.+?)'")
_NO_MODULE = re.compile(r"Problem with given class_path '(.+?)':\s+No module named '(.+?)'")
_NO_PATH = re.compile(r"Expected a dot import path string: (\w+)")
# Where a class is looked for if it is named without a path.
_PLACES = (
    "lightning_lora.callbacks",
    "lightning_lora.tasks",
    "lightning_lora.data",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)


def wrong_class_path(report: str) -> str | None:
    """A sentence about a class path that leads nowhere, with the nearest ones; None if the report is of another fault.

    Args:
        report: The error message of the parser.
    """
    if found := _NO_ATTRIBUTE.search(report):
        path, module, name = found.groups()
        return f"there is no class {path}: {module} has no {name!r}{did_you_mean(name, _names(module))}"
    if found := _NO_MODULE.search(report):
        return f"there is no class {found.group(1)}: no module is named {found.group(2)!r}."
    if found := _NO_PATH.search(report):
        name = found.group(1)
        paths = {f"{place}.{known}": known for place in _PLACES for known in _names(place)}
        near = did_you_mean(name, paths.values())
        full = [path for path, known in paths.items() if repr(known) in near]
        hint = (
            f"; did you mean {' or '.join(full)}?" if full else "; write it with its module, as package.module.Class."
        )
        return f"{name!r} is no class path{hint}"
    return None


def _names(module: str) -> list[str]:
    """Public classes and sub-packages of a module."""
    found = importlib.import_module(module)
    public = getattr(found, "__all__", None) or [name for name in dir(found) if not name.startswith("_")]
    classes = [name for name in public if inspect.isclass(getattr(found, name, None))]
    return classes + [inside.name for inside in pkgutil.iter_modules(getattr(found, "__path__", [])) if inside.ispkg]
