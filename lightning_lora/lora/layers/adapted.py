"""Finding the adapted layers of a module, and the names of adapted weights.

An adapted weight has the name of its layer (``layers.0.up_proj``), or, where the layer holds several weights, the name
of its parameter (``layers.0.experts.down_proj``). Its factors are called ``layers.0.up_proj.lora_A`` and
``layers.0.experts.down_proj_lora_A``.
"""

from __future__ import annotations

from torch import nn

from lightning_lora.errors import check_arguments
from lightning_lora.lora.layers.base import FACTORS, MAGNITUDE, LoRALayer
from lightning_lora.lora.patterns import plain_name


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Dotted name to adapted layer, in module order; empty if nothing is adapted.

    Names leave out what ``torch.compile`` and other wrappers add.
    """
    check_arguments(lora_layers, {"module": module})
    return {plain_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALayer)}


def learning_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of ``module`` whose factors are to be trained: all but those of frozen copies."""
    return {name: layer for name, layer in lora_layers(module).items() if not layer.lora_held}


def keep_gates(module: nn.Module, keep: bool) -> None:
    """Keep the products of gates that adapted layers of ``module`` receive, or compute them again in the backward pass.

    See `StepMemory`, by which a LightningModule sets it.
    """
    for layer in lora_layers(module).values():
        layer.lora_keeps_gate = keep


def adapted_weights(module: nn.Module) -> dict[str, tuple[LoRALayer, str]]:
    """Name of every adapted weight to its layer and the name of its parameter in the layer, in module order.

    A weight that several layers share has the name of the layer that owns its factors.
    """
    return {
        join(name, weight) if layer.lora_prefix(weight) else name: (layer, weight)
        for name, layer in lora_layers(module).items()
        for weight in layer.lora_specs
        if not layer.lora_follows
    }


def learning_weights(module: nn.Module) -> dict[str, tuple[LoRALayer, str]]:
    """The entries of `adapted_weights` whose factors are to be trained: all but those of frozen copies."""
    return {name: each for name, each in adapted_weights(module).items() if not each[0].lora_held}


def following_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Dotted name to every layer that shares the weight and the factors of another layer."""
    return {name: layer for name, layer in lora_layers(module).items() if layer.lora_follows}


def other_names(module: nn.Module) -> dict[str, LoRALayer]:
    """Further dotted names of adapted layers that a module holds in several places, each to its layer."""
    first = set(lora_layers(module))
    everywhere = module.named_modules(remove_duplicate=False)
    named = {plain_name(name): layer for name, layer in everywhere if isinstance(layer, LoRALayer)}
    return {name: layer for name, layer in named.items() if name not in first}


def base_parameter(name: str, layer: LoRALayer, weight: str) -> str:
    """Dotted name of the parameter that holds an adapted weight."""
    return name if layer.lora_prefix(weight) else join(name, weight)


def factor_name(name: str, layer: LoRALayer, weight: str, factor: str) -> str:
    """Dotted name of a factor of an adapted weight; ``factor`` is ``lora_A`` or ``lora_B``."""
    return f"{name}_{factor}" if layer.lora_prefix(weight) else join(name, factor)


def factor_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Dotted name to every factor in ``module``; factors that several layers share appear once."""
    return {
        join(name, factor): parameter
        for name, layer in lora_layers(module).items()
        for factor, parameter in layer.lora_factors().items()
        if not layer.lora_follows
    }


def held_factors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Dotted name to every factor in ``module`` that is frozen on purpose, in a frozen copy of another network."""
    learning = {id(factor) for layer in learning_layers(module).values() for factor in layer.lora_factors().values()}
    return {name: factor for name, factor in factor_parameters(module).items() if id(factor) not in learning}


def factor_owner(name: str) -> tuple[str, str]:
    """``(name of the adapted weight, "lora_A", "lora_B" or "lora_magnitude")`` from the dotted name of a factor.

    >>> factor_owner("layers.0.up_proj.lora_A"), factor_owner("layers.0.experts.down_proj_lora_B")
    (('layers.0.up_proj', 'lora_A'), ('layers.0.experts.down_proj', 'lora_B'))
    """
    module, _, leaf = name.rpartition(".")
    if leaf in (*FACTORS, MAGNITUDE):
        return module, leaf
    return join(module, leaf[: -len("_lora_A")]), leaf[-len("lora_A") :]


def join(prefix: str, name: str) -> str:
    """The dotted name of ``name`` below ``prefix``; the prefix of the root is empty."""
    return f"{prefix}.{name}" if prefix else name
