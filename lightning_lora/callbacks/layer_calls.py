"""Which adapted layers run, recorded without hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_lora.lora.layers.adapted import learning_layers
from lightning_lora.lora.layers.base import LoRALayer


class LayerCallRecorder:
    """Records which adapted layers that learn run, and which of the modules around them.

    While a batch runs, the ``forward`` of these modules is replaced by a function that records the call: hooks would
    switch off torch's fast paths. So is ``effective_weights`` of the layers, by which attention and encoder layers
    compute with adapters of layers that they do not call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parents = {name: _parent(module, name) for name in learning_layers(module)}
        self.not_called = list(self._parents)
        self._called: set[str] = set()
        self._replaced: dict[tuple[nn.Module, str], Any] = {}

    @property
    def bypassed(self) -> list[str]:
        """Names of layers that have never run though the module around them has."""
        return [name for name in self.not_called if self._parents[name] in self._called]

    def start(self, module: nn.Module) -> None:
        """Record calls from now on, of layers that have not been called so far and of the modules around them."""
        self.stop()
        for name in {*self.not_called, *(self._parents[name] for name in self.not_called)} - {*self._called, ""}:
            recorded = module.get_submodule(name)
            for method in ("forward", "effective_weights") if isinstance(recorded, LoRALayer) else ("forward",):
                self._replaced[recorded, method] = recorded.__dict__.get(method)
                recorded.__dict__[method] = self._recording(name, getattr(recorded, method))

    def stop(self) -> None:
        """Give every module its own methods back."""
        for (module, method), own in self._replaced.items():
            del module.__dict__[method]
            if own is not None:
                module.__dict__[method] = own
        self._replaced = {}
        self.not_called = [name for name in self.not_called if name not in self._called]

    def _recording(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        # Not a closure: a copy of the module, as a trace makes it, must run its own layers and record for itself.
        return partial(_record, self._called, name, method)


def _record(called: set[str], name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    called.add(name)
    return method(*args, **kwargs)


def _parent(module: nn.Module, name: str) -> str:
    """Name of the module whose ``forward`` should call layer ``name``: the nearest around it that is not a list."""
    parent = name.rpartition(".")[0]
    while parent and isinstance(module.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
        parent = parent.rpartition(".")[0]
    return parent
