"""Every error a user can cause: what was wrong, where, and what to do.

Each class also inherits the built-in error a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoRAError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(LoRAError, ValueError):
    """A setting is outside its range, has the wrong type, or contradicts another one."""


class TargetNotFoundError(LoRAError, ValueError):
    """A name pattern matches no module, or only modules that cannot be adapted."""


class AdapterFileError(LoRAError, ValueError):
    """An adapter or checkpoint file is missing, damaged, incomplete or of an unsupported kind."""


class BaseMismatchError(LoRAError, ValueError):
    """An adapter was trained on other base weights than the ones at hand."""


class AlreadyShardedError(LoRAError, RuntimeError):
    """Adapters were asked for after the parameters had been wrapped or sharded."""


class DataError(LoRAError, ValueError):
    """A data file or one of its rows cannot be used."""


class GuardError(LoRAError, RuntimeError):
    """A run would train nothing, train the wrong thing, or has changed what must stay frozen."""


class GradientError(LoRAError, RuntimeError):
    """A gradient is NaN or infinite."""


class RunFolderError(LoRAError, ValueError):
    """The folder of a run cannot be written, or another run writes there."""


def user_error(error: BaseException | None) -> LoRAError | None:
    """The `LoRAError` at or behind ``error``, if there is one."""
    while error is not None and not isinstance(error, LoRAError):
        error = error.__cause__ or error.__context__
    return error


def closest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of a sentence: ``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, else ``"."``."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else "."


def first_five(names: Iterable[str]) -> str:
    """The first five names and how many follow, for messages that must stay readable."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
