"""Swapping the class of a module for a subclass: the class it gets, and the class it had."""

from __future__ import annotations

import copyreg
import functools
from typing import Any, TypeVar

from torch import nn

from lightning_lora.errors import LayerError

Mixin = TypeVar("Mixin")

# Adapted kind and class of the module, to the class the module gets.
_SWAPPED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swapped_type(kind: type[nn.Module], module_type: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of ``module_type`` gets: ``kind`` itself, or ``kind`` mixed into the user's subclass."""
    if (kind, module_type) not in _SWAPPED:
        bases = (kind,) if issubclass(kind, module_type) else (kind, module_type)
        made = kind if len(bases) == 1 else type(f"LoRA{module_type.__name__}", bases, {"__module__": kind.__module__})
        _SWAPPED[kind, module_type] = made
    return _SWAPPED[kind, module_type]


def base_type(swapped: type) -> type[nn.Module]:
    """The class that a module of class ``swapped`` had before.

    Raises:
        ConfigError: If ``swapped`` is not a class that `swapped_type` returned.
    """
    return _kind_and_base(swapped)[1]


def reduce_swapped(module: nn.Module) -> Any:
    """Result of ``__reduce_ex__``: a class made on the fly cannot be imported by name, so unpickling makes it again."""
    # Python before 3.11 has no `object.__getstate__`; recurrent layers have one of their own.
    getstate = getattr(module, "__getstate__", None)
    return _rebuild, _kind_and_base(type(module)), getstate() if getstate is not None else module.__dict__.copy()


def _kind_and_base(swapped: type) -> tuple[type[nn.Module], type[nn.Module]]:
    # A sharding wrapper may have swapped the class once more, so the bases are searched too.
    for candidate in swapped.__mro__:
        for kind_and_base, made in _SWAPPED.items():
            if made is candidate:
                return kind_and_base
    raise LayerError(f"{swapped.__name__} is not an adapted layer.")


def _rebuild(kind: type[nn.Module], module_type: type[nn.Module]) -> nn.Module:
    made = swapped_type(kind, module_type)
    return made.__new__(made)


def mix_in(value: object, mixin: type[Mixin]) -> Mixin:
    """Add ``mixin`` in front of the class of ``value``, which keeps the name of its class, and return ``value``.

    Copies and pickles of ``value`` have the mixin too.
    """
    value.__class__ = _mixed_type(mixin, type(value))
    assert isinstance(value, mixin)
    return value


@functools.cache
def _mixed_type(mixin: type, kind: type) -> type:
    def reduce(value: object, protocol: Any) -> Any:
        # The class cannot be imported by its name, so unpickling makes it again.
        reduced: Any = super(made, value).__reduce_ex__(max(int(protocol), 2))
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is made:  # pyright: ignore[reportAttributeAccessIssue]
            return _new_mixed, (mixin, kind, *reduced[1][1:]), *reduced[2:]
        return reduced

    attributes = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made: Any = type(kind.__name__, (mixin, kind), attributes | {"__reduce_ex__": reduce})
    return made


def _new_mixed(mixin: type, kind: type, *arguments: Any) -> Any:
    made = _mixed_type(mixin, kind)
    return made.__new__(made, *arguments)
