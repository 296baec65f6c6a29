"""PEFT's layout of adapted layers, above all of convolutions and ``nn.MultiheadAttention``.

A convolution's factors are convolutions themselves in PEFT: ``lora_A.weight`` is ``(rank, in, *kernel)`` and
``lora_B.weight`` is ``(out, rank, 1, ...)``. PEFT ignores dilation and padding mode, and with groups it computes
another function.

PEFT always adapts both projections of an attention, with one rank and one alpha. The factors of the output projection
lie under ``<attention>.base_layer.out_proj``. A projection that is not adapted here is written as zeros. Up to 0.21,
PEFT adds the update of the output projection twice (https://github.com/huggingface/peft/pull/3774), so ``B`` is written
halved and read doubled. This is exact, and both compute the same.

A layer for which PEFT would compute another function is stored in a shape that PEFT refuses.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter import peft_experts
from lightning_lora.files.adapter.manifest import Manifest
from lightning_lora.files.adapter.peft_format import LINEAR_LEAVES, PREFIX, FactorPair, factor_leaves
from lightning_lora.files.adapter.peft_patterns import PatternTable
from lightning_lora.lora.layers.adapted import adapted_weights, factor_name, following_layers, join, other_names
from lightning_lora.lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.lora.layers.base import FACTORS, LoRALayer
from lightning_lora.lora.layers.class_swap import base_type
from lightning_lora.lora.layers.conv import LoRAConv, LoRAConvolution, LoRAConvTranspose
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.matrices import LoRAMatrices
from lightning_lora.lora.layers.recurrent import LoRARecurrent
from lightning_lora.lora.layers.shared_factors import own_factors
from lightning_lora.lora.patterns import plain_name

# PEFT adds the update of an output projection twice up to this version.
_LAST_TWICE = (0, 21)
_NESTED = re.compile(r"(^|\.)base_layer\.out_proj$")


class PEFTLayout:
    """How PEFT names and stores the adapted weights of a module.

    Attributes:
        weights: Adapted weight to its layer and the name of its parameter there.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.weights = adapted_weights(root)
        # PEFT can adapt only attention layers with one packed input projection.
        self._attentions = {
            plain_name(name): module
            for name, module in root.named_modules()
            if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim
        }

    def target(self, name: str) -> str:
        """The module that PEFT must be told to adapt for an adapted layer; for an output projection the attention."""
        attention = _attention_of(name)
        return attention if attention is not None and attention in self._attentions else name

    def tensors(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors by PEFT's names and in its layouts; weights that it cannot express keep our names.

        PEFT shares no factors: a layer that follows another one gets copies.
        """
        tensors = {
            join(name, leaf): tensor.contiguous()
            for name, layer in (following_layers(self.root) | other_names(self.root)).items()
            if hasattr(layer, "lora_A")
            for leaf, tensor in zip(factor_leaves(layer), own_factors(layer), strict=True)
        }
        expert_modules = peft_experts.modules_of(self.weights)
        for name, (layer, weight) in self.weights.items():
            A, B = (factors[factor_name(name, layer, weight, factor)] for factor in FACTORS)
            if isinstance(layer, LoRAFusedExperts):
                module, leaves = expert_modules[name], LINEAR_LEAVES
                A, B = peft_experts.stack(A, B, layer, weight)
            elif layer.lora_prefix(weight):
                module, leaves = name.removesuffix(f".{weight}"), tuple(f"{weight}_{factor}" for factor in FACTORS)
            else:
                module, leaves = self._module(name), factor_leaves(layer)
                A, B = self._stored(name, layer, A, B)
            tensors |= {join(module, leaves[0]): A, join(module, leaves[1]): B}
        return {PREFIX + name: tensor for name, tensor in (tensors | self._fillers(factors)).items()}

    def storage(self, name: str) -> dict[str, Any]:
        """The fields of the manifest's entry that tell how the factors of a weight are stored."""
        layer, weight = self.weights[name]
        if isinstance(layer, LoRAFusedExperts):
            return peft_experts.storage(layer, weight)
        if isinstance(layer, LoRAConvTranspose):
            return {"stored": "transposed kernel matrix"}
        if isinstance(layer, LoRAConvolution):
            return {"stored": "kernel" if difference(layer) is None else "kernel matrix"}
        if self.target(name) == name:
            return {}
        return {"stored": "apart" if self._is_apart(name) else "half"}

    def warn_of_differences(self) -> None:
        """Warn of layers that PEFT cannot load, and of those that a later PEFT might load as another function."""
        reasons = self._inexpressible()
        if reasons:
            named = first_five([f"{name} ({reason})" for name, reason in reasons.items()])
            warnings.warn(
                f"PEFT cannot load this adapter: it has no equal for {len(reasons)} of its layers ({named}) and will "
                f"report an error. load_adapter loads it; a merged model loads everywhere.",
                stacklevel=3,
            )
        halved = [name for name in self.weights if self.target(name) != name and name not in reasons]
        if halved and not reasons:
            warnings.warn(
                f"PEFT up to 0.21 adds the update of {first_five(halved)} twice (huggingface/peft pull request 3774), "
                f"so it is written halved: equal there, half in a PEFT that adds it once. load_adapter is not "
                f"concerned.",
                stacklevel=3,
            )

    def _module(self, name: str) -> str:
        """PEFT's name of the module that holds the factors of an adapted weight."""
        attention = self.target(name)
        return name if attention == name else join(attention, "base_layer.out_proj")

    def _stored(self, name: str, layer: LoRALayer, A: Tensor, B: Tensor) -> FactorPair:
        """The factors of one weight in the shape they are stored in."""
        if isinstance(layer, LoRAConv) and difference(layer) is None:
            ones = [1] * len(layer.kernel_size)
            return A.reshape(A.shape[0], -1, *layer.kernel_size), B.reshape(*B.shape, *ones)
        if self._is_apart(name):
            # One axis more than PEFT expects.
            return A[None], B[None]
        return (A, B / 2) if self.target(name) != name else (A, B)

    def _fillers(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero factors, by PEFT's names, of the projections that PEFT adapts and this adapter does not."""
        zeros = {}
        for name, attention in self._attentions.items():
            projection = join(name, "out_proj")
            present = [weight for weight in (name, projection) if weight in self.weights]
            if len(present) != 1:
                continue
            A = factors[join(present[0], "lora_A")]
            width, rank = attention.embed_dim, A.shape[0]
            absent, num_out = (name, 3 * width) if present[0] == projection else (projection, width)
            for leaf, shape in zip(LINEAR_LEAVES, ((rank, width), (num_out, rank)), strict=True):
                zeros[join(self._module(absent), leaf)] = torch.zeros(shape, dtype=A.dtype)
        return zeros

    def _inexpressible(self) -> dict[str, str]:
        """Adapted weights that PEFT cannot load, and why."""
        reasons = {}
        for name, (layer, weight) in self.weights.items():
            if isinstance(layer, LoRAConv):
                reasons[name] = difference(layer)
            elif isinstance(layer, (LoRAConvTranspose, LoRARecurrent)):
                reasons[name] = base_type(type(layer)).__name__
            elif isinstance(layer, LoRAMultiheadAttention) and not layer._qkv_same_embed_dim:
                reasons[name] = "separate projections"
            elif isinstance(layer, LoRAMatrices) and layer.lora_prefix(weight):
                reasons[name] = f"one of several matrices of {base_type(type(layer)).__name__}"
            elif self._is_apart(name):
                reasons[name] = "not the rank and alpha of its attention"
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _is_apart(self, name: str) -> bool:
        """Whether an output projection has another rank or alpha than its attention."""
        attention = self.target(name)
        if attention == name or attention not in self.weights:
            return False
        own, theirs = self.weights[name][0].lora_spec, self.weights[attention][0].lora_spec
        return (own.rank, own.scale) != (theirs.rank, theirs.scale)


def difference(module: Any) -> str | None:
    """The property of a convolution that PEFT ignores, so that it computes another function; None if there is none."""
    if module.groups > 1:
        return f"groups={module.groups}"
    if any(step != 1 for step in module.dilation):
        return f"dilation={module.dilation}"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return None if LoRAConv.computes_as_torch(module) else "a forward of its own"


def from_peft(
    stored: Mapping[str, Tensor], manifest: Manifest, version: str
) -> tuple[dict[str, Tensor], Collection[str]]:
    """Turn stored factors into matrices under our names; factors of fused experts stay as they are.

    Args:
        manifest: The manifest. Without one the file is PEFT's, where more than two axes are those of a kernel.

    Returns:
        The factors, and the names of the output projections among them.
    """
    factors, projections = _renamed_projections(stored)
    if manifest.is_present:
        factors = _without_fillers(factors, manifest)
        layouts = {name: entry.stored for name, entry in manifest.layers.items()}
    else:
        _check_ungrouped(factors)
        layouts = dict.fromkeys(projections, "half" if _adds_twice(version, projections) else None)

    def matrix(key: str, tensor: Tensor) -> Tensor:
        name, _, leaf = key.rpartition(".")
        layout = layouts.get(name)
        if leaf in FACTORS and tensor.ndim > 2 and (layout == "kernel" or not manifest.is_present):
            return tensor.flatten(1)
        if layout == "apart" and tensor.ndim == 3:
            return tensor[0]
        return tensor * 2 if layout == "half" and leaf == "lora_B" else tensor

    return {key: matrix(key, tensor) for key, tensor in factors.items()}, projections


def _check_ungrouped(factors: Mapping[str, Tensor]) -> None:
    """Refuse kernels that PEFT trained for groups: its ``A`` mixes all channels, which no weight with groups does."""
    for key, A in factors.items():
        name, _, leaf = key.rpartition(".")
        B = factors.get(join(name, "lora_B"))
        if leaf == "lora_A" and A.ndim > 2 and B is not None and B.ndim == A.ndim and B.shape[1] < A.shape[0]:
            raise AdapterFolderError(
                f"the adapter of {name} was trained by PEFT on a convolution with groups={A.shape[0] // B.shape[1]}, "
                f"where it is no update of the weight, and PEFT cannot merge it either. Train it here."
            )


def with_projections(peft: Mapping[str, Any], projections: Collection[str], manifest: Manifest) -> dict[str, Any]:
    """PEFT's settings with rank and alpha of the output projections, which PEFT takes from their attention."""
    extended = dict(peft)
    for option, pattern, known in (
        ("r", "rank_pattern", manifest.ranks),
        ("lora_alpha", "alpha_pattern", manifest.alphas),
    ):
        patterns = peft.get(pattern) or {}
        table = PatternTable(patterns)
        own = {
            f"^{re.escape(name)}": known.get(name, table.value(_attention_of(name) or "", peft.get(option, 8)))
            for name in projections
        }
        extended[pattern] = own | patterns
    return extended


def _attention_of(name: str) -> str | None:
    """The attention whose output projection may have this name, or None."""
    attention, _, leaf = name.rpartition(".")
    return attention if leaf == "out_proj" else None


def _renamed_projections(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Collection[str]]:
    """Factors with the output projections under our names, and these names."""
    renamed, names = {}, {}
    for key, tensor in stored.items():
        module, _, factor = key.rpartition(".")
        if _NESTED.search(module):
            module = _NESTED.sub(r"\1out_proj", module)
            names[module] = None
        renamed[join(module, factor)] = tensor
    return renamed, names


def _without_fillers(factors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Factors without the zeros that were written for projections which are not adapted."""

    def is_filler(key: str) -> bool:
        name = key.rpartition(".")[0]
        layers, attention = manifest.layers, _attention_of(name)
        other = attention if attention in layers else join(name, "out_proj")
        return name not in layers and other in layers and not bool(factors[key].any())

    return {key: tensor for key, tensor in factors.items() if not is_filler(key)}


def _adds_twice(version: str, projections: Collection[str]) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if projections and numbers > _LAST_TWICE:
        warnings.warn(
            f"PEFT up to 0.21 adds the update of {first_five(sorted(projections))} twice; this adapter was written by "
            f"{version}, which is taken to add it once. Compare outputs before relying on it.",
            stacklevel=4,
        )
    return numbers <= _LAST_TWICE
