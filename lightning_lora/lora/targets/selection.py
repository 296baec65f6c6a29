"""Selection: which adaptable weights the settings ask for, by role or pattern, and which modules train in full."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_lora.errors import TargetNotFoundError, did_you_mean, first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.patterns import matches, names_around
from lightning_lora.lora.targets.adaptable import Candidate, Candidates

_TARGET_ROLES = {
    "all": frozenset({"attention", "mlp", "experts", "other"}),
    "attention": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "experts": frozenset({"experts"}),
}


def select(
    root: nn.Module, candidates: Candidates, trainable: Collection[str], config: LoRAConfig
) -> tuple[Candidates, dict[str, str]]:
    """The weights to adapt, and name to reason for every other adaptable weight.

    Raises:
        TargetNotFoundError: If a role or a pattern matches nothing, or if nothing is left to adapt.
    """
    adaptable = {name: weight for name, weight in candidates.items() if not weight.refusal}
    targeted = {name: weight for name, weight in adaptable.items() if is_targeted(weight, config)}
    _check_targets(root, candidates, targeted, config)
    skipped = {}
    for name, weight in adaptable.items():
        if is_inside(weight.layer, trainable):
            skipped[name] = "trained in full"
        elif name in targeted and weight.matches_any(config.exclude):
            skipped[name] = "excluded"
        elif name not in targeted:
            skipped[name] = f"{weight.role}, not targeted"
    for pattern in config.exclude:
        # Excluding a refused layer is allowed: it shows that the user knows.
        if not any(matches(name, pattern) for name, weight in candidates.items() if weight.refusal):
            _check_pattern("exclude", pattern, root, candidates)
    selected = {name: weight for name, weight in adaptable.items() if name not in skipped}
    if not selected:
        raise TargetNotFoundError(
            f"nothing is left to adapt: the {len(targeted)} targeted layers are all excluded or trained in full "
            f"({first_five(targeted)})."
        )
    return selected, skipped


def is_targeted(weight: Candidate, config: LoRAConfig) -> bool:
    """Whether the settings ask for a weight, before exclusions."""
    if (weight.role == "head" and config.adapt_head) or (weight.role == "embedding" and config.adapt_embeddings):
        return True
    if isinstance(config.targets, str):
        return weight.role in _TARGET_ROLES[config.targets]
    return weight.matches_any(config.targets)


def is_inside(name: str, tops: Collection[str]) -> bool:
    """Whether the module called ``name`` is one of ``tops`` or lies inside one of them."""
    return "" in tops or any(part in tops for part in names_around(name))


def trainable_modules(root: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Name to module for every module to train in full.

    Raises:
        TargetNotFoundError: If a pattern matches no module with parameters.
    """
    found: dict[str, nn.Module] = {}
    for pattern in config.trainable:
        matched = {name: module for name, module in root.named_modules() if matches(name, pattern)}
        if not any(True for module in matched.values() for _ in module.parameters()):
            if matched:
                name, module = next(iter(matched.items()))
                raise TargetNotFoundError(
                    f"trainable {pattern!r} matches {name!r}, a {type(module).__name__} without parameters: there is "
                    f"nothing to train in it."
                )
            full = [name for name, module in root.named_modules() if any(True for _ in module.parameters())]
            names = dict.fromkeys(name.rpartition(".")[2] for name in full)
            raise TargetNotFoundError(
                f"trainable {pattern!r} matches no module with parameters{did_you_mean(pattern, names, count=5)}"
            )
        found |= matched
    return found


def _check_targets(root: nn.Module, candidates: Candidates, targeted: Candidates, config: LoRAConfig) -> None:
    """Raise `TargetNotFoundError` if a role or a pattern that the settings ask for matches nothing."""
    roles = [weight.role for weight in candidates.values() if not weight.refusal]
    if isinstance(config.targets, str):
        asked_for = _TARGET_ROLES[config.targets]
        # "all" may find nothing but the head or the embeddings, on a module that has nothing else.
        if not targeted or (
            config.targets != "all" and asked_for.isdisjoint(weight.role for weight in targeted.values())
        ):
            raise TargetNotFoundError(_no_such_role(config.targets, roles, candidates))
    else:
        for pattern in config.targets:
            _check_pattern("target", pattern, root, candidates)
    for option, role in (("adapt_head", "head"), ("adapt_embeddings", "embedding")):
        if getattr(config, option) and role not in roles:
            raise TargetNotFoundError(f"{option} is set, but {type(root).__name__} has no {role} layer to adapt.")


def _no_such_role(targets: str, roles: list[str], candidates: Candidates) -> str:
    # Every candidate with one of the roles is refused, or it would have been targeted.
    counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    refusals = "".join(
        f" {name}: {weight.refusal}." for name, weight in candidates.items() if weight.role in _TARGET_ROLES[targets]
    )
    return (
        f"targets={targets!r} matches none of the {len(roles)} adaptable layers, which are {counts}.{refusals} Name "
        f"layers by patterns, or give them the role with register_role(pattern, role)."
    )


def _check_pattern(option: str, pattern: str, root: nn.Module, candidates: Candidates) -> None:
    """Raise `TargetNotFoundError` if no adaptable weight matches ``pattern``."""
    adaptable = {name: weight for name, weight in candidates.items() if not weight.refusal}
    if any(weight.matches(pattern) for weight in adaptable.values()):
        return
    matched = {name: module for name, module in root.named_modules() if matches(name, pattern)}
    if matched:
        name = next((name for name in matched if name in candidates), next(iter(matched)))
        raise TargetNotFoundError(
            f"{option} {pattern!r} matches {name!r}, which cannot be adapted: "
            f"{_why_not(name, matched[name], pattern, candidates)}"
        )
    leaves = dict.fromkeys([name.rpartition(".")[2] for name in adaptable] + list(adaptable))
    hint = did_you_mean(pattern.rpartition(".")[2] or pattern, leaves, count=5)
    if set(pattern) & set("\\^$(|+"):
        hint += " Patterns are names or globs such as '*.mlp.*', not regular expressions."
    raise TargetNotFoundError(f"{option} {pattern!r} matches none of the {len(adaptable)} adaptable layers{hint}")


def _why_not(name: str, module: nn.Module, pattern: str, candidates: Candidates) -> str:
    """Why the module that ``pattern`` matches cannot be adapted, and how to select the layers inside it."""
    refusal = candidates[name].refusal if name in candidates else ""
    reason = refusal or f"a {type(module).__name__} has no weight matrix to adapt"
    if not any(True for _ in module.children()):
        return f"{reason}."
    below = f"{pattern}.*" if name == pattern or pattern.startswith("*") else f"*.{pattern}.*"
    return f"{reason}. For the layers inside it write '{below}'."
