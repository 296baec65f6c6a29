"""The factor on the learning rate of each trained parameter: by layer, and by factor of an adapter (LoRA+)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import adapted_weights, lora_layers
from lightning_lora.lora.layers.base import FACTORS, LoRALayer
from lightning_lora.lora.patterns import matches, names_around, plain_name
from lightning_lora.lora.targets.ranks import check_rate_patterns

ADAPTERS = "adapters"
"""Name of the group of adapters, and the beginning of the names if there are several."""
FULL = "full"
"""Name of the group of parameters that are trained in full, and the beginning of the names if there are several."""
MULTIPLIER = "lr_multiplier"
"""Key of a group with another multiplier than its kind has by default: the multiplier."""


def lora_settings(module: nn.Module) -> LoRAConfig:
    """The settings of ``module.lora``, or those of the adapters if it has no such; the defaults without adapters."""
    lora = getattr(module, "lora", None)
    if isinstance(lora, (LoRAConfig, Mapping)):
        return LoRAConfig.from_dict(lora)
    first = next(iter(lora_layers(module).values()), None)
    return LoRAConfig() if first is None else first.lora_spec.config


def adapter_groups(module: nn.Module, factors: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of the factors of adapters, without rates: one for each multiplier.

    Without patterns and LoRA+ it is the one group ``adapters``. Groups of another multiplier than the setting are
    called as ``adapters_x3``. With LoRA+ the factors that start at zero have their own groups, as ``adapters_plus``.
    """
    config = lora_settings(module)
    if getattr(module, "lora", None) is not None:
        check_rate_patterns(config, _all_names(module))
    owned = {
        id(factor): (_first(_names(module, name, layer, weight), config, config.lr_multiplier), end)
        for name, (layer, weight) in adapted_weights(module).items()
        for end, factor in zip(_ends(layer), layer.lora_pair(weight), strict=True)
    }
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for factor in factors:
        multiplier, starts_at_zero = owned[id(factor)]
        found.setdefault((multiplier, starts_at_zero and config.lora_plus_ratio != 1), []).append(factor)
    groups = []
    for (multiplier, is_plus), parameters in sorted(found.items(), key=lambda item: item[0]):
        name = ADAPTERS if multiplier == config.lr_multiplier else f"{ADAPTERS}_x{multiplier:g}"
        group = {"params": parameters, "name": f"{name}_plus" if is_plus else name}
        total = multiplier * config.lora_plus_ratio if is_plus else multiplier
        groups.append(group if group["name"] == ADAPTERS else group | {MULTIPLIER: total})
    return groups


def full_groups(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of what is trained in full, without rates: ``full``, and others called as ``full_x0.1``."""
    config = lora_settings(module) if lora_layers(module) else LoRAConfig()
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        around = [*_below_root(module, names[id(parameter)])]
        found.setdefault(_first([n for name in around for n in names_around(name)], config, 1.0), []).append(parameter)
    return [
        {"params": own, "name": FULL} | ({} if value == 1 else {"name": f"{FULL}_x{value:g}", MULTIPLIER: value})
        for value, own in sorted(found.items())
    ]


def group_multiplier(module: nn.Module, group: Mapping[str, Any]) -> float:
    """The factor on the learning rate of full fine-tuning with which a parameter group trains."""
    if MULTIPLIER in group:
        return group[MULTIPLIER]
    return lora_settings(module).lr_multiplier if group.get("name") == ADAPTERS else 1.0


def _first(names: Iterable[str], config: LoRAConfig, default: float) -> float:
    """The value of the first pattern of ``lr_multiplier_pattern`` that matches one of ``names``."""
    own = list(names)
    table = config.lr_multiplier_pattern
    return next((float(v) for pattern, v in table.items() if any(matches(n, pattern) for n in own)), default)


def _ends(layer: LoRALayer) -> tuple[bool, bool]:
    """Which of ``lora_A`` and ``lora_B`` starts at zero."""
    return FACTORS[0] == layer.zero_factor, FACTORS[1] == layer.zero_factor


def _names(module: nn.Module, name: str, layer: LoRALayer, weight: str) -> list[str]:
    """The names that a pattern may mean an adapted weight by: its own and that of its layer."""
    own = [name, name.rpartition(".")[0]] if layer.lora_prefix(weight) else [name]
    return [below for each in own for below in _below_root(module, each)]


def _all_names(module: nn.Module) -> list[str]:
    """All names that a pattern may match."""
    adapted = [n for name, (layer, w) in adapted_weights(module).items() for n in _names(module, name, layer, w)]
    trained = [plain_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return adapted + [n for name in trained for below in _below_root(module, name) for n in names_around(below)]


def _below_root(module: nn.Module, name: str) -> Iterator[str]:
    """``name`` in ``module``, and in the submodule to adapt if it lies there."""
    yield name
    root = getattr(module, "lora_root", None)
    if root and name.startswith(f"{root}."):
        yield name.removeprefix(f"{root}.")
