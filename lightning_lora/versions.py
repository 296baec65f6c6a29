"""Versions of the installed packages, as files and messages name them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(name: str) -> str:
    """The version of an installed package; ``"not installed"`` for a package that runs from a checkout.

    >>> installed_version("no-such-package")
    'not installed'
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
