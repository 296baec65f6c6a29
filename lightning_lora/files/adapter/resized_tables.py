"""Embeddings and heads whose vocabulary was resized: no other file has their new rows, so the adapter stores them.

PEFT stores them under the same names, ``<layer>.base_layer.weight`` where the layer is adapted.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import full_tensor
from lightning_lora.lora.targets.roles import hugging_face_models


def resized_tables(root: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """Parameter to value for the embeddings and heads of ``root`` if they have another size than in its base.

    Args:
        root: A module. If it is no Hugging Face model, or its base is not on this machine, nothing is known of a size.
        trained: Names of parameters that are stored as trained in full.
    """
    model: Any = next((model for name, model in hugging_face_models(root) if not name), None)
    if model is None or not _is_resized(model.config):
        return {}
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    tables = {id(layer.weight) for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)}
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in tables}
    return {name: full_tensor(parameter) for name, parameter in named.items() if name not in trained}


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
