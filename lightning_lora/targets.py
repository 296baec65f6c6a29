"""Which layers a config means, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetNotFoundError, closest, first_five
from lightning_lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.layers.registry import adapter_kind, refusal
from lightning_lora.patterns import first_match, matches, matches_any
from lightning_lora.roles import module_roles

_TARGET_ROLES = {
    "all": frozenset({"attention", "mlp", "experts", "other"}),
    "attention": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "experts": frozenset({"experts"}),
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt: the module, the kind of adapted layer it becomes, and how."""

    name: str
    module: nn.Module
    kind: type[LoRALayer]
    spec: AdapterSpec


@dataclass(frozen=True)
class Targets:
    """What a config selects in a module: layers to adapt, modules to train in full, and what was left out and why."""

    layers: tuple[Target, ...]
    trainable: dict[str, nn.Module]
    skipped: dict[str, str]


def resolve_targets(root: nn.Module, config: LoRAConfig) -> Targets:
    """Find the layers ``config`` means in ``root`` without changing anything.

    Raises:
        TargetNotFoundError: If a pattern matches nothing, or nothing is left to adapt.
        ConfigError: If ``root`` is adapted already, a target shares its weight with another module, or a layer named
            in ``rank_pattern`` is too small for its rank.
    """
    if any(isinstance(module, LoRALayer) for module in root.modules()):
        raise ConfigError("the module is adapted already; call remove_lora(module) before adapting it again.")
    _check_built(root)
    refused = _refused(root)
    every = module_roles(root)
    roles = {name: role for name, role in every.items() if name not in refused}
    if not roles:
        found = ", ".join(sorted({type(module).__name__ for module in root.modules()})[:8])
        reasons = "".join(f" {name}: {reason}." for name, reason in list(refused.items())[:3])
        raise TargetNotFoundError(f"{type(root).__name__} has no layer that can be adapted; it holds {found}.{reasons}")
    trainable = _trainable(root, config)
    wanted = _wanted(root, every, refused, config)
    selected, skipped = _select(root, roles, refused, wanted, config, trainable)
    _check_tied(root, selected)
    kept = tuple(_target(root, name, roles[name], config) for name in selected)
    _check_ranks(kept, config)
    passed_over = [
        f"{name} ({reason})"
        for name, reason in refused.items()
        if _is_targeted(name, every[name], config) and not _is_left_out(name, config, trainable)
    ]
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} targeted layers cannot be adapted and stay frozen: {first_five(passed_over)}. Name "
            f"them in exclude if that is meant.",
            stacklevel=3,
        )
    return Targets(kept, trainable, skipped | refused)


def _check_built(root: nn.Module) -> None:
    # Freezing, counting and hashing all need shapes, so one unbuilt layer anywhere is one too many.
    lazy = [name for name, parameter in root.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} parameters are lazy and have no shape yet ({first_five(lazy)}): run one batch through the "
            f"model first."
        )


def _refused(root: nn.Module) -> dict[str, str]:
    """Layers with weights that have no adapter here, and why: they must be named, not passed over in silence."""
    refused = {name: reason for name, module in root.named_modules() if (reason := refusal(module))}
    for name, module in root.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval without gradients torch computes the whole layer from the weights and calls no child.
            for child in ("linear1", "linear2"):
                refused[f"{name}.{child}" if name else child] = "TransformerEncoderLayer bypasses it in eval"
    return refused


def _select(
    root: nn.Module,
    roles: dict[str, str],
    refused: dict[str, str],
    wanted: list[str],
    config: LoRAConfig,
    trainable: dict[str, nn.Module],
) -> tuple[list[str], dict[str, str]]:
    skipped = {}
    for name, role in roles.items():
        if _is_inside(name, trainable):
            skipped[name] = "trained in full"
        elif name in wanted and matches_any(name, config.exclude):
            skipped[name] = "excluded"
        elif name not in wanted:
            skipped[name] = f"{role}, not targeted"
    for pattern in config.exclude:
        # What cannot be adapted may be left out by name: that says it is known.
        if not any(matches(name, pattern) for name in refused):
            _check_matches("exclude", pattern, root, roles, refused)
    selected = [name for name in roles if name not in skipped]
    if not selected:
        raise TargetNotFoundError(
            f"nothing is left to adapt: the {len(wanted)} targeted layers are all excluded or trained in full "
            f"({first_five(wanted)})."
        )
    return selected, skipped


def _is_inside(name: str, tops: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") or top == "" for top in tops)


def _is_left_out(name: str, config: LoRAConfig, trainable: dict[str, nn.Module]) -> bool:
    return matches_any(name, config.exclude) or _is_inside(name, trainable)


def _is_targeted(name: str, role: str, config: LoRAConfig) -> bool:
    """Whether the settings ask for a layer, before exclusions."""
    if (role == "head" and config.adapt_head) or (role == "embedding" and config.adapt_embeddings):
        return True
    if isinstance(config.targets, str):
        return role in _TARGET_ROLES[config.targets]
    return matches_any(name, config.targets)


def _wanted(root: nn.Module, every: dict[str, str], refused: dict[str, str], config: LoRAConfig) -> list[str]:
    roles = {name: role for name, role in every.items() if name not in refused}
    wanted = [name for name, role in roles.items() if _is_targeted(name, role, config)]
    if isinstance(config.targets, str):
        asked_for = _TARGET_ROLES[config.targets]
        # Head or embeddings alone are asked for with "all" on a module that has nothing else.
        if not wanted or (config.targets != "all" and asked_for.isdisjoint(roles[name] for name in wanted)):
            counts = {role: list(roles.values()).count(role) for role in dict.fromkeys(roles.values())}
            reasons = "".join(f" {name}: {refused[name]}." for name in refused if every[name] in asked_for)
            raise TargetNotFoundError(
                f"targets={config.targets!r} matches none of the {len(roles)} adaptable layers, which are "
                f"{', '.join(f'{count} {role}' for role, count in counts.items())}.{reasons} Name layers by patterns, "
                f"or teach the role with register_role(pattern, role)."
            )
    else:
        for pattern in config.targets:
            _check_matches("target", pattern, root, roles, refused)
    for role, asked in (("head", config.adapt_head), ("embedding", config.adapt_embeddings)):
        if asked and role not in roles.values():
            option = "adapt_head" if role == "head" else "adapt_embeddings"
            raise TargetNotFoundError(f"{option} is set, but {type(root).__name__} has no {role} layer to adapt.")
    return wanted


def _check_matches(option: str, pattern: str, root: nn.Module, roles: Iterable[str], refused: dict[str, str]) -> None:
    roles = list(roles)
    if any(matches(name, pattern) for name in roles):
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
    leaves = dict.fromkeys([name.rpartition(".")[2] for name in roles] + roles)
    hint = closest(pattern.rpartition(".")[2] or pattern, leaves, count=5)
    globs = (
        " Patterns are names or globs such as '*.mlp.*', not regular expressions."
        if set(pattern) & set("\\^$(|+")
        else ""
    )
    raise TargetNotFoundError(f"{option} {pattern!r} matches none of the {len(roles)} adaptable layers{hint}{globs}")


def _below(name: str, pattern: str) -> str:
    """A glob for what lies inside the modules that ``pattern`` hits, of which ``name`` is one."""
    return (
        f"{pattern}.*"
        if name == pattern
        else f"*{pattern.removeprefix('*')}.*"
        if pattern.startswith("*")
        else f"*.{pattern}.*"
    )


def _trainable(root: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
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


def _check_tied(root: nn.Module, selected: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name in selected:
        shared = owners[id(root.get_submodule(name)._parameters["weight"])]
        if len(shared) > 1:
            other = next(owner for owner in shared if owner != name)
            raise ConfigError(
                f"{name!r} shares its weight with {other!r}: an update of one would not be an update of the other, "
                f"and merging would change both. Either leave it out (exclude=[{name!r}], adapt_head and "
                f"adapt_embeddings off), or untie it first: give {name!r} a weight of its own "
                f"(nn.Parameter(weight.detach().clone())) and set tie_word_embeddings to false in the model's config."
            )


def _target(root: nn.Module, name: str, role: str, config: LoRAConfig) -> Target:
    module = root.get_submodule(name)
    kind = adapter_kind(module)
    assert kind is not None
    rank = first_match(name, config.rank_pattern, 0) or min(config.rank, *kind.dimensions(module))
    alpha = first_match(name, config.alpha_pattern, config.alpha)
    return Target(name, module, kind, AdapterSpec(rank, alpha, role, config))


def _check_ranks(layers: tuple[Target, ...], config: LoRAConfig) -> None:
    names = [layer.name for layer in layers]
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                hint = closest(pattern, dict.fromkeys(name.rpartition(".")[2] for name in names), count=5)
                raise TargetNotFoundError(f"{option} {pattern!r} matches none of the {len(names)} adapted layers{hint}")
    for layer in layers:
        num_in, num_out = layer.kind.dimensions(layer.module)
        if layer.spec.rank > min(num_in, num_out):
            raise ConfigError(
                f"rank must be in [1, {min(num_in, num_out)}] for {layer.name!r}, a ({num_out}, {num_in}) weight, "
                f"got rank={layer.spec.rank} from rank_pattern."
            )
    capped = [f"{layer.name} ({layer.spec.rank})" for layer in layers if _is_capped(layer, config)]
    if capped:
        warnings.warn(
            f"rank {config.rank} is more than {len(capped)} of {len(layers)} adapted layers can hold; they get their "
            f"full rank instead: {first_five(capped)}. Lower the rank, or exclude them.",
            stacklevel=4,
        )


def _is_capped(layer: Target, config: LoRAConfig) -> bool:
    return layer.spec.rank < config.rank and first_match(layer.name, config.rank_pattern, 0) == 0
