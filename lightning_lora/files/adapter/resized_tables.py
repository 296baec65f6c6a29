"""Embeddings and heads whose vocabulary was resized: no other file has their new rows, so the adapter stores them.

PEFT stores them under the same names, ``<layer>.base_layer.weight`` where the layer is adapted.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lightning_lora.lora.layers.adapted import join, lora_layers
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import full_tensor
from lightning_lora.lora.targets.roles import hugging_face_models, module_roles


def resized_tables(root: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """Parameter to value for the embeddings and heads of ``root`` if they have another size than in its base.

    Args:
        root: A module. If it is no Hugging Face model, or its base is not on this machine, nothing is known of a size.
        trained: Names of parameters that are stored as trained in full.
    """
    model: Any = next((model for name, model in hugging_face_models(root) if not name), None)
    if model is None or not _is_resized(model.config):
        return {}
    size = model.config.get_text_config().vocab_size
    named = {plain_name(name): role for name, role in module_roles(model).items()}
    layers = [name for name, role in named.items() if role in ("embedding", "head")]
    weights = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    tables = {name: weights[name] for layer in layers if (name := join(layer, "weight")) in weights}
    return {
        name: full_tensor(table) for name, table in tables.items() if name not in trained and table.shape[:1] == (size,)
    }


def every_name(root: nn.Module, parameters: Collection[str]) -> set[str]:
    """All names of these parameters of ``root``: several where layers share a weight or are the same layer."""
    named = [(plain_name(name), id(parameter)) for name, parameter in root.named_parameters(remove_duplicate=False)]
    wanted = {parameter for name, parameter in named if name in parameters}
    return {name for name, parameter in named if parameter in wanted}


def stored_name(parameter: str, root: nn.Module) -> str:
    """PEFT's name of a stored weight of the base."""
    layer, _, leaf = parameter.rpartition(".")
    return f"{layer}.base_layer.{leaf}" if layer in lora_layers(root) else parameter


def _is_resized(config: Any) -> bool:
    from transformers import AutoConfig  # there is a model, so it is imported already

    try:
        base: Any = AutoConfig.from_pretrained(config._name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return base.get_text_config().vocab_size != config.get_text_config().vocab_size
