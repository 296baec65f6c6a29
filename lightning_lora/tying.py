"""Weights that several layers share: which they are, and how to take them apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.layers.walk import join
from lightning_lora.patterns import plain_name
from lightning_lora.roles import hugging_face_models


def weight_owners(root: nn.Module) -> dict[int, list[str]]:
    """Identity of every parameter to the dotted names it has, one for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(plain_name(join(prefix, name)))
    return owners


def untie(root: nn.Module, module: nn.Module, parameter: str) -> None:
    """Give ``module`` its own copy of a shared weight, and tell the Hugging Face model around it that they are two."""
    weight = getattr(module, parameter)
    setattr(module, parameter, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    for _, model in hugging_face_models(root):
        names = [name for name, child in model.named_modules() if child is module]
        for part in model.modules() if names else ():
            config: Any = getattr(part, "config", None)
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
            # Kept, it would let `save_pretrained` and `tie_weights` take the two for one again.
            if isinstance(getattr(part, "all_tied_weights_keys", None), dict):
                part.__dict__["all_tied_weights_keys"] = {}
