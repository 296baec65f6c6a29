"""Arguments of another type than the signature says: refused where they are given, by the name of the argument."""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import types
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_lora.errors.base import LoRAError
from lightning_lora.errors.settings import ConfigError

_WORDS: dict[Any, str] = {
    types.NoneType: "None",
    Any: "anything",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "a text",
    Path: "a path",
}


def check_arguments(called: Callable[..., Any], given: Mapping[str, Any], error: type[LoRAError] = ConfigError) -> None:
    """Refuse arguments of another type than ``called`` is annotated with.

    A whole number counts as a number; True and False do not, nor does NaN. A path counts as a text, which is no
    sequence of texts.

    Args:
        called: The function, or the class whose ``__init__`` is called.
        given: Its arguments by name, ``locals()`` at the top of it; other names are passed over.
        error: What is raised.

    Raises:
        ConfigError: Or ``error``, with the name of the argument, its type and what was given.
    """
    for name, kind in _annotations(called).items():
        if name in given and not is_a(given[name], kind):
            raise error(f"{name} must be {described(kind)}, got {reprlib.repr(given[name])}.")


def no_effect(called: Callable[..., Any], given: Mapping[str, Any], names: Iterable[str], why: str) -> str:
    """A sentence on those of ``names`` that were given another value than their default; empty if none was.

    Args:
        called: The function, or the class whose ``__init__`` is called.
        given: Its arguments by name, or more.
        names: Arguments of it that nothing reads.
        why: Why nothing reads them.

    >>> no_effect(sorted, {"key": None, "reverse": True}, ("key", "reverse"), "there is one row")
    'reverse=True has no effect: there is one row.'
    """
    parameters = inspect.signature(called).parameters
    unused = [f"{name}={given[name]!r}" for name in names if given[name] != parameters[name].default]
    return f"{' and '.join(unused)} has no effect: {why}." if unused else ""


def is_a(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of an annotated type, and so is all that it holds."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and bool(value == value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)  # numpy has its own
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if origin in (Union, types.UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is abc.Callable or not parts:
        return isinstance(value, origin or kind)
    if issubclass(origin, abc.Mapping):
        return isinstance(value, abc.Mapping) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
    return isinstance(value, abc.Sequence) and not isinstance(value, str) and all(is_a(v, parts[0]) for v in value)


def described(kind: Any) -> str:
    """An annotated type in words.

    >>> described(int | None)
    'a whole number or None'
    >>> described(str | list[str])
    'a text or a list of texts'
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(part) for part in parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is abc.Callable:
        return "a function"
    if not parts:
        return _WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    if issubclass(origin, abc.Mapping):
        return f"a mapping from {described(parts[0])} to {described(parts[1])}"
    return f"a list of {described(parts[0]).removeprefix('a ')}s"


@functools.cache
def _annotations(called: Callable[..., Any]) -> dict[str, Any]:
    function = called.__init__ if isinstance(called, type) else called
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {each.name for each in inspect.signature(function).parameters.values() if each.kind in named}
    return {name: kind for name, kind in get_type_hints(inspect.unwrap(function)).items() if name in names}
