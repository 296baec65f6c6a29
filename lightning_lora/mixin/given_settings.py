"""LoRA settings that were given to a module: that they take effect, and that its adapters were made with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn

from lightning_lora.errors import AdapterStateError, first_five
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.lora.config import LoRAConfig, setting_changes
from lightning_lora.lora.layers.adapted import adapted_weights, lora_layers
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.patterns import first_match

# Where ``module`` is a `LoRAMixin`, its type is `Any`: the file of that class imports this one.


def check_they_take_effect(module: Any) -> None:
    """Refuse LoRA settings among hyperparameters or attributes of ``module`` that nothing reads.

    A ``lora`` that was set on the object, by ``super().__init__(lora=...)`` or by assignment, is meant, None included.
    Settings that were given to ``__init__`` and only stored must agree with what the class says.

    Args:
        module: A `LoRAMixin`; one with adapters passes.

    Raises:
        ConfigError: If other settings were given.
    """
    if "lora" in vars(module) or lora_layers(module):
        return
    present = None if module.lora is None else LoRAConfig.from_dict(module.lora)
    for place, given in _given_settings(module):
        if given != present:
            changes = "" if present is None else setting_changes(given.to_dict(), present.to_dict())
            raise AdapterStateError(
                f"{type(module).__name__} was given LoRA settings ({place}) that have no effect: its attribute lora "
                f"was not set, and it would {f'use those of its class ({changes})' if changes else 'train in full'}. "
                f"Pass them on with super().__init__(lora=...) or set self.lora in __init__; for full fine-tuning set "
                f"self.lora = None."
            )


def check_they_have_a_reader(module: LightningModule) -> None:
    """Refuse LoRA settings of a module that has neither adapters nor `LoRAMixin`, which would read them.

    Raises:
        ConfigError: If its class, attributes or hyperparameters hold settings.
    """
    values = {"lora": getattr(module, "lora", None), **dict(module.hparams), **vars(module)}
    given = [name for name, value in values.items() if isinstance(value, LoRAConfig)]
    if given and not lora_layers(module):
        raise AdapterStateError(
            f"{type(module).__name__} has LoRA settings ({given[0]}) that nothing reads: it would train in full. Put "
            f"LoRAMixin first among the bases of its class, or give the Trainer the LoRA callback."
        )


def _given_settings(module: LightningModule) -> Iterator[tuple[str, LoRAConfig]]:
    """Settings that ``module`` has stored, and where."""
    for place, values in (("hparams", dict(module.hparams)), ("self", vars(module))):
        for name, value in values.items():
            if isinstance(value, LoRAConfig) or (name == "lora" and isinstance(value, Mapping)):
                yield f"{place}.{name}", LoRAConfig.from_dict(value)


def check_they_are_used(module: Any) -> None:
    """Refuse to train a `LoRAMixin` in full that has LoRA settings.

    Raises:
        ConfigError: If ``lora`` is set, or should be, and nothing is adapted.
    """
    check_they_take_effect(module)
    if module.lora is not None and not lora_layers(module):
        raise AdapterStateError(
            f"{type(module).__name__} has lora settings and no adapters: it would train in full. Call "
            f"self.apply_lora() before the optimizer is built. Lightning does so in configure_model, of the module "
            f"that it trains and of no module inside it."
        )


def check_not_passed_over(module: Any) -> None:
    """Refuse a run in which a `LoRAMixin` with ``lora`` set is moved to the device inside a module that adapts nothing.

    Lightning calls the hooks of the outermost module only.

    Raises:
        ConfigError: If ``module`` is inside the module that is being trained, and has no adapters.
    """
    trainer = attached_trainer(module)
    if module.lora is None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    outer = trainer.lightning_module
    if outer is module or trainer.state.status != TrainerStatus.RUNNING or lora_layers(module):
        return
    name = next((name for name, child in outer.named_modules() if child is module), None)
    if name is not None:
        raise AdapterStateError(
            f"{name} of {type(outer).__name__} has lora settings that have no effect: Lightning adapts the outermost "
            f"module only, and {name} would train in full. Give {type(outer).__name__} the LoRAMixin and the settings, "
            f"or call self.{name}.apply_lora() in its __init__ or configure_model."
        )


def check_unchanged(module: Any) -> None:
    """Refuse settings other than those that the adapters of a `LoRAMixin` were made with.

    Other multipliers of the learning rate are allowed: the next optimizer reads them. Adapters from elsewhere, as from
    `load_adapter`, agree if rank, scale and dropout of each do; their own settings may name every layer.

    Args:
        module: The module, with ``lora`` set; one without adapters passes.

    Raises:
        ConfigError: With what differs, and what to do.
    """
    if not lora_layers(module):
        return
    made_with, made_in = module._lora_made_with or (None, module.lora_root)
    root, lora = module.get_submodule(module.lora_root or ""), LoRAConfig.from_dict(module.lora)
    changes = f"lora_root {made_in!r} -> {module.lora_root!r}" if made_in != module.lora_root else ""
    if lora_layers(root) and not changes:
        own = next(iter(lora_layers(root).values())).lora_spec.config
        changes = _changes(own, lora) if own == made_with else first_five(list(_other_adapters(root, lora)))
    if changes:
        ranks = sorted({spec.rank for layer in lora_layers(module).values() for spec in layer.lora_specs.values()})
        raise AdapterStateError(
            f"{type(module).__name__} is adapted at rank {' and '.join(map(str, ranks))} already, and lora has other "
            f"settings now ({changes}). Set them back to train these adapters further. For new ones call "
            f"remove_lora(module) first, and merge_lora(module) before it to keep what was learnt."
        )


def _changes(made_with: LoRAConfig, lora: LoRAConfig) -> str:
    rates = {name: getattr(made_with, name) for name in ("lr_multiplier", "lora_plus_ratio", "lr_multiplier_pattern")}
    return setting_changes(made_with.to_dict(), replace(lora, **rates).to_dict())


def _other_adapters(root: nn.Module, lora: LoRAConfig) -> Iterator[str]:
    """Adapters of ``root`` that ``lora`` would have made otherwise, in words."""
    for name, (layer, weight) in adapted_weights(root).items():
        spec = layer.lora_specs[weight]
        rank = _rank(name, layer, weight, lora)
        asked = AdapterSpec(rank, first_match(name, lora.alpha_pattern, lora.alpha), spec.role, lora)
        was, now = ((each.rank, each.scale, each.config.dropout, each.config.dora) for each in (spec, asked))
        if was != now:
            labels = ("rank", "scale", "dropout", "dora")
            odd = [f"{label} {a:g} -> {b:g}" for label, a, b in zip(labels, was, now, strict=True) if a != b]
            yield f"{name}: {', '.join(odd)}"


def _rank(name: str, layer: LoRALayer, weight: str, lora: LoRAConfig) -> int:
    """The rank that ``lora`` gives an adapted weight."""
    spec, (a, b) = layer.lora_specs[weight], layer.lora_pair(weight)
    # The number of active experts, which divides the rank of experts, is not kept; FSDP1 leaves factors without shape.
    if spec.role == "experts" or min(a.ndim, b.ndim) < 2:
        return spec.rank
    return min(first_match(name, lora.rank_pattern, lora.rank), a.shape[-1], b.shape[-2])
