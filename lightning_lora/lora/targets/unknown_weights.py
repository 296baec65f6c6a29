"""Weight matrices in modules of a kind that has no adapter, such as the convolutions of a graph network."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.adaptable import Candidates
from lightning_lora.lora.targets.selection import is_inside

REASON = "of an unknown kind"


def unknown_weights(root: nn.Module, candidates: Candidates, trainable: Collection[str]) -> dict[str, str]:
    """Dotted name of every parameter with two axes or more that no target can select, to the class of its module."""
    layers = {weight.layer for weight in candidates.values()}
    # The refusal of a layer stands for all that is in it.
    spoken_for = {weight.layer for weight in candidates.values() if weight.refusal} | {*trainable}
    found = {}
    for layer, module in root.named_modules():
        if is_inside(layer, spoken_for):
            continue
        kind = adapter_kind(module) if layer in layers else None
        adaptable = kind.weights(module) if kind is not None else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and name not in adaptable:
                found[plain_name(join(layer, name))] = type(module).__name__
    return found


def note(unknown: dict[str, str]) -> str:
    """The line for the start of a run."""
    named = first_five([f"{name} ({kind})" for name, kind in unknown.items()])
    return (
        f"no adapter for {named}: trainable trains a module in full, register_layer gives its class an adapter, and "
        f"requires_grad_(True) after the injection trains a single parameter"
    )
