"""Errors of a package that is not installed, as one line with the command that installs it."""

from __future__ import annotations

import re

from lightning_lora.versions import OURS, requirements


def missing_package(error: BaseException | None) -> str | None:
    """A sentence for the user if ``error`` or one of its causes is a package that is not installed, else None.

    Lightning, transformers and others name the command in errors of several types; Python itself only names the module.
    """
    while error is not None:
        if advice := missing_package_advice(str(error)):
            return advice
        error = error.__cause__ or error.__context__
    return None


def missing_package_advice(text: str) -> str | None:
    """The same from the text of an error, with the class that needs the package where the parser has named it."""
    where = ""
    for line in text.splitlines():
        if named := re.search(r"Problem with given class_path '(.+?)'", line):
            where = f"{named.group(1)}: "
        if "pip install" in line:
            return f"{where}{line.strip()}"
        module = re.search(r"No module named '(\w+)", line)
        if module and module.group(1) != OURS.replace("-", "_"):
            name = module.group(1)
            return f"{where}the package {name} is not installed: pip install {_extra(name) or name}"
    return None


def _extra(package: str) -> str | None:
    """The extra of ours that brings ``package``, as pip takes it."""
    for requirement in requirements():
        extra = re.search(r"extra == .(\w+)", str(requirement.marker))
        if extra and extra.group(1) != "dev" and requirement.name.replace("-", "_") == package:
            return f'"{OURS}[{extra.group(1)}]"'
    return None
