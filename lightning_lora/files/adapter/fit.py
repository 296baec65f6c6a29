"""Whether an adapter folder fits a module: layers, shapes, scales, and the base weights; nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, BaseMismatchError, first_five
from lightning_lora.files.adapter import peft_experts, peft_layers
from lightning_lora.files.adapter.folder import MANIFEST_FILE, AdapterFolder
from lightning_lora.files.adapter.peft_patterns import TargetedNames
from lightning_lora.lora.adapter import check_tensors
from lightning_lora.lora.fingerprint import base_digests, fingerprint, tensor_digest
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters, join
from lightning_lora.lora.layers.base import FACTORS, AdapterSpec, is_factor
from lightning_lora.lora.layers.conv import LoRAConv
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.adaptable import refused_layers
from lightning_lora.lora.targets.resolve import Target, without_dropout
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.lora.targets.shared_weights import TiedWeights, weight_owners


def own_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer that is saved, shared ones under each of their names."""
    for prefix, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not is_factor(name) and name not in module._non_persistent_buffers_set:
                yield plain_name(join(prefix, name)), tensor


def with_experts(root: nn.Module, folder: AdapterFolder) -> AdapterFolder:
    """``folder`` with the factors of fused experts, if PEFT wrote any, by our names.

    Raises:
        AdapterFileError: If they fit no experts layer of ``root``.
    """
    if not folder.packed:
        return folder
    factors: dict[str, Tensor] = {}
    found: set[str] = set()
    packed: dict[str, list[str]] = {}
    for name in folder.packed:
        packed.setdefault(name.partition(".base_layer")[0], []).append(name)
    for name, module in root.named_modules():
        kind, name = adapter_kind(module), plain_name(name)
        if name not in folder.packed or kind is None:
            continue
        if issubclass(kind, LoRAFusedExperts):
            factors |= peft_experts.unpack_by_model(folder.packed, folder.peft, name, module, kind)
            found.update(packed[name])
        elif issubclass(kind, LoRALinear):
            # The weight of a linear layer, targeted as a parameter: the same update as of the layer.
            factors |= {join(name, factor): tensor for factor, tensor in zip(FACTORS, folder.packed[name], strict=True)}
            found.add(name)
    lost = sorted(folder.packed.keys() - found)
    if lost:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {first_five(lost)} are no fused experts in {type(root).__name__}."
        )
    return folder.with_factors(factors)


def matching_targets(root: nn.Module, folder: AdapterFolder) -> tuple[list[Target], TiedWeights]:
    """The layers of ``root`` the folder adapts, after checking that each exists and has the right shape.

    Weights they share with other layers come apart, unless the folder says that those use the update too.
    """
    modules = {plain_name(name): module for name, module in root.named_modules()}
    owners = {name: _owner(modules, name) for name in folder.ranks}
    missing = [name for name, owner in owners.items() if owner is None]
    if missing:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(missing)} of {len(folder.ranks)} adapted layers do not "
            f"exist in {type(root).__name__}: {first_five(missing)}."
        )
    if folder.manifest is None:
        _check_same_function({name: modules[owner[0]] for name, owner in owners.items() if owner}, folder)
    present = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(root).items()}
    if present:
        check_tensors(factor_parameters(root), folder.factors)
        _check_scales(present, folder)
        return [], TiedWeights()
    roles = {plain_name(name): role for name, role in module_roles(root).items()}
    refused = {plain_name(name): reason for name, reason in refused_layers(root).items()}
    shapes = folder.shapes
    targets: dict[str, Target] = {}
    problems = []
    for name, (layer, parameter) in ((name, owner) for name, owner in owners.items() if owner is not None):
        kind = adapter_kind(modules[layer])
        if kind is None:
            problems.append(f"{name} is a {type(modules[layer]).__name__}, which cannot be adapted")
            continue
        if layer in refused:
            problems.append(f"{name} cannot be adapted: {refused[layer]}")
            continue
        shape = kind.weights(modules[layer])[parameter]
        if shapes[name] != shape:
            problems.append(f"{name} maps {shape[:2]}, the adapter {shapes[name][:2]}")
            continue
        target = targets.setdefault(layer, Target(layer, modules[layer], kind, {}))
        target.specs[parameter] = _spec(folder, name, folder.ranks[name], roles[layer])
    if problems:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(problems)} of {len(folder.ranks)} layers disagree: "
            f"{first_five(problems)}."
        )
    if folder.manifest is None:
        _check_complete(modules, folder)
    undropped = without_dropout(root, targets.values()) if folder.config.dropout else []
    if undropped:
        warnings.warn(
            f"{folder.path} has dropout {folder.config.dropout:g}, which cannot act on {len(undropped)} of its layers "
            f"({first_five(undropped)}): they compute with the sum of weight and update. PEFT drops nothing there "
            f"either.",
            stacklevel=3,
        )
    return list(targets.values()), _tied(root, targets, folder)


def _tied(root: nn.Module, targets: Mapping[str, Target], folder: AdapterFolder) -> TiedWeights:
    untied, followers, following = [], {}, frozenset(folder.following)
    owners = weight_owners(root)
    for name, target in targets.items():
        for parameter in target.specs:
            shared = owners[id(getattr(target.module, parameter))]
            others = [layer for owner in shared if (layer := owner.rpartition(".")[0]) != name]
            if others and following.issuperset(others):
                followers |= dict.fromkeys(others, name)
            elif others:
                untied.append((target.module, parameter))
                shared.remove(join(name, parameter))
    return TiedWeights(tuple(untied), followers)


def _check_same_function(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """PEFT trains other functions of some convolutions than their weights and its factors say."""
    convolutions = {name: module for name, module in modules.items() if adapter_kind(module) is LoRAConv}
    other = [
        f"{name} ({reason})" for name, module in convolutions.items() if (reason := peft_layers.difference(module))
    ]
    if other:
        raise AdapterFileError(
            f"{folder.path} was trained by PEFT, which ignores groups, dilation and padding mode of convolutions: it "
            f"means another function of {first_five(other)} than an update of their weights. Train it here, or merge "
            f"it in PEFT."
        )


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[str, str] | None:
    """The layer and the parameter that an adapted weight's name stands for; None where there is no such thing."""
    if name in modules:
        kind = adapter_kind(modules[name])
        weights = kind.weights(modules[name]) if kind is not None else {"weight": None}
        return (name, next(iter(weights))) if len(weights) == 1 else None
    layer, _, parameter = name.rpartition(".")
    kind = adapter_kind(modules[layer]) if layer in modules else None
    return (layer, parameter) if kind is not None and parameter in kind.weights(modules[layer]) else None


def _check_scales(present: Mapping[str, AdapterSpec], folder: AdapterFolder) -> None:
    """The tensors mean another function under another alpha or scaling."""
    wrong = [
        f"{name} has {spec.scale:g}, the adapter {_spec(folder, name, spec.rank, '').scale:g}"
        for name, spec in present.items()
        if spec.scale != _spec(folder, name, spec.rank, "").scale
    ]
    if wrong:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(wrong)} of {len(present)} layers were adapted with another "
            f"scale, alpha / rank: {first_five(wrong)}. Inject with the adapter's settings, or take the adapters off "
            f"with remove_lora(module) and load into the plain module."
        )


def _check_complete(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Without a manifest only the config tells which layers the file must hold."""
    targeted = TargetedNames(folder.peft)
    lost = [
        name
        for name, module in modules.items()
        if name not in folder.ranks and adapter_kind(module) and name in targeted
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
        other = [name for name in layers if digests.get(layers[name]["parameter"]) != layers[name]["base"]]
        where = f"{len(other)} of its {len(layers)} layers have other weights here" if other else "its layers agree"
        raise BaseMismatchError(
            f"{folder.path} was trained on a base with fingerprint {folder.manifest['base_fingerprint']}, this one "
            f"has {fingerprint(digests)}: {where}{f' ({first_five(other)})' if other else ''}. Load the right base, "
            f"or pass allow_other_base=True."
        )
