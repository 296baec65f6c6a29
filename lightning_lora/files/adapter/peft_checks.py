"""What only our manifest tells for sure: checks of folders that PEFT has written against the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter import peft_layers
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.peft_patterns import TargetedNames
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.layers.conv import LoRAConv
from lightning_lora.lora.layers.registry import adapter_kind, kind_of_named
from lightning_lora.lora.patterns import plain_name


def check_same_function(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Refuse convolutions of which PEFT trained another function than an update of their weights."""
    convolutions = {name: module for name, module in modules.items() if adapter_kind(module) is LoRAConv}
    other = [
        f"{name} ({reason})" for name, module in convolutions.items() if (reason := peft_layers.difference(module))
    ]
    if other:
        raise AdapterFolderError(
            f"{folder.path} was trained by PEFT, which ignores groups, dilation and padding mode of convolutions: it "
            f"means another function of {first_five(other)} than an update of their weights. Train it here, or merge "
            f"it in PEFT."
        )


def check_one_name(root: nn.Module, layers: Collection[str], folder: AdapterFolder) -> None:
    """Refuse a layer that ``root`` holds in several places: PEFT changes only the place whose name it stores."""
    places: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(plain_name(name))
    changed = {*layers, *(name.rpartition(".")[0] for name in folder.trained)}
    several = [names for names in places.values() if len(names) > 1 and not changed.isdisjoint(names)]
    if several:
        raise AdapterFolderError(
            f"{folder.path} was trained by PEFT, which changes {several[0][0]} but not {first_five(several[0][1:])}, "
            f"and these are one layer here, as resize_token_embeddings makes them in some models. Save the resized "
            f"model, and load it with from_pretrained first."
        )


def check_complete(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
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
        raise AdapterFolderError(
            f"{folder.path} does not fit this module: its config targets {len(lost)} layers that its tensors leave "
            f"out ({first_five(lost)})."
        )
    untrained = _untrained(modules, folder)
    if untrained:
        raise AdapterFolderError(
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
