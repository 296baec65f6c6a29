"""Which adapted layers run, seen without hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import LoRALayer


class Calls:
    """Records which adapted layers are called, and which modules that hold one.

    Their ``forward`` is shadowed while a batch runs: hooks would switch torch's fast paths off. So is
    ``effective_weights``, by which attention and encoder layers compute with adapters of layers they do not call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.owner = {name: _owner(module, name) for name in lora_layers(module)}
        self.silent = list(self.owner)
        self._ran: set[str] = set()
        self._shadowed: dict[tuple[nn.Module, str], Any] = {}

    @property
    def passed_over(self) -> list[str]:
        """Layers that never ran though the module around them did."""
        return [name for name in self.silent if self.owner[name] in self._ran]

    def watch(self, module: nn.Module) -> None:
        """Record from now on."""
        self.stop()
        for name in {*self.silent, *(self.owner[name] for name in self.silent)} - {*self._ran, ""}:
            watched = module.get_submodule(name)
            for method in ("forward", "effective_weights") if isinstance(watched, LoRALayer) else ("forward",):
                self._shadowed[watched, method] = watched.__dict__.get(method)
                watched.__dict__[method] = self._recording(name, getattr(watched, method))

    def stop(self) -> None:
        """Give every module the methods it had."""
        for (module, method), own in self._shadowed.items():
            del module.__dict__[method]
            if own is not None:
                module.__dict__[method] = own
        self._shadowed = {}
        self.silent = [name for name in self.silent if name not in self._ran]

    def _recording(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self._ran.add(name)
            return method(*args, **kwargs)

        return record


def _owner(module: nn.Module, name: str) -> str:
    """The module whose ``forward`` should call ``name``: the nearest around it that is no mere list."""
    owner = name.rpartition(".")[0]
    while owner and isinstance(module.get_submodule(owner), (nn.ModuleList, nn.ModuleDict)):
        owner = owner.rpartition(".")[0]
    return owner
