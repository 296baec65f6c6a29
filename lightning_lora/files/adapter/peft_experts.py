"""PEFT's layout of targeted parameters, such as fused experts: one pair of matrices for all experts of a parameter.

``lora_A.weight`` is ``(experts * rank, in)``, expert by expert; ``lora_B.weight`` is ``(out, rank * experts)``, rank by
rank. Several parameters of one layer are nested: the one registered first lies under the most ``base_layer``. What PEFT
calls ``in`` and ``out`` depends on how it takes the parameter to be stored. This changed between versions, and is wrong
for layers that store ``(experts, in, out)`` without an attribute ``is_transposed``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError
from lightning_lora.files.adapter.manifest import Manifest, WeightEntry
from lightning_lora.files.adapter.peft_format import FactorPair
from lightning_lora.files.adapter.peft_patterns import TargetedNames, is_listed
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import LoRALayer, WeightShape
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRAConv1D

# Layers whose weight is stored (in, out).
_STORED_TRANSPOSED = (LoRAEmbedding, LoRAConv1D)


def module_names(layer: str, num_weights: int) -> list[str]:
    """PEFT's module names of the adapted weights of one layer, in order of registration.

    >>> module_names("mlp.experts", 2)
    ['mlp.experts.base_layer', 'mlp.experts']
    """
    return [layer + ".base_layer" * depth for depth in reversed(range(num_weights))]


def modules_of(weights: Mapping[str, tuple[LoRALayer, str]]) -> dict[str, str]:
    """Adapted weight of fused experts to PEFT's module name."""
    layers: dict[str, list[str]] = {}
    for name, (layer, _) in weights.items():
        if isinstance(layer, LoRAFusedExperts):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module
        for layer, names in layers.items()
        for name, module in zip(names, module_names(layer, len(names)), strict=True)
    }


def storage(layer: LoRAFusedExperts, weight: str) -> dict[str, Any]:
    """The fields of the manifest's entry that tell how the factors of a weight are stored."""
    A, B = layer.lora_pair(weight)
    num_experts = layer.weights(layer)[weight].num_experts
    shared = "lora_A" if len(A) < num_experts else "lora_B" if len(B) < num_experts else None
    return {"experts": num_experts, "swapped": _is_swapped(layer), "shared": shared}


def _is_swapped(layer: LoRAFusedExperts) -> bool:
    """Whether PEFT since 0.19.1 takes this layer's inputs for its outputs."""
    return layer.transposed(layer) != getattr(layer, "is_transposed", False)


def stack(A: Tensor, B: Tensor, layer: LoRAFusedExperts, weight: str) -> FactorPair:
    """Stack ``A`` ``(E or 1, r, in)`` and ``B`` ``(E or 1, out, r)`` into PEFT's two matrices."""
    num_experts = layer.weights(layer)[weight].num_experts
    A, B = A.expand(num_experts, -1, -1), B.expand(num_experts, -1, -1)
    if _is_swapped(layer):
        A, B = B.mT, A.mT
    return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def unstack(A: Tensor, B: Tensor, num_experts: int, swapped: bool) -> FactorPair:
    """Take PEFT's two matrices apart into ``(E, r, in)`` and ``(E, out, r)``: the inverse of `stack`."""
    A = A.reshape(num_experts, -1, A.shape[-1])
    B = B.reshape(B.shape[0], -1, num_experts).permute(2, 0, 1)
    return (B.mT.contiguous(), A.mT.contiguous()) if swapped else (A, B.contiguous())


def split_stacked(
    factors: Mapping[str, Tensor], projections: Collection[str], manifest: Manifest, peft: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, FactorPair]]:
    """Split factors into those of layers and those of targeted parameters, the latter by PEFT's module name.

    The manifest names the fused experts. Without one, factors of parameters are among those that ``target_modules``
    does not explain.

    Args:
        projections: Our names of the output projections of attention, which PEFT takes for parts of the attention.
    """
    if not frozenset(peft.get("target_parameters") or ()):
        return dict(factors), {}
    names = {name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")}
    if manifest.is_present:
        fused = _fused(manifest)
        stacked = {name for name in names if name.partition(".base_layer")[0] in fused}
    else:
        targeted = TargetedNames(peft)
        others = names - set(projections)
        stacked = {name for name in others if name.endswith(".base_layer") or name not in targeted}
    single = dict(factors)
    return single, {
        name: (single.pop(f"{name}.lora_A"), single.pop(f"{name}.lora_B"))
        for name in sorted(stacked)
        if f"{name}.lora_B" in factors
    }


def unstack_by_manifest(stacked: Mapping[str, FactorPair], manifest: Manifest, where: str) -> dict[str, Tensor]:
    """Factors of fused experts by our names, as the manifest describes them; empty without a manifest."""
    factors = {}
    for layer, weights in _fused(manifest).items():
        for module, (weight, entry) in zip(module_names(layer, len(weights)), weights.items(), strict=True):
            if module not in stacked:
                raise AdapterFolderError(f"{where} lacks the factors of {layer}.{weight}, which the manifest lists.")
            A, B = unstack(*stacked[module], entry.experts, entry.swapped)
            factors[join(layer, f"{weight}_lora_A")] = _first(A, where, weight) if entry.shared == "lora_A" else A
            factors[join(layer, f"{weight}_lora_B")] = _first(B, where, weight) if entry.shared == "lora_B" else B
    return factors


def _fused(manifest: Manifest) -> dict[str, dict[str, WeightEntry]]:
    """Layer of fused experts to the entries of its weights."""
    layers: dict[str, dict[str, WeightEntry]] = {}
    for name, entry in manifest.layers.items():
        if entry.experts:
            layer, _, weight = name.rpartition(".")
            layers.setdefault(layer, {})[weight] = entry
    return layers


def listed_parameters(peft: Mapping[str, Any], layer: str, module: nn.Module) -> list[str]:
    """The parameters of a layer that ``target_parameters`` names, in the order in which PEFT nests them."""
    listed = frozenset(peft.get("target_parameters") or ())
    return [name for name in module._parameters if is_listed(join(layer, name), listed)] if listed else []


@dataclass(frozen=True)
class Unstacked:
    """Factors of targeted parameters by our names.

    Args:
        factors: The factors.
        keys: Adapted weight to the dotted name of its parameter.
        transposed: Adapted weights that are stored ``(in, out)``, single matrices only.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def add(
        self,
        stacked: Mapping[str, FactorPair],
        peft: Mapping[str, Any],
        layer: str,
        module: nn.Module,
        kind: type[LoRALayer],
    ) -> None:
        """Add those of one layer, from a folder that PEFT wrote.

        Raises:
            AdapterFileError: If factors are missing, or their shapes do not fit the layer.
        """
        weights = listed_parameters(peft, layer, module)
        shapes = kind.weights(module)
        for name, weight in zip(module_names(layer, len(weights)), weights, strict=True):
            parameter, prefix = join(layer, weight), kind.prefix(module, weight)
            if weight not in shapes:
                raise AdapterFolderError(f"the adapter targets {parameter}, which is no weight that can be adapted.")
            if name not in stacked:
                raise AdapterFolderError(
                    f"the adapter targets {parameter}, but has no tensors {name}.lora_A and lora_B."
                )
            own_name = parameter if prefix else layer
            A, B = stacked[name]
            if issubclass(kind, LoRAFusedExperts):
                swapped = _found_swapped(A, B, shapes[weight], module, kind, str(peft.get("peft_version", "")))
                A, B = unstack(A, B, shapes[weight].num_experts, swapped)
            elif issubclass(kind, _STORED_TRANSPOSED):
                # PEFT adds B A to the parameter as it is stored.
                A, B = B.T.contiguous(), A.T.contiguous()
                self.transposed.add(own_name)
            self.keys[own_name] = parameter
            self.factors.update({join(layer, f"{prefix}lora_A"): A, join(layer, f"{prefix}lora_B"): B})


def _found_swapped(
    A: Tensor, B: Tensor, shape: WeightShape, module: nn.Module, kind: type[LoRAFusedExperts], version: str
) -> bool:
    """Whether a file takes inputs for outputs: its shapes tell, or, where both fit, the version that wrote it."""
    found, is_whole = (A.shape[1], B.shape[0]), A.shape[0] % shape.num_experts == 0 and A.shape[0] == B.shape[1]
    straight, crossed = (shape.num_in, shape.num_out), (shape.num_out, shape.num_in)
    fitting = [swapped for swapped, wanted in ((False, straight), (True, crossed)) if is_whole and found == wanted]
    if not fitting:
        raise AdapterFolderError(
            f"the factors {tuple(A.shape)} and {tuple(B.shape)} do not fit {shape.num_experts} experts that map "
            f"{shape.num_in} to {shape.num_out}."
        )
    if len(fitting) == 1:
        return fitting[0]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    marked, transposed = getattr(module, "is_transposed", False), kind.transposed(module)
    if numbers >= (0, 19, 1):
        first_is_middle = marked
    elif numbers >= (0, 19):
        first_is_middle = not marked
    else:
        first_is_middle = True
    # A spans the middle axis of the parameter, which holds the inputs where it is stored transposed.
    return first_is_middle != transposed


def _first(factor: Tensor, where: str, weight: str) -> Tensor:
    """The factor of the first expert, which all experts must share."""
    if not bool((factor == factor[:1]).all()):
        raise AdapterFolderError(f"{where}: the experts of {weight} should share a factor, but theirs differ.")
    return factor[:1].clone()
