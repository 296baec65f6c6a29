"""What a forward pass may leave in a module: buffers, numbers and generators that are its attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ModuleState:
    """What the modules below a root hold now, apart from parameters."""

    def __init__(self, root: nn.Module) -> None:
        self._values = {
            (name, key): (module, value, _copied(value))
            for name, module in root.named_modules()
            for key, value in [*module._buffers.items(), *vars(module).items()]
            if _is_state(value)
        }

    def changed(self) -> str:
        """The dotted name of what has changed since; "" if nothing has."""
        return next((".".join(filter(None, where)) for where in self._values if not self._is_as_before(where)), "")

    def restore(self) -> None:
        """Set everything that has changed to what it was."""
        for where, (module, value, was) in self._values.items():
            if self._is_as_before(where):
                continue
            if isinstance(value, torch.Generator):
                value.set_state(was)
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(was)
            # Whatever was put in its place is taken away again.
            place: Any = module._buffers if where[1] in module._buffers else module.__dict__
            place[where[1]] = value

    def _is_as_before(self, where: tuple[str, str]) -> bool:
        module, value, was = self._values[where]
        now: Any = module._buffers.get(where[1], module.__dict__.get(where[1]))
        if isinstance(was, Tensor):
            same = isinstance(now, type(value)) and isinstance(now, (Tensor, torch.Generator))
            now = now.get_state() if isinstance(now, torch.Generator) else now
            return same and torch.equal(_bits(now), _bits(was))
        return type(now) is type(was) and now == was


def _is_state(value: Any) -> bool:
    return isinstance(value, (bool, int, float, torch.Generator)) or (isinstance(value, Tensor) and not value.is_meta)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _bits(x: Tensor) -> Tensor:
    """NaN is equal to itself in these."""
    return x.detach().reshape(-1).contiguous().view(torch.uint8)
