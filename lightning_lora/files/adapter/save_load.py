"""Saving and loading adapters as folders: PEFT's two files, our manifest, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, first_five
from lightning_lora.files.adapter.fit import adapter_targets, check_base, check_copies, model_tensors, with_experts
from lightning_lora.files.adapter.folder import check_finite, read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE, Manifest, WeightEntry
from lightning_lora.files.adapter.model_card import model_card
from lightning_lora.files.adapter.peft_config import to_peft
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, PREFIX, TENSOR_FILE
from lightning_lora.files.adapter.peft_layers import PEFTLayout
from lightning_lora.files.atomic import atomic_folder, sha256
from lightning_lora.files.safetensors_file import write_tensors
from lightning_lora.lora.adapter import (
    attach_targets,
    check_not_merged,
    check_not_sharded,
    check_tensors,
    freeze,
    lora_state_dict,
)
from lightning_lora.lora.base_values import keep_base_values
from lightning_lora.lora.fingerprint import base_digests, fingerprint
from lightning_lora.lora.layers.adapted import base_parameter, following_layers, lora_layers
from lightning_lora.lora.layers.attention import attach_readers
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.shards import check_not_flattened, full_parameters, full_tensor
from lightning_lora.lora.targets.roles import hugging_face_models
from lightning_lora.lora.targets.selection import is_inside


def save_adapter(
    module: nn.Module, path: str | Path, summary: Mapping[str, Any] | None = None, tokenizer: Any = None
) -> Path:
    """Write the adapters of ``module`` as a folder that PEFT and vLLM load, with our manifest and a model card.

    Names are relative to the Hugging Face model inside ``module`` if there is one, as PEFT expects. The folder
    appears whole or not at all; an adapter already there is replaced in one step. Under sharding every rank must
    call this, and rank 0 writes; under FSDP1 ``module`` is the outermost wrapper, ``trainer.model``.

    Args:
        module: An adapted module whose updates are not merged.
        path: The folder to write.
        summary: Facts of the training run for manifest and card: name to number or text.
        tokenizer: A tokenizer to write beside the adapter, if given.

    Returns:
        The folder.

    Raises:
        ConfigError: If nothing is adapted, or the updates are merged.
        AdapterFileError: If a value is not finite, or ``path`` holds something else.
        AlreadyShardedError: If FSDP1 has flattened the factors, and ``module`` is not the outermost wrapper.
    """
    with full_parameters(module):
        check_not_flattened(module, "save the adapter")
        return _save(module, path, summary, tokenizer)


def _save(module: nn.Module, path: str | Path, summary: Mapping[str, Any] | None, tokenizer: Any) -> Path:
    check_not_merged(module, "save the adapter")
    _check_memory(module)
    root = _root_to_save(module)
    layout = PEFTLayout(root)
    factors = lora_state_dict(root)
    trained = {name: full_tensor(tensor) for name, tensor in _trained_tensors(root).items()}
    check_finite(factors | trained, "the adapter is not saved")
    manifest = _manifest(layout, trained, summary or {})
    peft = to_peft(layout, {name.rpartition(".")[0] for name in trained})
    tensors = layout.tensors(factors) | {PREFIX + name: tensor for name, tensor in trained.items()}
    layout.warn_of_differences()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _write(Path(path), peft, tensors, manifest, tokenizer)
    return Path(path)


def load_adapter(module: nn.Module, path: str | Path, allow_other_base: bool = False) -> None:
    """Load an adapter folder, ours or PEFT's, into ``module``, and adapt its layers first if they are not.

    Files, names, shapes and the base weights are all checked before anything changes.

    Args:
        module: The base model the adapter belongs to, plain or adapted in the same layers.
        path: The folder.
        allow_other_base: Load even if the base weights are not those the adapter was trained on.

    Raises:
        AdapterFileError: If the folder is damaged, of an unsupported kind, or does not fit ``module``.
        BaseMismatchError: If it was trained on other base weights.
        ConfigError: If the updates in ``module`` are merged.
    """
    folder = read_adapter_folder(path)
    check_not_sharded(module)
    check_not_merged(module, "load an adapter")
    root = _root_to_load(module, [*folder.ranks, *folder.stacked])
    folder = with_experts(root, folder)
    layers, tied = adapter_targets(root, folder)
    trained = {name: tensor for name, tensor in model_tensors(root) if name in folder.trained}
    check_tensors(trained, folder.trained)
    check_copies(root, folder)
    if not allow_other_base:
        check_base(root, folder)
    if not lora_layers(root):
        freeze(module)
        attach_targets(root, layers, tied)
        # The layers that read adapted weights may lie outside the model that the adapter names.
        attach_readers(module)
    keep_base_values(module, trained.values())
    for tensor in trained.values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    tensors = trained | lora_state_dict(root)
    with torch.no_grad():
        for name, tensor in (folder.factors | folder.trained).items():
            tensors[name].copy_(tensor)


def _root_to_save(module: nn.Module) -> nn.Module:
    """The Hugging Face model that holds everything trained, so that names are those of PEFT; else ``module`` itself."""
    for _, model in hugging_face_models(module):
        if lora_layers(model).keys() and len(lora_layers(model)) == len(lora_layers(module)):
            inner = {id(tensor) for tensor in _trained_tensors(model).values()}
            return model if all(id(tensor) in inner for tensor in _trained_tensors(module).values()) else module
    return module


def _root_to_load(module: nn.Module, names: list[str]) -> nn.Module:
    """The model in ``module`` that has layers of these names, an adapted one first; else ``module`` itself."""
    models = [model for _, model in hugging_face_models(module)]
    for model in sorted(models, key=lambda model: not lora_layers(model)):
        parts = (*model.named_modules(), *model.named_parameters())
        if {name.partition(".base_layer")[0] for name in names} <= {plain_name(name) for name, _ in parts}:
            return model
    return module


def _trained_tensors(root: nn.Module) -> dict[str, Tensor]:
    """The tensors that learn beside the adapters: parameters with gradients, and the buffers next to them.

    Modules named in ``trainable`` count even without gradients, as a module may be frozen after training.
    """
    tensors = dict(model_tensors(root))
    configs = {id(config): config for layer in lora_layers(root).values() for config in (layer.lora_spec.config,)}
    patterns = {pattern for config in configs.values() for pattern in config.trainable}
    asked = {plain_name(name) for name, _ in root.named_modules() if name and matches_any(name, patterns)}
    learning = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.requires_grad}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.requires_grad
        or is_inside(name.rpartition(".")[0], asked)
        or (not isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in learning)
    }


def _check_memory(module: nn.Module) -> None:
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise ConfigError(
            f"cannot save the adapter: {len(empty)} parameters are on the meta device and have no values "
            f"({first_five(empty)})."
        )


def _manifest(layout: PEFTLayout, trained: Mapping[str, Tensor], summary: Mapping[str, Any]) -> Manifest:
    digests = base_digests(layout.root, trained)
    layers = {}
    for name, (layer, weight) in layout.weights.items():
        spec, parameter = layer.lora_specs[weight], base_parameter(name, layer, weight)
        layers[name] = WeightEntry(
            rank=spec.rank,
            alpha=spec.alpha,
            role=spec.role,
            parameter=parameter,
            base=digests.get(parameter),
            **layout.storage(name),
        )
    return Manifest(
        versions={name: version(name) for name in ("lightning-lora", "lightning", "torch")},
        config=next(iter(layout.weights.values()))[0].lora_spec.config.to_dict(),
        layers=layers,
        following=tuple(sorted(following_layers(layout.root))),
        base_fingerprint=fingerprint(digests),
        summary=dict(summary),
    )


def _write(path: Path, peft: dict[str, Any], tensors: dict[str, Tensor], manifest: Manifest, tokenizer: Any) -> None:
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_folder(path, replaces=CONFIG_FILE) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n")
        write_tensors(folder / TENSOR_FILE, tensors.items(), shapes, {"format": "pt"})
        manifest = replace(
            manifest,
            tensors={name: list(shape) for name, (_, shape) in shapes.items()},
            files={
                name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                for name in (CONFIG_FILE, TENSOR_FILE)
            },
        )
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(peft, manifest))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
