"""Which weights of a module can be adapted, what each is in its model, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.errors import ConfigError, first_five
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.registry import adapter_kind, refusal
from lightning_lora.lora.patterns import matches
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.lora.targets.uncalled_layers import uncalled_children

Value = TypeVar("Value")


@dataclass(frozen=True)
class AdaptableWeight:
    """One weight that is adaptable, or would be but for a reason (then ``parameter`` is empty)."""

    layer: str
    parameter: str
    role: str

    def kind(self, root: nn.Module) -> type[LoRALayer]:
        """What its layer becomes."""
        kind = adapter_kind(root.get_submodule(self.layer))
        assert kind is not None
        return kind

    def is_hit(self, name: str, pattern: str) -> bool:
        """Whether a pattern means this weight: by its own name or by that of its layer."""
        return matches(name, pattern) or matches(self.layer, pattern)

    def is_hit_by_any(self, name: str, patterns: Iterable[str]) -> bool:
        """Whether one of the patterns does."""
        return any(self.is_hit(name, pattern) for pattern in patterns)

    def first_hit(self, name: str, table: Mapping[str, Value], default: Value) -> Value:
        """The value of the first pattern in ``table`` that does, else ``default``."""
        return next((value for pattern, value in table.items() if self.is_hit(name, pattern)), default)


Weights = dict[str, AdaptableWeight]


def adaptable_weights(root: nn.Module, refused: Mapping[str, str]) -> Weights:
    """Every weight below ``root`` by name (see `layers.walk`); a layer in ``refused`` is one without parameter."""
    found: Weights = {}
    for name, role in module_roles(root).items():
        module = root.get_submodule(name)
        kind = adapter_kind(module)
        if kind is None or name in refused:
            found[name] = AdaptableWeight(name, "", role)
            continue
        for parameter in kind.weights(module):
            own_name = join(name, parameter) if kind.prefix(module, parameter) else name
            found[own_name] = AdaptableWeight(name, parameter, role)
    return found


def refused_layers(root: nn.Module) -> dict[str, str]:
    """Layers with weights that have no adapter here, and why: they must be named, not passed over in silence."""
    refused = {name: reason for name, module in root.named_modules() if (reason := refusal(module))}
    for name, module in root.named_modules():
        for child in sorted(uncalled_children(module)):
            if adapter_kind(module.get_submodule(child)) is not None:
                refused[join(name, child)] = f"{type(module).__name__} reads its weight without calling it"
    return refused


def check_built(root: nn.Module) -> None:
    """Raise `ConfigError` if a parameter has no shape yet."""
    # Freezing, counting and hashing all need shapes, so one unbuilt layer anywhere is one too many.
    lazy = [name for name, parameter in root.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} parameters are lazy and have no shape yet ({first_five(lazy)}): run one batch through the "
            f"model first."
        )
