"""Which of its adaptable weights a config means: roles, patterns, exclusions, and modules to train in full."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.errors import TargetNotFoundError, closest, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.patterns import matches
from lightning_lora.lora.targets.adaptable import AdaptableWeight, Weights

_TARGET_ROLES = {
    "all": frozenset({"attention", "mlp", "experts", "other"}),
    "attention": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "experts": frozenset({"experts"}),
}


def wanted_weights(root: nn.Module, every: Weights, refused: Mapping[str, str], config: LoRAConfig) -> Weights:
    """The adaptable weights that the settings ask for, before exclusions.

    Raises:
        TargetNotFoundError: If a role or a pattern matches none.
    """
    weights = {name: weight for name, weight in every.items() if weight.parameter}
    wanted = {name: weight for name, weight in weights.items() if is_targeted(name, weight, config)}
    roles = [weight.role for weight in weights.values()]
    if isinstance(config.targets, str):
        asked_for = _TARGET_ROLES[config.targets]
        # Head or embeddings alone are asked for with "all" on a module that has nothing else.
        if not wanted or (config.targets != "all" and asked_for.isdisjoint(weight.role for weight in wanted.values())):
            counts = {role: roles.count(role) for role in dict.fromkeys(roles)}
            reasons = "".join(f" {name}: {refused[name]}." for name in refused if every[name].role in asked_for)
            raise TargetNotFoundError(
                f"targets={config.targets!r} matches none of the {len(roles)} adaptable layers, which are "
                f"{', '.join(f'{count} {role}' for role, count in counts.items())}.{reasons} Name layers by patterns, "
                f"or teach the role with register_role(pattern, role)."
            )
    else:
        for pattern in config.targets:
            _check_matches("target", pattern, root, weights, refused)
    for role, asked in (("head", config.adapt_head), ("embedding", config.adapt_embeddings)):
        if asked and role not in roles:
            option = "adapt_head" if role == "head" else "adapt_embeddings"
            raise TargetNotFoundError(f"{option} is set, but {type(root).__name__} has no {role} layer to adapt.")
    return wanted


def select(
    root: nn.Module,
    weights: Weights,
    refused: Mapping[str, str],
    wanted: Weights,
    config: LoRAConfig,
    trainable: dict[str, nn.Module],
) -> tuple[Weights, dict[str, str]]:
    """What of the ``wanted`` weights is left to adapt, and why each other adaptable one is not.

    Raises:
        TargetNotFoundError: If an exclusion matches nothing, or nothing is left.
    """
    skipped = {}
    for name, weight in weights.items():
        if is_inside(weight.layer, trainable):
            skipped[name] = "trained in full"
        elif name in wanted and weight.is_hit_by_any(name, config.exclude):
            skipped[name] = "excluded"
        elif name not in wanted:
            skipped[name] = f"{weight.role}, not targeted"
    for pattern in config.exclude:
        # What cannot be adapted may be left out by name: that says it is known.
        if not any(matches(name, pattern) for name in refused):
            _check_matches("exclude", pattern, root, weights, refused)
    selected = {name: weight for name, weight in weights.items() if name not in skipped}
    if not selected:
        raise TargetNotFoundError(
            f"nothing is left to adapt: the {len(wanted)} targeted layers are all excluded or trained in full "
            f"({first_five(wanted)})."
        )
    return selected, skipped


def is_targeted(name: str, weight: AdaptableWeight, config: LoRAConfig) -> bool:
    """Whether the settings ask for a weight, before exclusions."""
    if (weight.role == "head" and config.adapt_head) or (weight.role == "embedding" and config.adapt_embeddings):
        return True
    if isinstance(config.targets, str):
        return weight.role in _TARGET_ROLES[config.targets]
    return weight.is_hit_by_any(name, config.targets)


def is_inside(name: str, tops: Collection[str]) -> bool:
    """Whether a module is one of ``tops`` or lies inside one."""
    while name and name not in tops:
        name = name.rpartition(".")[0]
    return name in tops


def trainable_modules(root: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to train in full, by name.

    Raises:
        TargetNotFoundError: If a pattern matches no module with parameters.
    """
    found: dict[str, nn.Module] = {}
    for pattern in config.trainable:
        hit = {name: module for name, module in root.named_modules() if matches(name, pattern)}
        if not any(True for module in hit.values() for _ in module.parameters()):
            names = dict.fromkeys(name.rpartition(".")[2] for name, _ in root.named_modules())
            raise TargetNotFoundError(
                f"trainable {pattern!r} matches no module with parameters{closest(pattern, names, count=5)}"
            )
        found |= hit
    return found


def _check_matches(option: str, pattern: str, root: nn.Module, weights: Weights, refused: Mapping[str, str]) -> None:
    if any(weight.is_hit(name, pattern) for name, weight in weights.items()):
        return
    hit = {name: module for name, module in root.named_modules() if matches(name, pattern)}
    if hit:
        name, module = next(
            ((name, module) for name, module in hit.items() if name in refused), next(iter(hit.items()))
        )
        reason = refused.get(name) or f"a {type(module).__name__} has no weight matrix to adapt"
        inner = (
            f" For the layers inside it write '{_below(name, pattern)}'."
            if any(True for _ in module.children())
            else ""
        )
        raise TargetNotFoundError(f"{option} {pattern!r} matches {name!r}, which cannot be adapted: {reason}.{inner}")
    leaves = dict.fromkeys([name.rpartition(".")[2] for name in weights] + list(weights))
    hint = closest(pattern.rpartition(".")[2] or pattern, leaves, count=5)
    globs = (
        " Patterns are names or globs such as '*.mlp.*', not regular expressions."
        if set(pattern) & set("\\^$(|+")
        else ""
    )
    raise TargetNotFoundError(f"{option} {pattern!r} matches none of the {len(weights)} adaptable layers{hint}{globs}")


def _below(name: str, pattern: str) -> str:
    """A glob for what lies inside the modules that ``pattern`` hits, of which ``name`` is one."""
    return (
        f"{pattern}.*"
        if name == pattern
        else f"*{pattern.removeprefix('*')}.*"
        if pattern.startswith("*")
        else f"*.{pattern}.*"
    )
