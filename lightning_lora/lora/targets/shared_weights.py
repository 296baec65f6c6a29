"""Weights that several layers share (tied weights): which they are, and how to untie them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.targets.adaptable import Candidate, Candidates
from lightning_lora.lora.targets.roles import hugging_face_models


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


def untie(root: nn.Module, module: nn.Module, parameter: str) -> None:
    """Give ``module`` its own copy of a shared weight, and tell the Hugging Face model around it."""
    weight = getattr(module, parameter)
    setattr(module, parameter, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    for _, model in hugging_face_models(root):
        is_around = any(child is module for child in model.modules())
        for part in model.modules() if is_around else ():
            config: Any = getattr(part, "config", None)
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
            # With these keys `save_pretrained` and `tie_weights` would tie the two again.
            if isinstance(getattr(part, "all_tied_weights_keys", None), dict):
                part.__dict__["all_tied_weights_keys"] = {}


def resolve_tied_weights(root: nn.Module, selected: Candidates, config: LoRAConfig) -> TiedWeights:
    """Decide what happens to selected weights that other layers share.

    With ``tied_weights="both"`` the entries of ``selected`` that share a weight are replaced by one entry, for the
    layer that will hold the update: the first embedding among them, or else the first layer.

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
        elif config.tied_weights == "both" and all(_can_follow(modules, owner, config) for owner in shared):
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
            raise ConfigError(_refusal_of_tied(weight.layer, other.rpartition(".")[0], config))
    return TiedWeights(tuple(untied), followers)


def _can_follow(modules: Mapping[str, nn.Module], parameter: str, config: LoRAConfig) -> bool:
    """Whether the layer of a shared parameter can use another layer's update, and is not excluded."""
    layer, _, leaf = parameter.rpartition(".")
    kind = adapter_kind(modules[layer])
    can_share = leaf == "weight" and kind is not None and issubclass(kind, (LoRALinear, LoRAEmbedding))
    return can_share and not matches_any(layer, config.exclude)


def _refusal_of_tied(name: str, other: str, config: LoRAConfig) -> str:
    asked = "" if config.tied_weights == "refuse" else f" tied_weights={config.tied_weights!r} cannot be done here."
    return (
        f"{name!r} shares its weight with {other!r}: an update of one would not be an update of the other, and merging "
        f"would change both.{asked} Leave it out (exclude=[{name!r}], adapt_head and adapt_embeddings off), or choose: "
        f"tied_weights='untie' gives {name!r} a weight of its own, tied_weights='both' adapts the weight they share."
    )
