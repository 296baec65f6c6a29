"""Hooks that do their part once, even if several classes of a module override them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Hook = Callable[..., Any]


def outermost(before: Hook | None = None, after: Hook | None = None) -> Callable[[Hook], Hook]:
    """Wrap a hook so that two functions run once, around the outermost of nested ``super()`` calls."""

    def wrap(hook: Hook) -> Hook:
        inside = f"_lora_inside_{hook.__name__}"

        @functools.wraps(hook)
        def wrapped(self: Any, *args: Any) -> Any:
            if self.__dict__.get(inside):
                return hook(self, *args)
            if before is not None:
                before(self, *args)
            self.__dict__[inside] = True
            try:
                result = hook(self, *args)
            finally:
                self.__dict__[inside] = False
            if after is not None:
                after(self, *args)
            return result

        wrapped.__dict__["keeps_lora"] = True
        return wrapped

    return wrap
