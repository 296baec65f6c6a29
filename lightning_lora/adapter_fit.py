"""Whether an adapter folder fits a module: layers, shapes, scales, and the base weights; nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_lora import peft_format
from lightning_lora.adapter import FACTORS, check_tensors, join
from lightning_lora.adapter_folder import MANIFEST_FILE, AdapterFolder
from lightning_lora.errors import AdapterFileError, BaseMismatchError, first_five
from lightning_lora.fingerprint import base_digests, fingerprint, tensor_digest
from lightning_lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.layers.registry import adapter_kind
from lightning_lora.layers.walk import lora_layers
from lightning_lora.patterns import plain_name
from lightning_lora.roles import module_roles
from lightning_lora.targets import Target


def own_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer that is saved, shared ones under each of their names."""
    for prefix, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in FACTORS and name not in module._non_persistent_buffers_set:
                yield plain_name(join(prefix, name)), tensor


def matching_targets(root: nn.Module, folder: AdapterFolder) -> list[Target]:
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


def check_copies(root: nn.Module, folder: AdapterFolder) -> None:
    """PEFT stores a copy of embeddings it adapts; it must be the base's, for only adapters are loaded."""
    own = dict(own_tensors(root))
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


def check_base(root: nn.Module, folder: AdapterFolder) -> None:
    """Raise `BaseMismatchError` if the adapter was trained on other weights; warn where the folder does not say."""
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
