"""Which layers a config means, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_lora.active_experts import active_experts
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetNotFoundError, closest, first_five
from lightning_lora.layers.attention import read_projections
from lightning_lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.registry import adapter_kind, refusal
from lightning_lora.layers.walk import join
from lightning_lora.patterns import matches, matches_any, plain_name
from lightning_lora.roles import module_roles
from lightning_lora.tying import weight_owners
from lightning_lora.uncalled import uncalled_children

Value = TypeVar("Value")

_TARGET_ROLES = {
    "all": frozenset({"attention", "mlp", "experts", "other"}),
    "attention": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "experts": frozenset({"experts"}),
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt: the module, the kind of adapted layer it becomes, and how each of its weights is adapted."""

    name: str
    module: nn.Module
    kind: type[LoRALayer]
    specs: dict[str, AdapterSpec]

    @property
    def spec(self) -> AdapterSpec:
        """How the first of its weights is adapted."""
        return next(iter(self.specs.values()))


@dataclass(frozen=True)
class Tied:
    """What becomes of shared weights.

    Args:
        untied: Module and parameter name of each that gets a copy of its own.
        followers: Layer to the layer whose weight it has and whose update it will use.
    """

    untied: tuple[tuple[nn.Module, str], ...] = ()
    followers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """What a config selects in a module: layers to adapt, modules to train in full, and what was left out and why."""

    layers: tuple[Target, ...]
    trainable: dict[str, nn.Module]
    skipped: dict[str, str]
    tied: Tied


@dataclass(frozen=True)
class _Weight:
    """One weight that is adaptable, or would be but for a reason (then ``parameter`` is empty)."""

    layer: str
    parameter: str
    role: str

    def is_hit(self, name: str, pattern: str) -> bool:
        """Whether a pattern means this weight: by its own name or by that of its layer."""
        return matches(name, pattern) or matches(self.layer, pattern)

    def is_hit_by_any(self, name: str, patterns: Iterable[str]) -> bool:
        """Whether one of the patterns does."""
        return any(self.is_hit(name, pattern) for pattern in patterns)

    def first_hit(self, name: str, table: Mapping[str, Value], default: Value) -> Value:
        """The value of the first pattern in ``table`` that does, else ``default``."""
        return next((value for pattern, value in table.items() if self.is_hit(name, pattern)), default)


Weights = dict[str, _Weight]


def resolve_targets(root: nn.Module, config: LoRAConfig) -> Targets:
    """Find the layers ``config`` means in ``root`` without changing anything.

    Raises:
        TargetNotFoundError: If a pattern matches nothing, or nothing is left to adapt.
        ConfigError: If ``root`` is adapted already, a target shares its weight with another module, a layer named in
            ``rank_pattern`` is too small for its rank, or dropout is asked for where it cannot act.
    """
    if any(isinstance(module, LoRALayer) for module in root.modules()):
        raise ConfigError("the module is adapted already; call remove_lora(module) before adapting it again.")
    _check_built(root)
    refused = refused_layers(root)
    every = _weights(root, refused)
    weights = {name: weight for name, weight in every.items() if weight.parameter}
    if not weights:
        found = ", ".join(sorted({type(module).__name__ for module in root.modules()})[:8])
        reasons = "".join(f" {name}: {reason}." for name, reason in list(refused.items())[:3])
        raise TargetNotFoundError(f"{type(root).__name__} has no layer that can be adapted; it holds {found}.{reasons}")
    trainable = _trainable(root, config)
    wanted = _wanted(root, every, refused, config)
    selected, skipped = _select(root, weights, refused, wanted, config, trainable)
    tied = _resolve_tied(root, selected, config)
    layers = _targets(root, selected, config)
    _check_ranks(root, layers, selected, config)
    _check_dropout(root, layers, config)
    passed_over = [
        f"{name} ({reason})"
        for name, reason in refused.items()
        if _is_targeted(name, every[name], config)
        and not matches_any(name, config.exclude)
        and not _is_inside(name, trainable)
    ]
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} targeted layers cannot be adapted and stay frozen: {first_five(passed_over)}. Name "
            f"them in exclude if that is meant.",
            stacklevel=3,
        )
    adapted = {*selected, *tied.followers}
    left_alone = {name: reason for name, reason in (skipped | refused).items() if name not in adapted}
    return Targets(layers, trainable, left_alone, tied)


def _check_built(root: nn.Module) -> None:
    # Freezing, counting and hashing all need shapes, so one unbuilt layer anywhere is one too many.
    lazy = [name for name, parameter in root.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} parameters are lazy and have no shape yet ({first_five(lazy)}): run one batch through the "
            f"model first."
        )


def refused_layers(root: nn.Module) -> dict[str, str]:
    """Layers with weights that have no adapter here, and why: they must be named, not passed over in silence."""
    refused = {name: reason for name, module in root.named_modules() if (reason := refusal(module))}
    for name, module in root.named_modules():
        for child in sorted(uncalled_children(module)):
            refused[join(name, child)] = f"{type(module).__name__} reads its weight without calling it"
    return refused


def _weights(root: nn.Module, refused: Mapping[str, str]) -> Weights:
    found: Weights = {}
    for name, role in module_roles(root).items():
        module = root.get_submodule(name)
        kind = adapter_kind(module)
        if kind is None or name in refused:
            found[name] = _Weight(name, "", role)
            continue
        for parameter in kind.weights(module):
            found[join(name, parameter) if kind.prefix(module, parameter) else name] = _Weight(name, parameter, role)
    return found


def _select(
    root: nn.Module,
    weights: Weights,
    refused: Mapping[str, str],
    wanted: Weights,
    config: LoRAConfig,
    trainable: dict[str, nn.Module],
) -> tuple[Weights, dict[str, str]]:
    skipped = {}
    for name, weight in weights.items():
        if _is_inside(weight.layer, trainable):
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


def _is_inside(name: str, tops: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") or top == "" for top in tops)


def _is_targeted(name: str, weight: _Weight, config: LoRAConfig) -> bool:
    """Whether the settings ask for a weight, before exclusions."""
    if (weight.role == "head" and config.adapt_head) or (weight.role == "embedding" and config.adapt_embeddings):
        return True
    if isinstance(config.targets, str):
        return weight.role in _TARGET_ROLES[config.targets]
    return weight.is_hit_by_any(name, config.targets)


def _wanted(root: nn.Module, every: Weights, refused: Mapping[str, str], config: LoRAConfig) -> Weights:
    weights = {name: weight for name, weight in every.items() if weight.parameter}
    wanted = {name: weight for name, weight in weights.items() if _is_targeted(name, weight, config)}
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


def _resolve_tied(root: nn.Module, selected: Weights, config: LoRAConfig) -> Tied:
    """What to do with selected weights that other layers have too; the order of modules decides which one owns it."""
    owners = weight_owners(root)
    modules = {plain_name(name): module for name, module in root.named_modules()}
    untied, followers = [], {}
    for name, weight in list(selected.items()):
        parameter = plain_name(join(weight.layer, weight.parameter))
        shared = owners[id(getattr(root.get_submodule(weight.layer), weight.parameter))]
        if len(shared) == 1 or name not in selected:
            continue
        if config.tied_weights == "untie":
            untied.append((root.get_submodule(weight.layer), weight.parameter))
            shared.remove(parameter)
        elif config.tied_weights == "both" and all(_can_follow(modules, owner, config) for owner in shared):
            layers = [owner.rpartition(".")[0] for owner in shared]
            # An embedding's update can serve a linear layer, not the other way round.
            source = next((layer for layer in layers if isinstance(modules[layer], nn.Embedding)), layers[0])
            for layer in layers:
                selected.pop(layer, None)
                if layer != source:
                    followers[layer] = source
            selected[source] = _Weight(source, weight.parameter, weight.role)
        else:
            other = next(owner for owner in shared if owner != parameter)
            raise ConfigError(_tied_message(weight.layer, other.rpartition(".")[0], config))
    return Tied(tuple(untied), followers)


def _can_follow(modules: Mapping[str, nn.Module], parameter: str, config: LoRAConfig) -> bool:
    layer, _, leaf = parameter.rpartition(".")
    kind = adapter_kind(modules[layer])
    shares = leaf == "weight" and kind is not None and issubclass(kind, (LoRALinear, LoRAEmbedding))
    return shares and not matches_any(layer, config.exclude)


def _tied_message(name: str, other: str, config: LoRAConfig) -> str:
    asked = "" if config.tied_weights == "refuse" else f" tied_weights={config.tied_weights!r} cannot be done here."
    return (
        f"{name!r} shares its weight with {other!r}: an update of one would not be an update of the other, and merging "
        f"would change both.{asked} Leave it out (exclude=[{name!r}], adapt_head and adapt_embeddings off), or choose: "
        f"tied_weights='untie' gives {name!r} a weight of its own, tied_weights='both' adapts the weight they share."
    )


def _targets(root: nn.Module, selected: Weights, config: LoRAConfig) -> tuple[Target, ...]:
    specs: dict[str, dict[str, AdapterSpec]] = {}
    for name, weight in selected.items():
        module = root.get_submodule(weight.layer)
        kind = _kind(module)
        num_in, num_out, _ = kind.weights(module)[weight.parameter]
        rank = weight.first_hit(name, config.rank_pattern, 0) or min(_rank(root, weight, config), num_in, num_out)
        alpha = weight.first_hit(name, config.alpha_pattern, config.alpha)
        specs.setdefault(weight.layer, {})[weight.parameter] = AdapterSpec(rank, alpha, weight.role, config)
    modules = {layer: root.get_submodule(layer) for layer in specs}
    return tuple(Target(layer, modules[layer], _kind(modules[layer]), specs[layer]) for layer in specs)


def without_dropout(root: nn.Module, layers: Iterable[Target]) -> list[str]:
    """Names of the layers whose update has no input of its own for dropout to act on."""
    read = read_projections(root)
    return [target.name for target in layers if target.name in read or not target.kind.takes_dropout(target.module)]


def _check_dropout(root: nn.Module, layers: Iterable[Target], config: LoRAConfig) -> None:
    names = without_dropout(root, layers) if config.dropout else []
    if names:
        raise ConfigError(
            f"dropout={config.dropout:g} cannot act on {len(names)} of the targeted layers ({first_five(names)}): "
            f"attention, recurrent layers and convolutions with a forward of their own compute with the sum of weight "
            f"and update. Set dropout to 0, or exclude them."
        )


def _kind(module: nn.Module) -> type[LoRALayer]:
    kind = adapter_kind(module)
    assert kind is not None
    return kind


def _rank(root: nn.Module, weight: _Weight, config: LoRAConfig) -> int:
    """The rank a layer gets without a pattern: experts share it among those that are active for a token."""
    if weight.role != "experts" or config.share_expert_factors:
        return config.rank
    return max(1, config.rank // active_experts(root, weight.layer))


def _check_ranks(root: nn.Module, layers: tuple[Target, ...], selected: Weights, config: LoRAConfig) -> None:
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(weight.is_hit(name, pattern) for name, weight in selected.items()):
                hint = closest(pattern, dict.fromkeys(name.rpartition(".")[2] for name in selected), count=5)
                raise TargetNotFoundError(
                    f"{option} {pattern!r} matches none of the {len(selected)} adapted layers{hint}"
                )
    specs = {layer.name: layer for layer in layers}
    capped = []
    for name, weight in selected.items():
        layer = specs[weight.layer]
        num_in, num_out, _ = layer.kind.weights(layer.module)[weight.parameter]
        rank = layer.specs[weight.parameter].rank
        if rank > min(num_in, num_out):
            raise ConfigError(
                f"rank must be in [1, {min(num_in, num_out)}] for {name!r}, a ({num_out}, {num_in}) weight, "
                f"got rank={rank} from rank_pattern."
            )
        if rank < _rank(root, weight, config) and weight.first_hit(name, config.rank_pattern, 0) == 0:
            capped.append(f"{name} ({rank})")
    if capped:
        warnings.warn(
            f"rank {config.rank} is more than {len(capped)} of {len(selected)} adapted layers can hold; they get their "
            f"full rank instead: {first_five(capped)}. Lower the rank, or exclude them.",
            stacklevel=4,
        )
