"""Embeddings and heads whose vocabulary was resized: no other file has their new rows. They are stored and restored.

PEFT stores them under the same names, ``<layer>.base_layer.weight`` where the layer is adapted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError, BaseMismatchError
from lightning_lora.files.adapter.fit import model_tensors
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.lora.layers.adapted import join, lora_layers
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import full_tensor
from lightning_lora.lora.targets.roles import hugging_face_models, module_roles
from lightning_lora.lora.vocabulary import vocabulary_size


def resized_tables(root: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """Parameter to value for the embeddings and heads of ``root`` if they have another size than in its base.

    Args:
        root: A module. If it is no Hugging Face model, or its base is not on this machine, nothing is known of a size.
        trained: Names of parameters that are stored as trained in full.
    """
    model: Any = next((model for name, model in hugging_face_models(root) if not name), None)
    if model is None or not _is_resized(model.config):
        return {}
    size = vocabulary_size(model.config)
    named = {plain_name(name): role for name, role in module_roles(model).items()}
    layers = [name for name, role in named.items() if role in ("embedding", "head")]
    weights = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    tables = {name: weights[name] for layer in layers if (name := join(layer, "weight")) in weights}
    return {
        name: full_tensor(table) for name, table in tables.items() if name not in trained and table.shape[:1] == (size,)
    }


def stored_name(parameter: str, root: nn.Module) -> str:
    """PEFT's name of a stored weight of the base."""
    layer, _, leaf = parameter.rpartition(".")
    return f"{layer}.base_layer.{leaf}" if layer in lora_layers(root) else parameter


def check_copies(root: nn.Module, folder: AdapterFolder) -> dict[str, Tensor]:
    """Find the weights of the base that the folder stores too, as PEFT does with a resized vocabulary.

    Rows that were added when the vocabulary was resized are random until the stored ones replace them.

    Returns:
        The parameters of ``root`` to restore, by name.

    Raises:
        AdapterFileError: If ``root`` has no such parameter.
        BaseMismatchError: If a parameter has another shape, or shares no row with the stored one.
    """
    own = {name: tensor for name, tensor in model_tensors(root) if name in folder.base_copies}
    for name, stored in folder.base_copies.items():
        if name not in own:
            raise AdapterFolderError(
                f"{folder.path} does not fit this module: unknown {name}, a weight that it stores."
            )
        if own[name].shape != stored.shape:
            raise BaseMismatchError(
                f"{folder.path} holds a copy of {name}, shape {tuple(stored.shape)}, which is {tuple(own[name].shape)} "
                f"here: its vocabulary was resized. Call model.resize_token_embeddings({len(stored)}) first."
            )
    return own


def check_rows(own: Mapping[str, Tensor], folder: AdapterFolder) -> None:
    """Refuse a base that has none of the rows of a stored base weight; a resized vocabulary has the old ones."""
    for name, tensor in own.items():
        rounded = [rows.detach().cpu().to(torch.bfloat16) for rows in (tensor, folder.base_copies[name])]
        same = (rounded[0] == rounded[1]).flatten(1).all(1) & rounded[0].flatten(1).any(1)
        if not bool(same.any()):
            raise BaseMismatchError(
                f"{folder.path} holds a copy of {name} that has no row in common with this base. Load the right base, "
                f"or pass allow_other_base=True."
            )


def _is_resized(config: Any) -> bool:
    from transformers import AutoConfig  # there is a model, so it is imported already

    size, name = vocabulary_size(config), config._name_or_path
    if size is None or not name:
        return False
    try:
        base = vocabulary_size(AutoConfig.from_pretrained(name, local_files_only=True))
    except (OSError, ValueError):  # the base is not on this machine
        return False
    return base is not None and base != size
