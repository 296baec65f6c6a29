"""Parts of messages: checks of settings, near names, short lists; and what is in the errors of others."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from lightning_lora.errors.base import LoRAError
from lightning_lora.errors.settings import ConfigError


def user_error(error: BaseException | None) -> LoRAError | None:
    """The first `LoRAError` in ``error`` and its chain of causes; None if there is none."""
    while error is not None and not isinstance(error, LoRAError):
        error = error.__cause__ or error.__context__
    return error


def check_choice(
    name: str,
    value: object,
    choices: Collection[str],
    error: type[LoRAError] = ConfigError,
    *,
    optional: bool = False,
) -> None:
    """Refuse a value of a setting that is none of its choices, and name those like it.

    Raises:
        ConfigError: Or ``error``, if ``value`` is none of them.
    """
    if value not in choices and not (optional and value is None):
        allowed = ", ".join(choices) + (" or null" if optional else "")
        raise error(f"{name} must be one of {allowed}, got {value!r}{did_you_mean(str(value), choices)}")


def check_count(
    name: str, value: object, error: type[LoRAError] = ConfigError, *, least: int = 1, optional: bool = False
) -> None:
    """Refuse a value of a setting that is no whole number, or too small a one.

    Args:
        value: What the user gave. True and False are no numbers.

    Raises:
        ConfigError: Or ``error``, if ``value`` is no such number.
    """
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise error(f"{name} must be a whole number of {least} or more, got {value!r}.")


def first_line(error: BaseException) -> str:
    r"""The first line of a message of another library, which may go on for pages; its class where it says nothing.

    >>> first_line(ValueError("no such device\nTraceback of the driver"))
    'no such device'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kind_and_line(error: BaseException) -> str:
    """The class of an error of another library with its `first_line`, each said once.

    >>> kind_and_line(KeyError("rows")), kind_and_line(KeyError())
    ("KeyError: 'rows'", 'KeyError')
    """
    return ": ".join(dict.fromkeys((type(error).__name__, first_line(error))))


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an error message: a suggestion of known names similar to ``name``, or a full stop.

    >>> did_you_mean("rnak", ["rank", "alpha"])
    "; did you mean 'rank'?"
    >>> did_you_mean("zzz", ["rank", "alpha"])
    '.'
    """
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else "."


def first_five(names: Iterable[str]) -> str:
    """The first five names and the number of further ones, for messages that must stay short.

    >>> first_five("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
