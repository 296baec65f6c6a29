"""PEFT's layout of convolutions and of ``nn.MultiheadAttention``, and what PEFT cannot express.

A convolution's factors are convolutions themselves in PEFT: ``lora_A.weight`` ``(rank, in, *kernel)``,
``lora_B.weight`` ``(out, rank, 1, ...)``. It knows no dilation and pads with zeros, and with groups it computes another
function. Attention is always adapted in both its projections, with one rank and one alpha; the output projection's
factors lie under ``<attention>.base_layer.out_proj``. A projection that is not adapted here is written as zeros there.
Up to 0.21 PEFT adds the output projection's update twice (https://github.com/huggingface/peft/pull/3774), so ``B`` is
written halved and read doubled, which is exact: both compute the same.

What PEFT would compute otherwise is stored in a shape that it refuses: an error there, not another function.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import first_five
from lightning_lora.files.adapter.peft_patterns import PatternTable
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.lora.layers.base import FACTORS, LoRALayer
from lightning_lora.lora.layers.class_swap import base_type
from lightning_lora.lora.layers.conv import LoRAConv, LoRAConvolution, LoRAConvTranspose
from lightning_lora.lora.layers.recurrent import LoRARecurrent
from lightning_lora.lora.patterns import plain_name

Pair = tuple[Tensor, Tensor]
Weights = Mapping[str, tuple[LoRALayer, str]]
Attentions = Mapping[str, nn.MultiheadAttention]

# The last PEFT known to add the update of an output projection twice.
_LAST_TWICE = (0, 21)
_NESTED = re.compile(r"(^|\.)base_layer\.out_proj$")


def packed_attentions(root: nn.Module) -> Attentions:
    """The attention layers PEFT can adapt, by name: those with one packed input projection."""
    return {
        plain_name(name): module
        for name, module in root.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim
    }


def target_of(name: str, attentions: Attentions) -> str:
    """The module PEFT must be told to adapt for an adapted layer: the whole attention for its output projection."""
    attention = _parent(name)
    return attention if attention is not None and attention in attentions else name


def module_of(name: str, attentions: Attentions) -> str:
    """PEFT's name of the module that holds the factors of an adapted weight."""
    attention = target_of(name, attentions)
    return name if attention == name else join(attention, "base_layer.out_proj")


def _parent(name: str) -> str | None:
    parent, _, leaf = name.rpartition(".")
    return parent if leaf == "out_proj" else None


def pack(A: Tensor, B: Tensor, name: str, layer: LoRALayer, weights: Weights, attentions: Attentions) -> Pair:
    """Factors of one weight in the shape they are stored in."""
    if isinstance(layer, LoRAConv) and difference(layer) is None:
        ones = [1] * len(layer.kernel_size)
        return A.reshape(A.shape[0], -1, *layer.kernel_size), B.reshape(*B.shape, *ones)
    if _is_apart(name, weights, attentions):
        # One axis more than PEFT expects.
        return A[None], B[None]
    return (A, B / 2) if target_of(name, attentions) != name else (A, B)


def layout(name: str, layer: LoRALayer, weights: Weights, attentions: Attentions) -> dict[str, Any]:
    """What the manifest says of a weight to read its factors back, and to fold them in; nothing for matrices."""
    if isinstance(layer, LoRAConvTranspose):
        return {"stored": "transposed kernel matrix"}
    if isinstance(layer, LoRAConvolution):
        return {"stored": "kernel" if difference(layer) is None else "kernel matrix"}
    if target_of(name, attentions) == name:
        return {}
    return {"stored": "apart" if _is_apart(name, weights, attentions) else "half"}


def unpack(
    factors: Mapping[str, Tensor], manifest: Mapping[str, Any] | None, projections: Collection[str], version: str
) -> dict[str, Tensor]:
    """Factors as they are here: matrices.

    Args:
        factors: By our names.
        manifest: Ours; without one the file is PEFT's, where more than two axes are those of a kernel.
        projections: Names of output projections.
        version: Of the PEFT that wrote the file.
    """
    if manifest is not None:
        stored = {name: entry.get("stored") for name, entry in manifest["layers"].items()}
    else:
        stored = dict.fromkeys(projections, "half" if _adds_twice(version, projections) else None)
    unpacked = {}
    for key, tensor in factors.items():
        name, _, leaf = key.rpartition(".")
        how = stored.get(name)
        if leaf in FACTORS and tensor.ndim > 2 and (how == "kernel" or manifest is None):
            tensor = tensor.flatten(1)
        elif how == "apart" and tensor.ndim == 3:
            tensor = tensor[0]
        elif how == "half" and leaf == "lora_B":
            tensor = tensor * 2
        unpacked[key] = tensor
    return unpacked


def _adds_twice(version: str, projections: Collection[str]) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if projections and numbers > _LAST_TWICE:
        warnings.warn(
            f"PEFT up to 0.21 adds the update of {first_five(sorted(projections))} twice; this adapter was written by "
            f"{version}, which is taken to add it once. Compare outputs before relying on it.",
            stacklevel=4,
        )
    return numbers <= _LAST_TWICE


def missing_projections(weights: Weights, attentions: Attentions, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero factors, by PEFT's names, of the projections that PEFT adapts and this adapter does not."""
    zeros = {}
    for name, attention in attentions.items():
        projection = join(name, "out_proj")
        present = [weight for weight in (name, projection) if weight in weights]
        if len(present) != 1:
            continue
        A = factors[join(present[0], "lora_A")]
        width, rank = attention.embed_dim, A.shape[0]
        absent, num_out = (name, 3 * width) if present[0] == projection else (projection, width)
        for factor, shape in zip(FACTORS, ((rank, width), (num_out, rank)), strict=True):
            zeros[join(module_of(absent, attentions), f"{factor}.weight")] = torch.zeros(shape, dtype=A.dtype)
    return zeros


def take_projections(factors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Factors with output projections under our names, and those names."""
    renamed, names = {}, []
    for key, tensor in factors.items():
        module, _, factor = key.rpartition(".")
        if _NESTED.search(module):
            module = _NESTED.sub(r"\1out_proj", module)
            names += [module] if module not in names else []
        renamed[join(module, factor)] = tensor
    return renamed, names


def without_fillers(factors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Factors without the zeros that were written for projections which are not adapted."""
    layers = manifest["layers"]

    def is_filler(key: str) -> bool:
        name = key.rpartition(".")[0]
        other = _parent(name) if _parent(name) in layers else join(name, "out_proj")
        return name not in layers and other in layers and not bool(factors[key].any())

    return {key: tensor for key, tensor in factors.items() if not is_filler(key)}


def with_patterns(peft: dict[str, Any], names: Iterable[str], manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """PEFT's settings with rank and alpha of output projections, which PEFT takes from their attention.

    Args:
        peft: Contents of ``adapter_config.json``.
        names: Our names of output projections.
        manifest: Ours, if there is one; it says rank and alpha of every layer.
    """
    extended = dict(peft)
    for table, option, key in (("rank_pattern", "r", "rank"), ("alpha_pattern", "lora_alpha", "alpha")):
        patterns = peft.get(table) or {}
        lookup, values = PatternTable(patterns), {}
        for name in names:
            attention = _parent(name)
            entry = {} if manifest is None else manifest["layers"].get(name, {})
            value = entry.get(key, lookup.value(attention or "", peft.get(option, 8)))
            values[f"^{re.escape(name)}"] = value
        extended[table] = values | patterns
    return extended


def difference(module: Any) -> str | None:
    """What of a convolution PEFT leaves out, so that it would compute another function; None if nothing."""
    if module.groups > 1:
        return f"groups={module.groups}"
    if any(step != 1 for step in module.dilation):
        return f"dilation={module.dilation}"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return None if LoRAConv.is_plain(module) else "a forward of its own"


def warn_of_differences(weights: Weights, attentions: Attentions) -> None:
    """Say which layers PEFT cannot load, and which another version of it might take for others."""
    reasons = _inexpressible(weights, attentions)
    if reasons:
        named = first_five([f"{name} ({reason})" for name, reason in reasons.items()])
        warnings.warn(
            f"PEFT cannot load this adapter: it has no equal for {len(reasons)} of its layers ({named}) and will "
            f"report an error. load_adapter loads it; a merged model loads everywhere.",
            stacklevel=3,
        )
    halved = [name for name in weights if target_of(name, attentions) != name and name not in reasons]
    if halved and not reasons:
        warnings.warn(
            f"PEFT up to 0.21 adds the update of {first_five(halved)} twice (huggingface/peft pull request 3774), so "
            f"it is written halved: equal there, half in a PEFT that adds it once. load_adapter is not concerned.",
            stacklevel=3,
        )


def _inexpressible(weights: Weights, attentions: Attentions) -> dict[str, str]:
    """Adapted weights that PEFT cannot load, and why."""
    reasons = {}
    for name, (layer, _) in weights.items():
        if isinstance(layer, LoRAConv):
            reasons[name] = difference(layer)
        elif isinstance(layer, (LoRAConvTranspose, LoRARecurrent)):
            reasons[name] = base_type(type(layer)).__name__
        elif isinstance(layer, LoRAMultiheadAttention) and not layer._qkv_same_embed_dim:
            reasons[name] = "separate projections"
        elif _is_apart(name, weights, attentions):
            reasons[name] = "not the rank and alpha of its attention"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _is_apart(name: str, weights: Weights, attentions: Attentions) -> bool:
    """Whether an output projection has another rank or alpha than its attention."""
    attention = target_of(name, attentions)
    if attention == name or attention not in weights:
        return False
    own, theirs = weights[name][0].lora_spec, weights[attention][0].lora_spec
    return (own.rank, own.scale) != (theirs.rank, theirs.scale)
