"""Magnitudes (DoRA) in PEFT's files: their shapes there, and the checks that they are complete.

PEFT stores that of a convolution as ``(1, out, 1, ...)``, and all others as ``(out,)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter.manifest import Manifest
from lightning_lora.files.adapter.peft_format import MAGNITUDE_LEAF, PREFIX
from lightning_lora.files.adapter.peft_layers import PEFTLayout, difference
from lightning_lora.lora.layers.adapted import factor_owner, join, other_names
from lightning_lora.lora.layers.base import MAGNITUDE, LoRALayer
from lightning_lora.lora.layers.conv import LoRAConv
from lightning_lora.lora.layers.dora import DoRALayer
from lightning_lora.lora.shards import is_dtensor


def stored_magnitudes(layout: PEFTLayout, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The magnitudes among ``factors`` by PEFT's names and in its shapes, once for each name of a layer."""
    owners = {id(layer): name for name, (layer, _) in layout.weights.items()}
    named = {name: layer for name, (layer, _) in layout.weights.items()} | other_names(layout.root)
    stored = {}
    for name, layer in named.items():
        magnitude = factors.get(join(owners[id(layer)], MAGNITUDE)) if id(layer) in owners else None
        if magnitude is not None:
            if isinstance(layer, LoRAConv) and difference(layer) is None:
                magnitude = magnitude.reshape(1, -1, *[1] * len(layer.kernel_size))
            stored[f"{PREFIX}{join(name, MAGNITUDE_LEAF)}"] = magnitude.clone()
    return stored


def magnitude_change(layer: LoRALayer) -> float | None:
    """How far training has moved the magnitudes of a layer; None if it has none, or its base is sharded."""
    return layer.magnitude_change() if isinstance(layer, DoRALayer) and not is_dtensor(layer.weight) else None


def magnitudes_of(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapted weight to its magnitude, for those that have one."""
    return {name: tensor for key, tensor in factors.items() for name, leaf in [factor_owner(key)] if leaf == MAGNITUDE}


def read_magnitudes(
    factors: Mapping[str, Tensor], peft: Mapping[str, Any], manifest: Manifest, where: Path
) -> dict[str, Tensor]:
    """``factors`` with magnitudes of ``(out,)``, after checking that every layer has one, or none does, as configured.

    Raises:
        AdapterFileError: Naming the first five layers.
    """
    expected, dora = bool(peft.get("use_dora")), manifest.config.get("dora", False)
    if manifest.is_present and expected != dora:
        raise AdapterFolderError(f"{where.parent}: manifest and config disagree: use_dora is {expected}, dora {dora}.")
    _check_complete(expected, {factor_owner(key)[0] for key in factors}, magnitudes_of(factors), where)
    return {key: tensor.flatten() if factor_owner(key)[1] == MAGNITUDE else tensor for key, tensor in factors.items()}


def _check_complete(expected: bool, names: Collection[str], found: Collection[str], where: Path) -> None:
    lacking = sorted(set(names) - set(found)) if expected else []
    if lacking:
        raise AdapterFolderError(
            f"{where} has use_dora in its config, but no {MAGNITUDE_LEAF} of {len(lacking)} layers: "
            f"{first_five(lacking)}."
        )
    if found and not expected:
        raise AdapterFolderError(
            f"{where} holds magnitudes of {len(found)} layers ({first_five(sorted(found))}), which its config does not "
            f"use: set use_dora to true, or take the tensors out."
        )


def check_pair(name: str, magnitude: Tensor | None, B: Tensor, where: Path) -> None:
    """Refuse a magnitude that has not one number for each output feature of its weight.

    Raises:
        AdapterFileError: If it has not.
    """
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise AdapterFolderError(
            f"{where}: the magnitude of {name!r} is {tuple(magnitude.shape)}, and its weight has {B.shape[0]} output "
            f"features."
        )
