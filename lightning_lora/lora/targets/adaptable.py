"""The weights of a module that targets can select: which can be adapted, their roles, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.errors import LayerError, first_five
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import LoRALayer, WeightShape
from lightning_lora.lora.layers.registry import adapter_kind, kind_of_named, refusal
from lightning_lora.lora.patterns import matches
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.lora.targets.uncalled_layers import uncalled_children

Value = TypeVar("Value")


@dataclass(frozen=True)
class Candidate:
    """A weight that targets can select: adaptable, or refused for a reason.

    Args:
        name: The name of the layer, or layer and parameter where a layer has several weights (see `layers.adapted`).
        layer: Dotted name of the layer that holds the weight.
        parameter: Name of the weight in its layer; empty if the layer is refused.
        role: What the layer is in its model: ``attention``, ``mlp``, ``head``, ...
        refusal: Why the layer cannot be adapted; empty if it can.
    """

    name: str
    layer: str
    parameter: str
    role: str
    refusal: str = ""

    def kind(self, root: nn.Module) -> type[LoRALayer]:
        """The class of adapted layer that the layer becomes."""
        kind = adapter_kind(root.get_submodule(self.layer))
        assert kind is not None
        return kind

    def shape(self, root: nn.Module) -> WeightShape:
        """The weight as the matrix that its update is added to."""
        return self.kind(root).weights(root.get_submodule(self.layer))[self.parameter]

    def matches(self, pattern: str) -> bool:
        """Whether a pattern matches the name of this weight or of its layer."""
        return matches(self.name, pattern) or matches(self.layer, pattern)

    def matches_any(self, patterns: Iterable[str]) -> bool:
        """Whether any of the patterns matches this weight."""
        return any(self.matches(pattern) for pattern in patterns)

    def first_match(self, table: Mapping[str, Value], default: Value) -> Value:
        """The value of the first pattern in ``table`` that matches this weight, or ``default``."""
        return next((value for pattern, value in table.items() if self.matches(pattern)), default)


Candidates = dict[str, Candidate]


def find_candidates(root: nn.Module) -> Candidates:
    """Name to candidate for every weight below ``root``; a refused layer is one candidate."""
    refused = refused_layers(root)
    found: Candidates = {}
    for layer, role in module_roles(root).items():
        module = root.get_submodule(layer)
        kind = adapter_kind(module)
        if kind is None or layer in refused:
            found[layer] = Candidate(layer, layer, "", role, refused[layer])
            continue
        for parameter in kind.weights(module):
            name = join(layer, parameter) if kind.prefix(module, parameter) else layer
            found[name] = Candidate(name, layer, parameter, role)
    return found


def refused_layers(root: nn.Module) -> dict[str, str]:
    """Name to reason for every layer with weights that cannot be adapted."""
    refused = {name: reason for name, module in root.named_modules() if (reason := refusal(module))}
    for name, module in root.named_modules():
        for child in sorted(uncalled_children(module)):
            if kind_of_named(module.get_submodule(child)) is not None:
                refused[join(name, child)] = f"{type(module).__name__} reads its weight without calling it"
    return refused


def check_built(root: nn.Module) -> None:
    """Raise `ConfigError` if any parameter has no shape yet."""
    # Freezing, counting and hashing all need shapes, so a single lazy layer is refused wherever it is.
    lazy = [name for name, parameter in root.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise LayerError(
            f"{len(lazy)} parameters are lazy and have no shape yet ({first_five(lazy)}): run one batch through the "
            f"model first."
        )
