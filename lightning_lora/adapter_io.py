"""Adapter folders on disk: PEFT's two files, our manifest, and a model card, written and read as one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora import peft_format
from lightning_lora.adapter import (
    FACTORS,
    attach_target,
    check_not_merged,
    check_not_sharded,
    check_tensors,
    join,
    lora_layers,
    lora_state_dict,
)
from lightning_lora.adapter_folder import (
    FORMAT,
    MANIFEST_FILE,
    AdapterFolder,
    check_finite,
    read_adapter_folder,
)
from lightning_lora.atomic import atomic_folder, sha256
from lightning_lora.errors import AdapterFileError, BaseMismatchError, ConfigError, first_five
from lightning_lora.fingerprint import base_digests, fingerprint, tensor_digest
from lightning_lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.layers.registry import adapter_kind
from lightning_lora.model_card import model_card
from lightning_lora.patterns import matches_any, plain_name
from lightning_lora.roles import hugging_face_models, module_roles
from lightning_lora.targets import Target
from lightning_lora.tensor_files import write_tensors


def save_adapter(
    module: nn.Module, path: str | Path, summary: Mapping[str, Any] | None = None, tokenizer: Any = None
) -> Path:
    """Write the adapters of ``module`` as a folder that PEFT and vLLM load, with our manifest and a model card.

    Names are relative to the Hugging Face model inside ``module`` where there is one, as PEFT expects. The folder
    appears whole or not at all; an adapter already there is replaced in one step. Under sharding every rank must
    call this, and rank 0 writes.

    Args:
        module: An adapted module, its updates not merged.
        path: The folder to write.
        summary: Facts of the training run for manifest and card: name to number or text.
        tokenizer: Written beside the adapter if given.

    Returns:
        The folder.

    Raises:
        ConfigError: If nothing is adapted, or the updates are merged.
        AdapterFileError: If a value is not finite, or ``path`` holds something else.
    """
    check_not_merged(module, "save the adapter")
    _check_memory(module)
    root = _root_to_save(module)
    layers = lora_layers(root)
    factors = lora_state_dict(root)
    trained = {name: _whole(tensor) for name, tensor in _trained_tensors(root).items()}
    check_finite(factors | trained, "the adapter is not saved")
    manifest = _manifest(root, trained, summary or {})
    peft = peft_format.to_peft(root, layers, {name.rpartition(".")[0] for name in trained})
    tensors = {
        peft_format.tensor_name(name, layer, factor): factors[join(name, factor)]
        for name, layer in layers.items()
        for factor in FACTORS
    } | {peft_format.PREFIX + name: tensor for name, tensor in trained.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _write(Path(path), peft, tensors, manifest, tokenizer)
    return Path(path)


def load_adapter(module: nn.Module, path: str | Path, allow_other_base: bool = False) -> None:
    """Load an adapter folder, ours or PEFT's, into ``module``, adapting its layers first where needed.

    Everything is checked before anything changes: files, names, shapes, and the base weights.

    Args:
        module: The base model the adapter belongs to, plain or adapted in the same layers.
        path: The folder.
        allow_other_base: Load even though the base weights are not those the adapter was trained on.

    Raises:
        AdapterFileError: If the folder is damaged, of an unsupported kind, or does not fit ``module``.
        BaseMismatchError: If it was trained on other base weights.
        ConfigError: If the updates in ``module`` are merged.
    """
    folder = read_adapter_folder(path)
    check_not_sharded(module)
    check_not_merged(module, "load an adapter")
    root = _root_to_load(module, list(folder.ranks))
    targets = _matching_targets(root, folder)
    trained = {name: tensor for name, tensor in _own_tensors(root) if name in folder.trained}
    check_tensors(trained, folder.trained)
    _check_copies(root, folder)
    if not allow_other_base:
        _check_base(root, folder)
    if not lora_layers(root):
        module.requires_grad_(False)
        for target in targets:
            attach_target(target)
    for tensor in trained.values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    tensors = trained | lora_state_dict(root)
    with torch.no_grad():
        for name, tensor in (folder.factors | folder.trained).items():
            tensors[name].copy_(tensor)


def _root_to_save(module: nn.Module) -> nn.Module:
    """The Hugging Face model that holds all that was trained, so that names fit PEFT's; else ``module`` itself."""
    for _, model in hugging_face_models(module):
        if lora_layers(model).keys() and len(lora_layers(model)) == len(lora_layers(module)):
            inner = {id(tensor) for tensor in _trained_tensors(model).values()}
            return model if all(id(tensor) in inner for tensor in _trained_tensors(module).values()) else module
    return module


def _root_to_load(module: nn.Module, names: list[str]) -> nn.Module:
    """The model in ``module`` that has layers of these names, one that is adapted first; else ``module`` itself."""
    models = [model for _, model in hugging_face_models(module)]
    for model in sorted(models, key=lambda model: not lora_layers(model)):
        if set(names) <= {plain_name(name) for name, _ in model.named_modules()}:
            return model
    return module


def _own_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer that is saved, shared ones under each of their names."""
    for prefix, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in FACTORS and name not in module._non_persistent_buffers_set:
                yield plain_name(join(prefix, name)), tensor


def _trained_tensors(root: nn.Module) -> dict[str, Tensor]:
    """What learns beside the adapters: parameters with gradients, the buffers next to them, and what was asked for.

    The last because a module may be frozen as a whole once training is over.
    """
    tensors = dict(_own_tensors(root))
    patterns = {pattern for layer in lora_layers(root).values() for pattern in layer.lora_spec.config.trainable}
    asked = [f"{plain_name(name)}." for name, _ in root.named_modules() if matches_any(name, patterns)]
    learning = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.requires_grad}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.requires_grad
        or name.startswith(tuple(asked))
        or (not isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in learning)
    }


def _whole(tensor: Tensor) -> Tensor:
    """The tensor without gradient, gathered from all ranks if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _check_memory(module: nn.Module) -> None:
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise ConfigError(
            f"cannot save the adapter: {len(empty)} parameters are on the meta device and have no values "
            f"({first_five(empty)})."
        )


def _manifest(root: nn.Module, trained: Mapping[str, Tensor], summary: Mapping[str, Any]) -> dict[str, Any]:
    digests = base_digests(root, trained)
    layers = lora_layers(root)
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("lightning-lora", "lightning", "torch")},
        "config": next(iter(layers.values())).lora_spec.config.to_dict(),
        "layers": {
            name: {
                "rank": layer.lora_spec.rank,
                "alpha": layer.lora_spec.alpha,
                "role": layer.lora_spec.role,
                "base": digests.get(join(name, "weight")),
            }
            for name, layer in layers.items()
        },
        "base_fingerprint": fingerprint(digests),
        "summary": dict(summary),
    }


def _write(
    path: Path, peft: dict[str, Any], tensors: dict[str, Tensor], manifest: dict[str, Any], tokenizer: Any
) -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_folder(path, replaces=peft_format.CONFIG_FILE) as folder:
        (folder / peft_format.CONFIG_FILE).write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n")
        write_tensors(folder / peft_format.TENSOR_FILE, tensors.items(), layout, {"format": "pt"})
        manifest["tensors"] = {name: list(shape) for name, (_, shape) in layout.items()}
        manifest["files"] = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
            for name in (peft_format.CONFIG_FILE, peft_format.TENSOR_FILE)
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(peft, manifest))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _matching_targets(root: nn.Module, folder: AdapterFolder) -> list[Target]:
    """The layers of ``root`` the folder adapts, after checking that each exists and has the right shape."""
    modules = {plain_name(name): module for name, module in root.named_modules()}
    missing = [name for name in folder.ranks if name not in modules]
    if missing:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(missing)} of {len(folder.ranks)} adapted layers do not "
            f"exist in {type(root).__name__}: {first_five(missing)}."
        )
    present = lora_layers(root)
    if present:
        check_tensors(
            {join(name, factor): getattr(layer, factor) for name, layer in present.items() for factor in FACTORS},
            folder.factors,
        )
        _check_scales(present, folder)
        return []
    roles = {plain_name(name): role for name, role in module_roles(root).items()}
    targets, problems = [], []
    for name, rank in folder.ranks.items():
        kind = adapter_kind(modules[name])
        if kind is None:
            problems.append(f"{name} is a {type(modules[name]).__name__}, which cannot be adapted")
            continue
        found = folder.factors[join(name, "lora_A")].shape[1], folder.factors[join(name, "lora_B")].shape[0]
        if found != kind.dimensions(modules[name]):
            problems.append(f"{name} maps {kind.dimensions(modules[name])}, the adapter {found}")
            continue
        spec = _spec(folder, name, rank, roles[name])
        targets.append(Target(name, modules[name], kind, spec))
    if problems:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(problems)} of {len(folder.ranks)} layers disagree: "
            f"{first_five(problems)}."
        )
    if folder.manifest is None:
        _check_complete(modules, folder)
    return targets


def _check_scales(present: Mapping[str, LoRALayer], folder: AdapterFolder) -> None:
    """The tensors mean another function under another alpha or scaling."""
    wrong = [
        f"{name} has {layer.lora_spec.scale:g}, the adapter {_spec(folder, name, layer.lora_spec.rank, '').scale:g}"
        for name, layer in present.items()
        if layer.lora_spec.scale != _spec(folder, name, layer.lora_spec.rank, "").scale
    ]
    if wrong:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(wrong)} of {len(present)} layers were adapted with another "
            f"scale, alpha / rank: {first_five(wrong)}. Inject with the adapter's settings, or take the adapters off "
            f"with remove_lora(module) and load into the plain module."
        )


def _check_complete(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Without a manifest only the config tells which layers the file must hold."""
    lost = [
        name
        for name, module in modules.items()
        if name not in folder.ranks and adapter_kind(module) and peft_format.is_targeted(folder.peft, name)
    ]
    if lost:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: its config targets {len(lost)} layers that its tensors leave "
            f"out ({first_five(lost)})."
        )


def _check_copies(root: nn.Module, folder: AdapterFolder) -> None:
    """PEFT stores a copy of embeddings it adapts; it must be the base's, for only adapters are loaded."""
    own = dict(_own_tensors(root))
    for name, tensor in folder.base_copies.items():
        if name not in own or tensor_digest(own[name]) != tensor_digest(tensor):
            raise BaseMismatchError(
                f"{folder.path} holds base weights of its own for {name}, shape {tuple(tensor.shape)}, and this base "
                f"has others: its vocabulary was resized or retrained. Change the base alike first."
            )


def _spec(folder: AdapterFolder, name: str, rank: int, role: str) -> AdapterSpec:
    if folder.manifest is None:
        return AdapterSpec(rank, folder.config.alpha_pattern.get(name, folder.config.alpha), role, folder.config)
    return AdapterSpec(rank, folder.manifest["layers"][name]["alpha"], role, folder.config)


def _check_base(root: nn.Module, folder: AdapterFolder) -> None:
    if folder.manifest is None:
        warnings.warn(
            f"{folder.path} has no {MANIFEST_FILE}: names and shapes fit, but whether it was trained on these base "
            f"weights cannot be checked.",
            stacklevel=3,
        )
        return
    digests = base_digests(root, folder.trained)
    if fingerprint(digests) != folder.manifest["base_fingerprint"]:
        layers = folder.manifest["layers"]
        other = [name for name in layers if digests.get(join(name, "weight")) != layers[name]["base"]]
        where = f"{len(other)} of its {len(layers)} layers have other weights here" if other else "its layers agree"
        raise BaseMismatchError(
            f"{folder.path} was trained on a base with fingerprint {folder.manifest['base_fingerprint']}, this one "
            f"has {fingerprint(digests)}: {where}{f' ({first_five(other)})' if other else ''}. Load the right base, "
            f"or pass allow_other_base=True."
        )
