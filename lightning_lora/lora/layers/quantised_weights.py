"""Weights that bitsandbytes or torchao hold in 4 or 8 bits: recognising them, and the numbers they stand for.

Neither library is imported before one of its weights is met; types are recognised by their path. Formats that are not
named here (GPTQ, AWQ, fp8, quantised activations) are refused: merging them is untested.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

_LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
_LINEAR_8BIT = "bitsandbytes.nn.modules.Linear8bitLt"
_PARAMS_4BIT = "bitsandbytes.nn.modules.Params4bit"
_PARAMS_8BIT = "bitsandbytes.nn.modules.Int8Params"
_TORCHAO_INT8 = "torchao.quantization.Int8Tensor"
# Type to its attribute that says whether activations are quantised too, which a merged weight would not do.
_TORCHAO = {
    _TORCHAO_INT8: "act_quant_kwargs",
    "torchao.quantization.IntxUnpackedToInt8Tensor": "activation_quantization",
}
# What GPTQ, AWQ and HQQ layers hold instead of a weight.
_PACKED_NAMES = ("qweight", "W_q")
_LIGHTNING_PLUGIN = "lightning.fabric.plugins.precision.bitsandbytes"


def is_quantised(weight: Any) -> bool:
    """Whether ``weight`` is quantised in a format that is supported here."""
    if _is_4bit(weight):
        return getattr(weight, "quant_state", None) is not None
    if _is_8bit(weight):
        return weight.dtype == torch.int8
    kind = type_path(type(weight))
    return kind in _TORCHAO and getattr(weight, _TORCHAO[kind]) is None


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer of bitsandbytes, its weight quantised already or not."""
    return _has_type(layer, _LINEAR_4BIT) or _has_type(layer, _LINEAR_8BIT)


def dequantised(layer: Any) -> Tensor:
    """The numbers that the quantised weight of ``layer`` stands for, ``(out, in)`` in float32.

    The library's own public function computes them from codes and scales; nothing is rounded to a narrower type.
    """
    weight: Any = layer.weight
    if _is_4bit(weight):
        from bitsandbytes.functional import dequantize_4bit

        # The type of the state is the type before quantisation; bfloat16 would round once more.
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return dequantize_4bit(_without_subclass(weight), state)
    if _is_8bit(weight):
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first forward moves the scales of the rows from the weight to the layer.
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return int8_vectorwise_dequant(_without_subclass(weight), scales)
    if type_path(type(weight)) == _TORCHAO_INT8:
        return weight.dequantize(output_dtype=torch.float32)
    # The other type has no such option, and itself computes with numbers rounded to its own type.
    return weight.dequantize().to(torch.float32)


def dtype_before(weight: Any) -> torch.dtype:
    """Type of the weight before it was quantised; float32 for bitsandbytes' int8, which does not record it."""
    if _is_4bit(weight):
        return weight.quant_state.dtype
    return torch.float32 if _is_8bit(weight) else weight.dtype


def num_elements(parameter: Tensor) -> int:
    """Count of the numbers that ``parameter`` holds; two 4-bit numbers may share a byte."""
    if _is_4bit(parameter) and is_quantised(parameter):
        return math.prod(parameter.quant_state.shape)  # pyright: ignore[reportAttributeAccessIssue]
    return parameter.numel()


def stored_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that ``tensor`` consists of: itself, or codes and scales."""
    if _is_4bit(tensor) and is_quantised(tensor):
        state: Any = tensor.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        nested = (state.offset, state.state2.absmax) if state.nested else ()
        return _without_subclass(tensor), state.absmax, *nested
    if _is_8bit(tensor):
        return (_without_subclass(tensor),)
    if is_quantised(tensor):
        return tuple(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # pyright: ignore[reportAttributeAccessIssue]
    return (tensor,)


def quantised_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name to every layer in ``module`` with a quantised weight, adapted or not."""
    return {name: layer for name, layer in module.named_modules() if is_quantised(layer._parameters.get("weight"))}


def scale_keys(layer: nn.Module) -> set[str]:
    """Keys that a quantised layer adds to a state dict beside its codes: scales, and marks of the format."""
    return {key for key in layer.state_dict() if key.startswith("weight.") or key in ("SCB", "weight_format")}


def quantised_refusal(module: nn.Module) -> str | None:
    """Why the quantised weight of ``module`` cannot be adapted; None if it can be, or is not quantised."""
    weight: Any = module._parameters.get("weight")
    kind = type_path(type(weight))
    if kind in _TORCHAO and getattr(weight, _TORCHAO[kind]) is not None:
        return "torchao quantises its activations too; only weight-only formats are supported"
    if not kind.startswith("torch.") and hasattr(type(weight), "__tensor_flatten__") and not is_quantised(weight):
        return f"its weight is a {kind}, a format that is not supported"
    if _has_type(module, _LINEAR_8BIT) and _is_8bit(weight) and weight.has_fp16_weights:
        return "bitsandbytes quantises its weight anew in each step (has_fp16_weights); build it with False"
    if _has_type(module, _LINEAR_4BIT):
        if not _is_4bit(weight):
            return f"its 4-bit weight was replaced by a {type(weight).__name__} without scales"
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return "an evaluation on the CPU has repacked its weight with rounded scales: adapt it before that"
    packed = [name for name in _PACKED_NAMES if name in module._parameters or name in module._buffers]
    return f"{type(module).__name__} stores a quantised {packed[0]}, a format that is not supported" if packed else None


def keep_stored_values(module: nn.Module) -> None:
    """Switch off what would change the quantised weights in ``module`` while adapters train.

    On CPUs with bfloat16 instructions, bitsandbytes 0.50 repacks a 4-bit weight in its first evaluation: the scales
    are rounded to bfloat16 for good, a width that is not a multiple of 32 fails, and the next ``state_dict()`` leaves
    the scales transposed. Layers of Lightning's plugin load the first entry of a state dict that ends in "weight", even
    if it belongs to another layer.
    """
    for layer in module.modules():
        if _has_type(layer, _LINEAR_4BIT):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        for hooks in (layer._load_state_dict_pre_hooks, layer._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if hook_module(hook) == _LIGHTNING_PLUGIN:
                    del hooks[key]


def hook_module(hook: Any) -> str:
    """Path of the module that defines a hook on loading a state dict."""
    function = getattr(hook, "hook", hook)  # torch wraps hooks that receive the module
    return getattr(getattr(function, "func", function), "__module__", "")


def _without_subclass(weight: Tensor) -> Tensor:
    return weight.detach().as_subclass(Tensor)


# Pickling keeps the attributes of these parameters and loses their class.
def _is_4bit(weight: Any) -> bool:
    return _has_type(weight, _PARAMS_4BIT) or hasattr(weight, "quant_state")


def _is_8bit(weight: Any) -> bool:
    return _has_type(weight, _PARAMS_8BIT) or hasattr(weight, "SCB")


def _has_type(thing: object, path: str) -> bool:
    return any(type_path(kind) == path for kind in type(thing).__mro__)


def type_path(kind: type) -> str:
    """Path of a class, by which types of libraries are recognised that may not be imported."""
    return f"{kind.__module__}.{kind.__qualname__}"
