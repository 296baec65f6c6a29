"""Networks that were frozen as copies of another one: teachers and target networks, which follow it by averages.

BYOL, DINO, Mean Teacher, MoCo and DQN keep such a copy, and update it by ``zip(student.parameters(),
teacher.parameters())``. So the copy is adapted in the same layers, with factors that are frozen and start as those of
the network it copies: the pairs stay right, and both compute what they computed before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.changed_tensors import record_tensors
from lightning_lora.lora.layers.adapted import join, learning_layers, lora_layers
from lightning_lora.lora.layers.base import MAGNITUDE, LoRALayer
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import full_tensor
from lightning_lora.lora.targets.selection import is_inside

Signature = tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]]


def frozen_copies(root: nn.Module) -> dict[str, str]:
    """Name of every frozen copy in ``root`` to the name of the module it is a copy of.

    A copy is a module of which all parameters are frozen while another module of the same class, with parameters of
    the same names and shapes, is not. A body that is frozen under a head that trains is no copy of anything. Single
    layers inside a frozen module are not compared: equal layers are found in many places.

    Call this before an injection freezes everything.
    """
    modules = {plain_name(name): module for name, module in root.named_modules()}
    if len({parameter.requires_grad for parameter in root.parameters() if parameter.is_floating_point()}) < 2:
        return {}
    trained: dict[Signature, str] = {}
    for name, module in modules.items():
        if _is_frozen(module) is False:
            trained.setdefault(_signature(module), name)
    return dict(_copies("", root, trained, is_top=True))


def _copies(name: str, module: nn.Module, trained: Mapping[Signature, str], is_top: bool) -> list[tuple[str, str]]:
    """The outermost copies in ``module``; ``is_top`` says that the module around it is not frozen."""
    is_frozen = _is_frozen(module)
    if is_frozen is None:
        return []
    has_children = any(True for _ in module.children())
    if is_frozen and (is_top or has_children) and (original := trained.get(_signature(module))) is not None:
        return [(name, original)]
    children = [(plain_name(join(name, leaf)), child) for leaf, child in module.named_children()]
    return [found for leaf, child in children for found in _copies(leaf, child, trained, not is_frozen)]


def _is_frozen(module: nn.Module) -> bool | None:
    """Whether all parameters of ``module`` are frozen; None if it has none that could train."""
    trainable = [parameter.requires_grad for parameter in module.parameters() if parameter.is_floating_point()]
    return not any(trainable) if trainable else None


def _signature(module: nn.Module) -> Signature:
    return type(module), tuple((plain_name(name), tuple(p.shape)) for name, p in module.named_parameters())


def original_name(name: str, copies: Mapping[str, str]) -> str | None:
    """The name of the module that the module called ``name`` is a copy of; None if it is in no copy."""
    for copy, original in copies.items():
        if is_inside(name, (copy,)):
            return join(original, name[len(copy) :].lstrip(".")).rstrip(".")
    return None


def frozen_layers(root: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of the named layers are frozen, where not all of ``root`` is."""
    frozen = [name for name in names if _is_frozen(root.get_submodule(name))]
    return frozen if _is_frozen(root) is False else []


@torch.no_grad()
def hold_copies(root: nn.Module, copies: Mapping[str, str]) -> dict[str, str]:
    """Freeze the adapters of ``copies``, with the factors of the layers that they are copies of.

    If every adapted layer of ``root`` is in a copy, nothing is done: then these are what the user wants to train.

    Returns:
        Name of each layer with a frozen adapter to the name of the layer that it copies.
    """
    layers = lora_layers(root)
    originals = {name: original_name(name, copies) for name in layers}
    held = {name: original for name, original in originals.items() if original is not None}
    if len(held) == len(layers):
        return {}
    for name, original in held.items():
        layers[name].lora_held = True
        for factor in layers[name].lora_factors().values():
            factor.requires_grad_(False)
        if original in layers:
            _copy_factors(layers[original], layers[name])
    return held


def _copy_factors(source: LoRALayer, target: LoRALayer) -> None:
    factors = source.lora_factors()
    for name, factor in target.lora_factors().items():
        # A magnitude is that of the copy's own weights, which may differ from the original's.
        if name in factors and factors[name].shape == factor.shape and not factor.is_meta and name != MAGNITUDE:
            factor.copy_(factors[name])


def equal_copies(root: nn.Module, layers: Mapping[str, LoRALayer]) -> list[tuple[LoRALayer, LoRALayer]]:
    """Frozen adapted layers of ``root`` with the factors of one of ``layers``, which they copy, each with that one.

    A collective where factors are sharded.
    """
    copies = frozen_copies(root)
    held = {name: layer for name, layer in lora_layers(root).items() if layer.lora_held}
    pairs = [(layer, layers.get(original_name(name, copies) or name)) for name, layer in held.items()]
    return [(copy, original) for copy, original in pairs if original is not None and _has_factors_of(copy, original)]


def _has_factors_of(one: LoRALayer, other: LoRALayer) -> bool:
    pairs = zip(one.lora_pair(), other.lora_pair(), strict=True)
    return all(torch.equal(full_tensor(own), full_tensor(factor)) for own, factor in pairs)


def adopt_copies(root: nn.Module) -> list[str]:
    """Accept frozen copies that were made of networks when these had adapters already.

    Returns:
        Lines for the start of a run.
    """
    copies = {
        copy: original
        for copy, original in frozen_copies(root).items()
        if any(is_inside(name, (copy,)) for name in learning_layers(root))
    }
    layers = lora_layers(root)
    inside = [name for name in layers if is_inside(name, copies)]
    if not inside or len(inside) == len(layers):
        return []
    record_tensors(root, copies.keys(), keeps=True)
    for name in inside:
        layers[name].lora_held = True
    return notes_on_frozen(root, copies, inside, ())


def notes_on_frozen(
    root: nn.Module, copies: Mapping[str, str], held: Collection[str], frozen: Collection[str]
) -> list[str]:
    """Lines for the start of a run.

    Args:
        copies: What `frozen_copies` found before.
        frozen: The adapted layers that were frozen before.
    """
    notes = []
    named = [f"{copy}, unlike {copies[copy]}" for copy in copies if any(is_inside(name, (copy,)) for name in held)]
    if named:
        notes.append(f"{len(held)} adapters stay frozen, and are saved, in what was frozen before: {first_five(named)}")
    training = [name for name in frozen if name not in held]
    if training:
        top, _, rest = training[0].partition(".")
        notes.append(
            f"adapters train in {len(training)} layers that were frozen before: {first_five(training)}; "
            f'exclude=["{top}{".*" if rest else ""}"] leaves such layers alone'
        )
    return notes + notes_on_unmatched(root, copies)


def notes_on_unmatched(root: nn.Module, copies: Mapping[str, str]) -> list[str]:
    """A line for the start of a run if a copy is not adapted in the same layers as its original."""
    layers = lora_layers(root)

    def inside(top: str) -> set[str]:
        return {name[len(top) :] for name in layers if is_inside(name, (top,))}

    return [
        f"{copy} is a frozen copy of {original} but not adapted in the same layers: an average over zip(parameters()) "
        f"would mix other tensors. Pair them by name, or adapt both alike"
        for copy, original in copies.items()
        if inside(copy) != inside(original)
    ][:1]
