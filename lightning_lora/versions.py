"""Versions of the installed packages: as files and messages name them, and whether this package supports them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from lightning_lora.errors import VersionError

OURS = "lightning-lora"


def installed_version(name: str) -> str:
    """The version of an installed package; ``"not installed"`` for a package that runs from a checkout.

    >>> installed_version("no-such-package")
    'not installed'
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def requirements() -> list[Requirement]:
    """What ``pyproject.toml`` asked for when this package was installed, with extras; empty if it was not."""
    try:
        return [Requirement(line) for line in requires(OURS) or []]
    except PackageNotFoundError:
        return []


@cache
def check_own_versions() -> None:
    """Check once in a process, by `check_versions`, what ``pyproject.toml`` asks for."""
    check_versions(requirements())


def check_versions(needed: Iterable[Requirement], installed: Callable[[str], str] = installed_version) -> None:
    """Check that the libraries of this package are installed in versions that it supports.

    pip checks this when it installs this package, and only warns when it installs another version later. A library that
    is not installed passes: Python says so when it is imported.

    Raises:
        VersionError: If a library has another version; the message names all of them, and the command that helps.
    """
    wrong = [
        one
        for one in needed
        if (one.marker is None or one.marker.evaluate({"extra": ""})) and not _fits(one, installed(one.name))
    ]
    if wrong:
        found = ", ".join(f"{one.name} {installed(one.name)}" for one in wrong)
        right = " ".join(f'"{one.name}{one.specifier}"' for one in wrong)
        raise VersionError(f"lightning-lora does not support the installed {found}: pip install {right}")


def _fits(needed: Requirement, present: str) -> bool:
    try:
        # Builds of vendors call themselves 2.10.0a0+... and have what 2.10 has.
        return needed.specifier.contains(Version(present).base_version)
    except InvalidVersion:  # not installed, or with a name of its own
        return True
