"""The adapted layer for each module type, and why some types have none."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from lightning_lora.errors import LayerError
from lightning_lora.lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.conv import LoRAConv, LoRAConvTranspose
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.experts import LoRADenseExperts, LoRAExperts, LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.layers.matrices import LoRAMatrices
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.lora.layers.quantised_weights import is_quantised, quantised_refusal, type_path
from lightning_lora.lora.layers.recurrent import LoRARecurrent

Value = TypeVar("Value")

# Types of libraries that the core must not import are named by their path.
_ADAPTERS: dict[type | str, type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), LoRAConv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), LoRAConvTranspose),
    **dict.fromkeys((nn.RNNBase, nn.RNNCellBase), LoRARecurrent),
    nn.MultiheadAttention: LoRAMultiheadAttention,
    "transformers.pytorch_utils.Conv1D": LoRAConv1D,
    "bitsandbytes.nn.modules.Linear4bit": LoRAQuantisedLinear,
    "bitsandbytes.nn.modules.Linear8bitLt": LoRAQuantisedLinear,
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": LoRADenseExperts,
}

_REFUSED: dict[type | str, str] = {
    nn.Bilinear: "a bilinear form has no low-rank update here",
    nn.EmbeddingBag: "EmbeddingBag sums rows inside the lookup, which has no adapter",
}


def register_layer(module_type: type[nn.Module], adapter_type: type[LoRALayer]) -> None:
    """Adapt modules of ``module_type``, and of subclasses that are not registered themselves, by ``adapter_type``.

    Args:
        module_type: The class of the layer as users build it.
        adapter_type: A subclass of `LoRALayer` that returns `dimensions` and adds the update in ``forward``.

    Raises:
        ConfigError: If ``module_type`` is not a module class, or ``adapter_type`` not a subclass of `LoRALayer`.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise LayerError(f"register_layer needs a module class as module_type, got {module_type!r}.")
    if not (isinstance(adapter_type, type) and issubclass(adapter_type, LoRALayer)):
        raise LayerError(f"register_layer needs a subclass of LoRALayer as adapter_type, got {adapter_type!r}.")
    _ADAPTERS[module_type] = adapter_type


def adapter_kind(module: nn.Module) -> type[LoRALayer] | None:
    """The adapted layer for ``module``; None for modules without a weight matrix, such as containers and norms."""
    for candidate in type(module).__mro__:
        if _value(_REFUSED, candidate) is not None:
            return None
        kind = _value(_ADAPTERS, candidate)
        if kind is not None:
            if refusal(module) is not None:
                return None
            # torchao quantises the weight of a plain nn.Linear.
            weight = module._parameters.get("weight")
            return LoRAQuantisedLinear if kind is LoRALinear and is_quantised(weight) else kind
    if isinstance(module, LoRAMatrices):
        return LoRAMatrices
    return LoRAExperts if _follows_experts_interface(module) else None


def kind_of_named(module: nn.Module) -> type[LoRALayer] | None:
    """The adapted layer for a module that an adapter names; the matrices of any module can be adapted then."""
    kind = adapter_kind(module)
    if kind is None and refusal(module) is None and LoRAMatrices.weights(module):
        return LoRAMatrices
    return kind


def refusal(module: nn.Module) -> str | None:
    """Why a module that looks adaptable is not; None for adaptable modules and those without a weight matrix."""
    for candidate in type(module).__mro__:
        reason = _value(_REFUSED, candidate)
        if reason is not None:
            return reason
        kind = _value(_ADAPTERS, candidate)
        if kind is not None:
            return None if issubclass(kind, LoRAFusedExperts) else _weights_refusal(module, kind)
    if _follows_experts_interface(module) or isinstance(module, parametrize.ParametrizationList):
        # The layer is refused, not the list of parametrizations that compute its weight.
        return None
    reason = quantised_refusal(module)
    if reason is not None:
        return reason
    if any(parameter is not None and parameter.ndim == 3 for parameter in module._parameters.values()):
        # Experts fused into one parameter. Positional tables, which have a leading 1, are not weights.
        largest = max(module._parameters.values(), key=lambda p: 0 if p is None else p.numel())
        if largest is not None and largest.ndim == 3 and min(largest.shape) > 1:
            return f"{type(module).__name__} holds {largest.shape[0]} fused weights, which have no adapter"
    return None


def _follows_experts_interface(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` marked the module; the marks say what its weights mean."""
    marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    return all(hasattr(module, mark) for mark in marks) and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def _weights_refusal(module: nn.Module, kind: type[LoRALayer]) -> str | None:
    if any(isinstance(weight, (UninitializedParameter, UninitializedBuffer)) for weight in module._parameters.values()):
        return "it is lazy and has no shape yet: run one batch through the model first"
    reason = quantised_refusal(module)
    if reason is not None:
        return reason
    for name in kind.weights(module):
        if name not in module._parameters:
            return _computed_weight_refusal(module, name)
        weight = module._parameters[name]
        if not isinstance(module, nn.Embedding) and is_quantised(weight):
            continue
        reason = _weight_refusal(weight)
        if reason is not None:
            return reason
    return _lookup_refusal(module) if isinstance(module, nn.Embedding) else None


def _computed_weight_refusal(module: nn.Module, name: str) -> str:
    """Why a weight that is not a parameter is refused, and how to make it one."""
    if parametrize.is_parametrized(module, name):
        way_out = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) makes it plain"
    else:
        way_out = "torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm makes it plain"
    return f"its {name} is computed from other parameters (a parametrization); {way_out}"


def _weight_refusal(weight: nn.Parameter | None) -> str | None:
    if weight is None or not weight.is_floating_point():
        return f"its weight is {getattr(weight, 'dtype', None)}, not floating point"
    if weight.layout is not torch.strided:
        return f"its weight is stored as {weight.layout}"
    if weight.element_size() < 2:
        return f"its weight is {weight.dtype}, which torch cannot add to"
    return None


def _lookup_refusal(table: nn.Embedding) -> str | None:
    if table.max_norm is not None:
        return "max_norm rewrites its weight at every lookup"
    # Positional tables of BART, OPT and Whisper look up other rows than their input says; only a scale is supported.
    if type(table).forward is not nn.Embedding.forward and not hasattr(table, "embed_scale"):
        return f"{type(table).__name__} looks rows up in its own way"
    return None


def _value(table: dict[type | str, Value], kind: type) -> Value | None:
    """The value in ``table`` for a class, which may be named by its path."""
    value = table.get(kind)
    return value if value is not None else table.get(type_path(kind))
