"""Computing with ``W + scale * B A`` in place of ``W``, where torch reads a weight without calling its layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.lora.layers.base import LoRALayer


@contextmanager
def effective_weights(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Replace the adapted parameters of the active ``layers`` by their effective weights within the context.

    The sum is rounded once to the type of the weight, as merging rounds it. Within the context the layers add no
    update; on leaving, the parameters are the very objects they were.
    """
    active = [layer for layer in layers if layer.lora_active]
    base: dict[LoRALayer, dict[str, nn.Parameter | None]] = {}
    try:
        for layer in active:
            found: dict[str, Any] = layer.effective_weights()
            base[layer] = {name: layer._parameters[name] for name in found}
            layer._parameters.update(found)
            layer.lora_enabled = False
        yield
    finally:
        for layer, parameters in base.items():
            layer._parameters.update(parameters)
            layer.lora_enabled = True


class LoRAEffective(LoRALayer):
    """Base of layers whose computation cannot be split: they run unchanged, with effective weights.

    The update has no input of its own then, so dropout cannot act on it and is refused.
    """

    @classmethod
    @override
    def takes_dropout(cls, module: Any) -> bool:
        return False

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        with effective_weights([self]):
            return super().forward(*args, **kwargs)
