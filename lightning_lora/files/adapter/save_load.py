"""Saving and loading adapters as folders: PEFT's two files, our manifest, and a model card."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, check_arguments, first_five
from lightning_lora.files.adapter.fit import adapter_targets, check_base, model_tensors, trained_tensors, with_experts
from lightning_lora.files.adapter.folder import AdapterFolder, read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE, Manifest, WeightEntry
from lightning_lora.files.adapter.model_card import model_card
from lightning_lora.files.adapter.peft_config import to_peft
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, PREFIX, TENSOR_FILE
from lightning_lora.files.adapter.peft_layers import PEFTLayout
from lightning_lora.files.adapter.peft_magnitudes import magnitude_change, stored_magnitudes
from lightning_lora.files.adapter.peft_trained import SavedModules
from lightning_lora.files.adapter.resized_tables import check_copies, check_rows, resized_tables, stored_name
from lightning_lora.files.adapter.stored_layers import with_model_names
from lightning_lora.files.atomic import atomic_folder, sha256
from lightning_lora.files.generation_config import GENERATION_FILE
from lightning_lora.files.safetensors_file import write_tensors
from lightning_lora.lora.adapter import attach_targets, check_finite, freeze, lora_state_dict
from lightning_lora.lora.base_values import keep_base_values
from lightning_lora.lora.changed_tensors import changed_tensors, record_tensors
from lightning_lora.lora.fingerprint import base_prints, fingerprint
from lightning_lora.lora.frozen_copies import frozen_copies, hold_copies
from lightning_lora.lora.layers.adapted import base_parameter, following_layers, join, lora_layers, other_names
from lightning_lora.lora.layers.attention import attach_readers
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.shards import check_not_flattened, check_not_sharded, full_parameters, full_tensor
from lightning_lora.lora.targets.roles import hugging_face_models
from lightning_lora.lora.targets.selection import is_inside
from lightning_lora.lora.targets.shared_weights import every_name, untie
from lightning_lora.versions import installed_version


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
        tokenizer: A tokenizer to write beside the adapter, if given, and with it the generation config of the model.
            PEFT does not read the latter; ``vllm serve --generation-config`` and ``lightning-lora merge`` do.

    Returns:
        The folder.

    Raises:
        ConfigError: If nothing is adapted, or the updates are merged.
        AdapterFileError: If a value is not finite, or ``path`` holds something else.
        AlreadyShardedError: If FSDP1 has flattened the factors, and ``module`` is not the outermost wrapper.
    """
    check_arguments(save_adapter, locals())
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise AdapterStateError(f"tokenizer must be a tokenizer of transformers or None, got {tokenizer!r}.")
    with full_parameters(module):
        check_not_flattened(module, "save the adapter")
        return _save(module, path, summary, tokenizer)


def _save(module: nn.Module, path: str | Path, summary: Mapping[str, Any] | None, tokenizer: Any) -> Path:
    check_not_merged(module, "save the adapter")
    _check_memory(module)
    changed = changed_tensors(module).values()
    root = _root_to_save(module, changed)
    layout = PEFTLayout(root)
    factors = lora_state_dict(root)
    trained = {name: full_tensor(tensor) for name, tensor in _trained_tensors(root).items()}
    copies = resized_tables(root, trained)
    check_finite(factors | trained | copies, "the adapter is not saved")
    saved = SavedModules(root, trained)
    # Beside modules trained in full, PEFT restores single tensors by their names too.
    moved = {name: full_tensor(t) for name, t in _named(root, changed).items() if name not in trained}
    beside = {name: tensor for name, tensor in saved.beside.items() if name not in (moved | copies)}
    manifest = replace(
        _manifest(layout, trained.keys() | moved.keys() | every_name(root, copies), summary or {}),
        beside=tuple(beside),
        moved=tuple(sorted(moved)),
        base_copies=tuple(sorted(copies)),
    )
    peft = to_peft(layout, saved.names)
    tensors = layout.tensors(factors) | stored_magnitudes(layout, factors)
    tensors |= {PREFIX + name: tensor for name, tensor in (trained | beside | moved).items()}
    tensors |= {PREFIX + stored_name(name, root): tensor for name, tensor in copies.items()}
    layout.warn_of_differences()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        beside_tensors = () if tokenizer is None else (tokenizer, getattr(layout.root, "generation_config", None))
        _write(Path(path), peft, tensors, manifest, *beside_tensors)
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
    check_arguments(load_adapter, locals())
    folder = read_adapter_folder(path)
    check_not_sharded(module)
    check_not_merged(module, "load an adapter")
    root, folder = _placed(module, folder)
    folder = with_experts(root, folder)
    layers, tied = adapter_targets(root, folder)
    trained_tensors(root, folder)
    restored = check_copies(root, folder)
    if not allow_other_base:
        check_rows(restored, folder)
        check_base(root, folder, restored)
    _copy(folder.base_copies, restored)
    if lora_layers(root):
        untie(root, tied.untied)
    else:
        copies = frozen_copies(root)
        owners = {name.rpartition(".")[0] for name in folder.trained}
        inside = next(plain_name(name) for name, child in module.named_modules() if child is root)
        record_tensors(module, [join(inside, name) for name in (*copies, *owners)])
        freeze(module)
        attach_targets(root, layers, tied)
        # The layers that read adapted weights may lie outside the model that the adapter names.
        attach_readers(module)
        hold_copies(root, copies)
    # Weights that were shared may be others now.
    trained = trained_tensors(root, folder)
    keep_base_values(module, trained.values())
    _load_trained(root, folder, trained)
    _copy(folder.factors, lora_state_dict(root))


def _load_trained(root: nn.Module, folder: AdapterFolder, trained: dict[str, Tensor]) -> None:
    moved = folder.manifest.moved
    for name, tensor in trained.items():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter) and name not in moved)
    for name in [name for name, tensor in trained.items() if name in moved and not tensor.numel()]:
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._buffers[leaf] = folder.trained[name].to(trained.pop(name).device)
    _copy({name: folder.trained[name] for name in trained}, trained)


def _copy(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _root_to_save(module: nn.Module, changed: Collection[Tensor]) -> nn.Module:
    """The Hugging Face model that holds everything trained, so that names are those of PEFT; else ``module`` itself."""
    for _, model in hugging_face_models(module):
        if lora_layers(model).keys() and len(lora_layers(model)) == len(lora_layers(module)):
            inner = {id(tensor) for _, tensor in model_tensors(model)}
            trained = (*_trained_tensors(module).values(), *changed)
            return model if all(id(tensor) in inner for tensor in trained) else module
    return module


def _named(root: nn.Module, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """The tensors that ``root`` holds, by its names."""
    wanted = {id(tensor) for tensor in tensors}
    return {name: tensor for name, tensor in model_tensors(root) if id(tensor) in wanted}


def _placed(module: nn.Module, folder: AdapterFolder) -> tuple[nn.Module, AdapterFolder]:
    """The model in ``module`` that has the adapted layers, an adapted one first, else ``module`` itself.

    If no model has layers of these names, those that transformers has renamed or fused since are sought by the names
    of their models, and the folder comes with the present names.
    """
    models = [model for _, model in hugging_face_models(module)]
    models = sorted(models, key=lambda model: not lora_layers(model))
    for model in models:
        if not _unknown(model, folder):
            return model, folder
    for model in models:
        converted = with_model_names(model, folder, _unknown(model, folder))
        if converted is not folder and not _unknown(model, converted):
            return model, converted
    return module, folder


def _unknown(model: nn.Module, folder: AdapterFolder) -> set[str]:
    """The adapted layers of the folder that ``model`` does not have."""
    parts = (*model.named_modules(), *model.named_parameters())
    names = {name.partition(".base_layer")[0] for name in (*folder.ranks, *folder.stacked)}
    return names - {plain_name(name) for name, _ in parts}


def _trained_tensors(root: nn.Module) -> dict[str, Tensor]:
    """The tensors that learn beside the adapters: parameters with gradients, and the buffers next to them.

    Modules named in ``trainable`` count even without gradients, as a module may be frozen after training. One with
    ``is_for_training_only = True`` is no part of what is saved.
    """
    left_out = [name for name, part in root.named_modules() if getattr(part, "is_for_training_only", False)]
    tensors = {
        name: tensor for name, tensor in model_tensors(root) if not is_inside(name.rpartition(".")[0], set(left_out))
    }
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
        raise AdapterStateError(
            f"cannot save the adapter: {len(empty)} parameters are on the meta device and have no values "
            f"({first_five(empty)})."
        )


def _manifest(layout: PEFTLayout, not_base: Collection[str], summary: Mapping[str, Any]) -> Manifest:
    base = base_prints(layout.root, not_base)
    layers = {}
    for name, (layer, weight) in layout.weights.items():
        spec, parameter = layer.lora_specs[weight], base_parameter(name, layer, weight)
        layers[name] = WeightEntry(
            rank=spec.rank,
            alpha=spec.alpha,
            role=spec.role,
            parameter=parameter,
            base=base[parameter].digest if parameter in base else None,
            magnitude_change=magnitude_change(layer),
            **layout.storage(name),
        )
    return Manifest(
        versions={name: installed_version(name) for name in ("lightning-lora", "lightning", "torch")},
        config=next(iter(layout.weights.values()))[0].lora_spec.config.to_dict(),
        layers=layers,
        following=tuple(sorted(following_layers(layout.root).keys() | other_names(layout.root).keys())),
        base_fingerprint=fingerprint(base),
        base=base,
        summary=dict(summary),
    )


def _write(
    path: Path,
    peft: dict[str, Any],
    tensors: dict[str, Tensor],
    manifest: Manifest,
    tokenizer: Any = None,
    generation_config: Any = None,
) -> None:
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
        if generation_config is not None:
            # Not its save_pretrained, which refuses some configs: an adapter is not lost for that.
            (folder / GENERATION_FILE).write_text(generation_config.to_json_string())
