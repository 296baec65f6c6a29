"""Weights that several layers share (tied weights): which they are, and how to untie them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lora.errors import LayerError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.targets.adaptable import Candidate, Candidates
from lightning_lora.lora.targets.roles import hugging_face_models
from lightning_lora.lora.targets.selection import is_inside


@dataclass(frozen=True)
class TiedWeights:
    """What happens to weights that several layers share.

    Args:
        untied: Module and parameter name of each weight that becomes a copy of its own.
        followers: Name of each layer that uses the update of another layer, to the name of that layer.
    """

    untied: tuple[tuple[nn.Module, str], ...] = ()
    followers: Mapping[str, str] = field(default_factory=dict)


def weight_owners(root: nn.Module) -> dict[int, list[str]]:
    """The ``id`` of every parameter to its dotted names, one for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(plain_name(join(prefix, name)))
    return owners


def every_name(root: nn.Module, parameters: Collection[str]) -> set[str]:
    """All names of these parameters of ``root``: several where layers share a weight or are the same layer."""
    named = [(plain_name(name), id(parameter)) for name, parameter in root.named_parameters(remove_duplicate=False)]
    wanted = {parameter for name, parameter in named if name in parameters}
    return {name for name, parameter in named if parameter in wanted}


def untie(root: nn.Module, weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Give each layer in ``weights`` its own copy of a shared weight, and tell the Hugging Face models around it."""
    layers = set()
    for module, parameter in weights:
        _copy_weight(module, parameter)
        layers.add(id(module))
    for _, model in hugging_face_models(root) if layers else ():
        if any(id(child) in layers for child in model.modules()):
            _declare_untied(model)


def _copy_weight(module: nn.Module, parameter: str) -> None:
    weight = getattr(module, parameter)
    setattr(module, parameter, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))


def _declare_untied(model: nn.Module) -> None:
    """Let a Hugging Face model hold its shared weights apart, here and in what `save_pretrained` writes.

    The model gets a config of its own, as the caller may build other models from the one it was built from.
    """
    copies: dict[int, Any] = {}
    for part in model.modules():
        keys = part.__dict__.get("all_tied_weights_keys")
        if isinstance(keys, dict):
            # The config unties all or none: layers that went on sharing would be neither saved nor tied on loading.
            for target, source in keys.items():
                _untie_pair(part, target, source)
            # With these keys `save_pretrained` and `tie_weights` would tie them again.
            part.__dict__["all_tied_weights_keys"] = {}
        config = part.__dict__.get("config")
        if hasattr(config, "tie_word_embeddings"):
            own: Any = copy.deepcopy(config, copies)
            own.tie_word_embeddings = False
            part.__dict__["config"] = own


def _untie_pair(model: nn.Module, target: str, source: str) -> None:
    """Give the parameter called ``target`` its own copy if it is the one called ``source``."""
    named = {plain_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameter = model.get_parameter(named[target]) if target in named else None
    if parameter is not None and source in named and parameter is model.get_parameter(named[source]):
        layer, _, leaf = named[target].rpartition(".")
        _copy_weight(model.get_submodule(layer), leaf)


def resolve_tied_weights(
    root: nn.Module, selected: Candidates, trainable: Collection[str], config: LoRAConfig
) -> TiedWeights:
    """Decide what happens to weights that are selected, or trained in full, and that other layers share.

    With ``tied_weights="both"`` the entries of ``selected`` that share a weight are replaced by one entry, for the
    layer that will hold the update: the first embedding among them, or else the first layer. A shared weight that is
    trained in full is trained for all layers that share it, unless ``config`` unties them.

    Raises:
        ConfigError: If ``config`` refuses shared weights, or cannot treat these as it asks.
    """
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
        elif config.tied_weights == "both" and all(_can_follow(modules, owner, trainable, config) for owner in shared):
            layers = [owner.rpartition(".")[0] for owner in shared]
            # A linear layer can use the update of an embedding, not the other way round.
            source = next((layer for layer in layers if isinstance(modules[layer], nn.Embedding)), layers[0])
            for layer in layers:
                selected.pop(layer, None)
                if layer != source:
                    followers[layer] = source
            selected[source] = Candidate(source, source, weight.parameter, weight.role)
        else:
            other = next(owner for owner in shared if owner != parameter)
            raise LayerError(_refusal_of_tied(weight.layer, other.rpartition(".")[0], config))
    if config.tied_weights == "untie":
        for shared in owners.values():
            trained = [name for name in shared if is_inside(name.rpartition(".")[0], trainable)]
            untied += take_out(shared, trained, modules)
    return TiedWeights(tuple(untied), followers)


def take_out(
    shared: list[str], names: Collection[str], modules: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, str]]:
    """Take some of its names off a shared weight, but never the last one.

    Args:
        shared: The parameters that are this weight; changed in place.
        names: Those of them that get a weight of their own.

    Returns:
        Layer and parameter of each that was taken out, as `TiedWeights.untied` has them.
    """
    taken = []
    for name in names:
        if len(shared) > 1:
            shared.remove(name)
            layer, _, parameter = name.rpartition(".")
            taken.append((modules[layer], parameter))
    return taken


def _can_follow(
    modules: Mapping[str, nn.Module], parameter: str, trainable: Collection[str], config: LoRAConfig
) -> bool:
    """Whether the layer of a shared parameter can use another layer's update, and is neither excluded nor trained."""
    layer, _, leaf = parameter.rpartition(".")
    kind = adapter_kind(modules[layer])
    can_share = leaf == "weight" and kind is not None and issubclass(kind, (LoRALinear, LoRAEmbedding))
    return can_share and not matches_any(layer, config.exclude) and not is_inside(layer, trainable)


def _refusal_of_tied(name: str, other: str, config: LoRAConfig) -> str:
    asked = "" if config.tied_weights == "refuse" else f" tied_weights={config.tied_weights!r} cannot be done here."
    return (
        f"{name!r} shares its weight with {other!r}: an update of one would not be an update of the other, and merging "
        f"would change both.{asked} Leave it out (exclude=[{name!r}], adapt_head and adapt_embeddings off), or choose: "
        f"tied_weights='untie' gives {name!r} a weight of its own, tied_weights='both' adapts the weight they share."
    )
