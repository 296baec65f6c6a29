"""Checks that an adapter folder fits a module: layers, shapes, scales and base weights. Nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, BaseMismatchError, first_five
from lightning_lora.files.adapter import peft_experts, peft_layers
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.adapter.peft_patterns import TargetedNames
from lightning_lora.lora.adapter import check_tensors
from lightning_lora.lora.fingerprint import base_digests, fingerprint, tensor_digest
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters, join
from lightning_lora.lora.layers.base import AdapterSpec, is_factor
from lightning_lora.lora.layers.conv import LoRAConv
from lightning_lora.lora.layers.registry import adapter_kind, kind_of_named
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.adaptable import refused_layers
from lightning_lora.lora.targets.resolve import Target, without_dropout
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.lora.targets.shared_weights import TiedWeights, weight_owners


def model_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, without adapter factors; shared ones come under each of their names."""
    for prefix, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not is_factor(name) and name not in module._non_persistent_buffers_set:
                yield plain_name(join(prefix, name)), tensor


def with_experts(root: nn.Module, folder: AdapterFolder) -> AdapterFolder:
    """``folder`` with the factors of targeted parameters, if PEFT wrote any, by our names.

    Raises:
        AdapterFileError: If they fit no parameters of ``root``, or are missing for one that the config targets.
    """
    if folder.manifest.is_present or not folder.peft.get("target_parameters"):
        return folder
    unstacked, found = peft_experts.Unstacked(), set()
    for name, module in root.named_modules():
        name = plain_name(name)
        parameters = peft_experts.listed_parameters(folder.peft, name, module)
        kind = kind_of_named(module) if parameters else None
        if kind is not None:
            unstacked.add(folder.stacked, folder.peft, name, module, kind)
            found.update(peft_experts.module_names(name, len(parameters)))
    lost = sorted(folder.stacked.keys() - found)
    if lost:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: its tensors of {first_five(lost)} belong to no layer of "
            f"{type(root).__name__} that its config adapts."
        )
    return folder.with_factors(unstacked)


def adapter_targets(root: nn.Module, folder: AdapterFolder) -> tuple[list[Target], TiedWeights]:
    """Find the layers of ``root`` that the folder adapts, and check that each of them exists and has the right shape.

    Weights that they share with other layers are untied, unless the folder says that the others use the update too.

    Returns:
        The layers to adapt, none if they are adapted already, and what to do with shared weights.

    Raises:
        AdapterFileError: If the folder does not fit.
    """
    modules = {plain_name(name): module for name, module in root.named_modules()}
    owners = _owners(root, modules, folder)
    if not folder.manifest.is_present:
        _check_same_function({name: modules[layer] for name, (layer, _) in owners.items()}, folder)
    present = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(root).items()}
    if present:
        _check_complete(modules, folder)
        check_tensors(factor_parameters(root), folder.factors)
        _check_scales(present, folder)
        return [], TiedWeights()
    targets = _targets(root, modules, owners, folder)
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


def _owners(root: nn.Module, modules: Mapping[str, nn.Module], folder: AdapterFolder) -> dict[str, tuple[str, str]]:
    """Adapted weight to the names of its layer and of its parameter there."""
    found = {name: _owner(modules, name) for name in folder.ranks}
    owners = {name: owner for name, owner in found.items() if owner is not None}
    missing = [name for name in found if name not in owners]
    if missing:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(missing)} of {len(folder.ranks)} adapted layers do not "
            f"exist in {type(root).__name__}: {first_five(missing)}."
        )
    return owners


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[str, str] | None:
    """The names of layer and parameter that the name of an adapted weight stands for; None if they do not exist."""
    if name in modules:
        kind = kind_of_named(modules[name])
        weights = kind.weights(modules[name]) if kind is not None else {"weight": None}
        return (name, next(iter(weights))) if len(weights) == 1 else None
    layer, _, parameter = name.rpartition(".")
    kind = kind_of_named(modules[layer]) if layer in modules else None
    return (layer, parameter) if kind is not None and parameter in kind.weights(modules[layer]) else None


def _targets(
    root: nn.Module, modules: Mapping[str, nn.Module], owners: Mapping[str, tuple[str, str]], folder: AdapterFolder
) -> dict[str, Target]:
    """Layer to what is adapted there, after checking that the layers can be adapted and have the right shapes."""
    named = {id(modules[layer]) for layer, _ in owners.values()}
    roles = {plain_name(name): role for name, role in module_roles(root, named).items()}
    refused = {plain_name(name): reason for name, reason in refused_layers(root).items()}
    shapes = folder.shapes
    targets: dict[str, Target] = {}
    problems = []
    for name, (layer, parameter) in owners.items():
        module = modules[layer]
        kind = kind_of_named(module)
        if kind is None:
            problems.append(f"{name} is a {type(module).__name__}, which cannot be adapted")
        elif layer in refused:
            problems.append(f"{name} cannot be adapted: {refused[layer]}")
        elif shapes[name] != (shape := kind.weights(module)[parameter]):
            problems.append(f"{name} maps {shape[:2]}, the adapter {shapes[name][:2]}")
        else:
            target = targets.setdefault(layer, Target(layer, module, kind, {}))
            target.specs[parameter] = folder.spec(name, roles[layer])
    if problems:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(problems)} of {len(folder.ranks)} layers disagree: "
            f"{first_five(problems)}."
        )
    return targets


def _tied(root: nn.Module, targets: Mapping[str, Target], folder: AdapterFolder) -> TiedWeights:
    """Which shared weights to untie, and which layers follow the update of another one."""
    untied, followers, following = [], {}, frozenset(folder.manifest.following)
    owners = weight_owners(root)
    for name, target in targets.items():
        for parameter in target.specs:
            sharing = owners[id(getattr(target.module, parameter))]
            others = [layer for owner in sharing if (layer := owner.rpartition(".")[0]) != name]
            if others and following.issuperset(others):
                followers |= dict.fromkeys(others, name)
            elif others:
                untied.append((target.module, parameter))
                sharing.remove(join(name, parameter))
    return TiedWeights(tuple(untied), followers)


def _check_same_function(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Refuse convolutions of which PEFT trained another function than an update of their weights."""
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


def _check_scales(present: Mapping[str, AdapterSpec], folder: AdapterFolder) -> None:
    """Refuse a module adapted with another alpha or scaling, where the tensors would be another function."""
    wrong = [
        f"{name} has {spec.scale:g}, the adapter {folder.spec(name).scale:g}"
        for name, spec in present.items()
        if spec.scale != folder.spec(name).scale
    ]
    if wrong:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: {len(wrong)} of {len(present)} layers were adapted with another "
            f"scale, alpha / rank: {first_five(wrong)}. Inject with the adapter's settings, or take the adapters off "
            f"with remove_lora(module) and load into the plain module."
        )


def _check_complete(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Refuse a folder without a manifest whose config names layers or modules that its tensors leave out."""
    if folder.manifest.is_present:
        return
    targeted = TargetedNames(folder.peft)
    lost = [
        name
        for name, module in modules.items()
        if name not in folder.ranks and name in targeted and kind_of_named(module) is not None
    ]
    if lost:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: its config targets {len(lost)} layers that its tensors leave "
            f"out ({first_five(lost)})."
        )
    untrained = _untrained(modules, folder)
    if untrained:
        raise AdapterFileError(
            f"{folder.path} does not fit this module: its config has modules_to_save, but its tensors leave out "
            f"{len(untrained)} of their parameters ({first_five(untrained)})."
        )


def _untrained(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> list[str]:
    """Parameters of modules that ``modules_to_save`` names, and which the folder does not hold."""
    listed = tuple(folder.peft.get("modules_to_save") or ())
    # As in PEFT, an entry also means names that it ends within a part.
    saved = [name for name in modules if listed and name.endswith(listed)]
    parameters = [
        plain_name(join(name, end))
        for name in saved
        for end, _ in modules[name].named_parameters(remove_duplicate=False)
        if not is_factor(end)
    ]
    return [name for name in dict.fromkeys(parameters) if name not in folder.trained]


def check_copies(root: nn.Module, folder: AdapterFolder) -> None:
    """Raise `BaseMismatchError` if the copies of base weights that PEFT stores beside embeddings are not the base's.

    Only adapters are loaded, so other weights would be lost.
    """
    own = dict(model_tensors(root))
    for name, tensor in folder.base_copies.items():
        if name not in own or tensor_digest(own[name]) != tensor_digest(tensor):
            raise BaseMismatchError(
                f"{folder.path} holds a copy of {name}, shape {tuple(tensor.shape)}, that differs from the base: its "
                f"vocabulary was resized or retrained. Change the base in the same way first."
            )


def check_base(root: nn.Module, folder: AdapterFolder) -> None:
    """Raise `BaseMismatchError` if the adapter was trained on other weights; warn if the folder does not say."""
    if not folder.manifest.is_present:
        warnings.warn(
            f"{folder.path} has no {MANIFEST_FILE}: names and shapes fit, but whether it was trained on these base "
            f"weights cannot be checked.",
            stacklevel=3,
        )
        return
    digests = base_digests(root, folder.trained)
    expected, found = folder.manifest.base_fingerprint, fingerprint(digests)
    if found != expected:
        layers = folder.manifest.layers
        other = [name for name, entry in layers.items() if digests.get(entry.parameter) != entry.base]
        where = f"{len(other)} of its {len(layers)} layers have other weights here" if other else "its layers agree"
        raise BaseMismatchError(
            f"{folder.path} was trained on a base with fingerprint {expected}, this one has {found}: "
            f"{where}{f' ({first_five(other)})' if other else ''}. Load the right base, or pass allow_other_base=True."
        )
