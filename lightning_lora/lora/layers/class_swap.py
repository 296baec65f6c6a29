"""Modules whose class was swapped for a subclass made for them: which class they get, and which they had."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from lightning_lora.errors import ConfigError

Mixin = TypeVar("Mixin")

_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def swapped_type(kind: type[nn.Module], module_type: type[nn.Module]) -> type[nn.Module]:
    """The class a module of ``module_type`` gets: ``kind`` itself, or ``kind`` mixed into the user's subclass."""
    if (kind, module_type) not in _MADE:
        bases = (kind,) if issubclass(kind, module_type) else (kind, module_type)
        made = kind if len(bases) == 1 else type(f"LoRA{module_type.__name__}", bases, {"__module__": kind.__module__})
        _MADE[kind, module_type] = made
    return _MADE[kind, module_type]


def base_type(swapped: type) -> type[nn.Module]:
    """The class a module had before.

    Raises:
        ConfigError: If it was never swapped.
    """
    return _origin(swapped)[1]


def reduce(module: nn.Module) -> Any:
    """What ``__reduce_ex__`` answers: classes made on the fly cannot be found by name, so they are made again."""
    # Python before 3.11 has no `object.__getstate__`; recurrent layers have one of their own.
    getstate = getattr(module, "__getstate__", None)
    return _rebuild, _origin(type(module)), getstate() if getstate is not None else module.__dict__.copy()


def _origin(swapped: type) -> tuple[type[nn.Module], type[nn.Module]]:
    # A sharding wrapper may have put its own class on top, hence the walk over the bases.
    for candidate in swapped.__mro__:
        for origin, made in _MADE.items():
            if made is candidate:
                return origin
    raise ConfigError(f"{swapped.__name__} is not an adapted layer.")


def _rebuild(kind: type[nn.Module], module_type: type[nn.Module]) -> nn.Module:
    made = swapped_type(kind, module_type)
    return made.__new__(made)


def mix_in(value: object, mixin: type[Mixin]) -> Mixin:
    """Put ``mixin`` in front of the class of ``value``, which keeps the name of its class; returns ``value``."""
    kind = type(value)
    value.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    assert isinstance(value, mixin)
    return value
