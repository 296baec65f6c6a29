"""Checks that an adapter folder fits a module: layers, shapes, scales and base weights. Nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError, BaseMismatchError, first_five
from lightning_lora.files.adapter import peft_experts
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE, Manifest, WeightEntry
from lightning_lora.files.adapter.peft_checks import check_complete, check_one_name, check_same_function
from lightning_lora.lora.adapter import check_tensors
from lightning_lora.lora.fingerprint import WeightPrint, base_prints, fingerprint, other_weights
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters, join
from lightning_lora.lora.layers.base import AdapterSpec, is_factor
from lightning_lora.lora.layers.dora import with_magnitude
from lightning_lora.lora.layers.registry import kind_of_named
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.adaptable import refused_layers
from lightning_lora.lora.targets.resolve import Target, without_dropout
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.lora.targets.shared_weights import TiedWeights, every_name, take_out, weight_owners

_RIGHT_SETTINGS = (
    "Inject with the adapter's settings, or take the adapters off with remove_lora(module) and load into the plain "
    "module."
)


def model_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, without adapter factors; shared ones come under each of their names."""
    for prefix, module in root.named_modules(remove_duplicate=False):
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
        raise AdapterFolderError(
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
        check_same_function({name: modules[layer] for name, (layer, _) in owners.items()}, folder)
        check_one_name(root, [layer for layer, _ in owners.values()], folder)
    present = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(root).items()}
    if present:
        check_complete(modules, folder)
        _check_ranks(present, folder)
        check_tensors(factor_parameters(root), folder.factors)
        _check_scales(present, folder)
        return [], _tied(root, {}, folder)
    targets = _targets(root, modules, owners, folder)
    check_complete(modules, folder)
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
        raise AdapterFolderError(
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
    problems, dora = [], " with a magnitude (DoRA)" if folder.config.dora else ""
    for name, (layer, parameter) in owners.items():
        module = modules[layer]
        kind = kind_of_named(module)
        if kind is not None and folder.config.dora:
            kind = with_magnitude(kind)
        if kind is None:
            problems.append(f"{name} is a {type(module).__name__}, which cannot be adapted{dora}")
        elif layer in refused:
            problems.append(f"{name} cannot be adapted: {refused[layer]}")
        elif shapes[name] != (shape := kind.weights(module)[parameter]):
            problems.append(f"{name} maps {shape[:2]}, the adapter {shapes[name][:2]}")
        else:
            target = targets.setdefault(layer, Target(layer, module, kind, {}))
            target.specs[parameter] = folder.spec(name, roles[layer])
    if problems:
        raise AdapterFolderError(
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
                if folder.config.dora:
                    raise AdapterFolderError(f"{folder.path}: {name} and {others[0]} cannot share magnitudes (DoRA).")
                followers |= dict.fromkeys(others, name)
            elif not following.isdisjoint(others):
                raise AdapterFolderError(
                    f"{folder.path} does not fit this module: {name} and {first_five(sorted(following))} were one "
                    f"layer where it was trained, as resize_token_embeddings makes them in some models, and are "
                    f"several here. Load the base that was not resized, and resize it in memory."
                )
            elif others:
                untied.append((target.module, parameter))
                sharing.remove(join(name, parameter))
    modules = {plain_name(name): module for name, module in root.named_modules()}
    for sharing in owners.values():
        if not trains_as_one(sharing, folder):
            untied += take_out(sharing, [name for name in sharing if name in folder.trained], modules)
    return TiedWeights(tuple(untied), followers)


def trains_as_one(sharing: Collection[str], folder: AdapterFolder) -> bool:
    """Whether a weight that is trained in full stays shared: by all its owners, with one value, and not untied there.

    Args:
        sharing: Names of the parameters that are one in the base.
    """
    if folder.manifest.is_present:
        stays_tied = folder.config.tied_weights != "untie"
    else:
        stays_tied = bool(folder.peft.get("ensure_weight_tying"))
    tensors = [folder.trained.get(name) for name in sharing]
    return stays_tied and all(
        tensor is not None and tensors[0] is not None and torch.equal(tensor, tensors[0]) for tensor in tensors
    )


def _check_ranks(present: Mapping[str, AdapterSpec], folder: AdapterFolder) -> None:
    """Refuse a module that is adapted at another rank already."""
    wrong = [
        f"{name} has rank {spec.rank}, the adapter {folder.ranks[name]}"
        for name, spec in present.items()
        if name in folder.ranks and spec.rank != folder.ranks[name]
    ]
    if wrong:
        raise AdapterFolderError(
            f"{folder.path} does not fit this module, which is adapted at another rank already: {first_five(wrong)}. "
            f"{_RIGHT_SETTINGS}"
        )


def _check_scales(present: Mapping[str, AdapterSpec], folder: AdapterFolder) -> None:
    """Refuse a module adapted with another alpha or scaling, where the tensors would be another function."""
    wrong = [
        f"{name} has {spec.scale:g}, the adapter {folder.spec(name).scale:g}"
        for name, spec in present.items()
        if spec.scale != folder.spec(name).scale
    ]
    if wrong:
        raise AdapterFolderError(
            f"{folder.path} does not fit this module: {len(wrong)} of {len(present)} layers were adapted with another "
            f"scale, alpha / rank: {first_five(wrong)}. {_RIGHT_SETTINGS}"
        )


def trained_tensors(root: nn.Module, folder: AdapterFolder) -> dict[str, Tensor]:
    """The tensors of ``root`` that the folder replaces, by name: those of modules trained in full.

    Raises:
        AdapterFileError: If ``root`` lacks some of them, or they have other shapes.
    """
    found = {name: tensor for name, tensor in model_tensors(root) if name in folder.trained}
    missing = [name for name in folder.trained if name not in found]
    if missing:
        raise AdapterFolderError(
            f"{folder.path} does not fit this module: it holds {len(missing)} tensors of modules trained in full that "
            f"{type(root).__name__} does not have ({first_five(missing)}). Load it into the kind of model it was "
            f"trained on."
        )
    # Observers and caches are empty until they have seen something.
    empty = {name for name, tensor in found.items() if name in folder.manifest.moved and not tensor.numel()}
    check_tensors({name: folder.trained[name] if name in empty else own for name, own in found.items()}, folder.trained)
    return found


def check_base(root: nn.Module, folder: AdapterFolder, restored: Mapping[str, Tensor]) -> None:
    """Raise `BaseMismatchError` if the adapter was trained on other weights; warn if the folder does not say.

    Args:
        restored: The weights of ``root`` that the folder replaces by its own (`check_copies`).
    """
    if not folder.manifest.is_present:
        warnings.warn(
            f"{folder.path} has no {MANIFEST_FILE}: names and shapes fit, but whether it was trained on these base "
            f"weights cannot be checked.",
            stacklevel=3,
        )
        return
    manifest, prints = folder.manifest, base_prints(root, folder.trained.keys() | every_name(root, restored))
    expected, found = manifest.base_fingerprint, fingerprint(prints)
    differing = other_weights(manifest.base, prints) if manifest.base else []
    if found == expected or (manifest.base and not differing):
        return
    layers = manifest.layers
    other = [name for name, entry in layers.items() if not _is_base_of(prints.get(entry.parameter), entry, manifest)]
    where = f"{len(other)} of its {len(layers)} layers have other weights here" if other else "its layers agree"
    named = f" {len(differing)} of {len(prints)} frozen parameters differ: {first_five(sorted(differing))}."
    raise BaseMismatchError(
        f"{folder.path} was trained on a base with fingerprint {expected}, this one has {found}: "
        f"{where}{f' ({first_five(other)})' if other else ''}.{named if differing else ''} Load the right base, or "
        f"pass allow_other_base=True. Random weights, as of a new head, differ in every process: name such a module in "
        f"trainable, or seed it."
    )


def _is_base_of(found: WeightPrint | None, entry: WeightEntry, manifest: Manifest) -> bool:
    """Whether a parameter is the weight that an adapted layer was trained on."""
    if found is None:
        return entry.base is None
    expected = manifest.base.get(entry.parameter)
    return found.digest == entry.base or (expected is not None and expected.agrees(found))
