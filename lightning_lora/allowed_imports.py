"""Packages whose code a config may name: a class path, or the name of a reward, imports and calls what it points at."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

ALLOW_VARIABLE = "LIGHTNING_LORA_ALLOW"
"""Environment variable of prefixes of dotted names; processes that a strategy or a study starts see them too."""


def allow(prefixes: Sequence[str]) -> None:
    """Allow names that begin with ``prefixes``, beside those that are allowed already."""
    if prefixes:
        os.environ[ALLOW_VARIABLE] = " ".join([*allowed(), *prefixes])


def allowed() -> list[str]:
    """The prefixes that the user has allowed."""
    return os.environ.get(ALLOW_VARIABLE, "").split()


def look_in_working_folder() -> None:
    """Find modules in the folder that a command is run in, too: the path of the script ``lightning-lora`` lacks it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
