"""The part of a module outside `lora_root`: frozen as the base is, unless `trainable` names it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.adapter import inject_lora
from lightning_lora.lora.base_values import keep_base_values
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import join, lora_layers
from lightning_lora.lora.layers.quantised_weights import keep_stored_values, num_elements
from lightning_lora.lora.patterns import matches, names_around, plain_name
from lightning_lora.lora.reports import InjectionReport, count_parameters


def inject_below(module: nn.Module, root_name: str | None, root: nn.Module, config: LoRAConfig) -> InjectionReport:
    """Adapt ``root``, which lies inside ``module``, and freeze the rest of ``module``.

    Patterns of ``trainable`` match names inside ``root``, relative to it. A pattern that matches nothing there, and one
    that is a whole name, open what they match outside: modules or parameters, by their names in ``module``.

    Args:
        root_name: Dotted name of ``root`` in ``module``; None if it is the module itself.

    Returns:
        What was done, with numbers of parameters of the whole ``module``.

    Raises:
        TargetNotFoundError: If a pattern matches nothing.
        ConfigError: If `inject_lora` refuses a setting or the state of ``root``.
        AlreadyShardedError: If weights of ``root`` are sharded.
    """
    if root is module or root_name is None:
        return inject_lora(module, config)
    outside, around = _outside(module, root), set(names_around(root_name))
    inside, opened = split_trainable(module, root_name, root, config)
    report = inject_lora(root, inside)
    for layer in lora_layers(root).values():
        layer.lora_specs.update({name: replace(spec, config=config) for name, spec in layer.lora_specs.items()})
    _freeze_rest(module, root_name, root, outside, set(opened))
    trained = (*report.trainable, *_tops(sorted(opened), around))
    return replace(report, trainable=trained, parameters=count_parameters(module))


def split_trainable(
    module: nn.Module, root_name: str, root: nn.Module, config: LoRAConfig
) -> tuple[LoRAConfig, dict[str, nn.Parameter]]:
    """The settings for ``root`` alone, and the parameters outside it that ``trainable`` opens, by name."""
    outside, around = _outside(module, root), set(names_around(root_name))
    opened = _opened(outside, around, root, config.trainable)
    elsewhere = {pattern for pattern in opened if not _is_in(root, pattern)}
    parts = {part for found in opened.values() for name in found for part in names_around(name)} - around
    rates = {p: v for p, v in config.lr_multiplier_pattern.items() if not any(matches(part, p) for part in parts)}
    trainable = tuple(pattern for pattern in config.trainable if pattern not in elsewhere)
    inside = replace(config, trainable=trainable, lr_multiplier_pattern=rates)
    return inside, {name: outside[name] for found in opened.values() for name in found}


def _outside(module: nn.Module, root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of all modules that are not inside ``root``, by every name that they have there."""
    inside = set(root.modules())
    return {
        plain_name(join(owner, name)): parameter
        for owner, child in module.named_modules()
        if child not in inside
        for name, parameter in child.named_parameters(recurse=False)
    }


def _opened(
    outside: Iterable[str], around: Collection[str], root: nn.Module, patterns: Sequence[str]
) -> dict[str, list[str]]:
    """Each pattern that opens something outside to the names of the parameters that it opens."""
    opened = {}
    for pattern in patterns:
        fits = str.__eq__ if _is_in(root, pattern) else matches
        names = [n for n in outside if any(fits(part, pattern) for part in names_around(n) if part not in around)]
        if names:
            opened[pattern] = names
    return opened


def _freeze_rest(
    module: nn.Module, root_name: str, root: nn.Module, outside: dict[str, nn.Parameter], opened: Collection[str]
) -> None:
    """Freeze the parameters ``outside`` but those ``opened``, and say which of them would have been trained."""
    kept = {id(parameter) for parameter in (*root.parameters(), *(outside[name] for name in opened))}
    frozen = {name: parameter for name, parameter in outside.items() if id(parameter) not in kept}
    learning = [name for name, parameter in frozen.items() if parameter.requires_grad]
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    keep_base_values(module, [outside[name] for name in opened])
    for name in opened:
        outside[name].requires_grad_(True)
    keep_stored_values(module)
    if frozen:
        count = sum(num_elements(parameter) for parameter in {id(p): p for p in frozen.values()}.values())
        rank_zero_info(f"lora: outside of {root_name!r} {count:,} parameters are frozen")
    if learning:
        tops = _tops(learning, set(names_around(root_name)))
        rank_zero_warn(
            f"{len(learning)} parameters outside of lora_root {root_name!r} are frozen now, as LoRA trains nothing "
            f"there: {first_five(learning)}. To train them in full, as a new head must be, name them: "
            f"LoRAConfig(trainable={tops[:5]}{'' if len(tops) <= 5 else ', ...'}). Freeze them yourself if they are to "
            f"stay as they are."
        )


def _is_in(root: nn.Module, pattern: str) -> bool:
    return any(matches(name, pattern) for name, _ in root.named_modules() if name)


def _tops(names: Iterable[str], around: Collection[str]) -> list[str]:
    """The outermost modules that hold the named parameters and not the root; a parameter beside the root is its own."""
    return list(dict.fromkeys([part for part in names_around(name) if part not in around][-1] for name in names))
