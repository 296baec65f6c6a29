"""Frozen weights held in the type that mixed precision multiplies in.

Under autocast a float32 weight is cast in every product. Autocast remembers casts of weights that learn, so those of a
frozen base are made again in every forward pass, and stay until the backward pass has used them: 6 bytes a weight
instead of 2, and a pass over the whole model for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.errors import first_five
from lightning_lora.lora.functional.torch_internals import PLAIN_TYPES, has_values
from lightning_lora.lora.layers.adapted import factor_parameters

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
"""Layers that autocast computes in float32 on a GPU, and whose weights it would widen in every forward pass."""


def autocast_dtype(trainer: Trainer | None) -> torch.dtype | None:
    """The type that ``trainer`` multiplies in while trained weights are float32; None without autocast of Lightning."""
    plugin = getattr(trainer, "precision_plugin", None)
    return _DTYPES[plugin.precision] if isinstance(plugin, MixedPrecision) else None


def hold_base(root: nn.Module, dtype: torch.dtype, hint: str = "") -> bool:
    """Cast the frozen float32 weights of an adapted module to ``dtype``, and tell of it in one line.

    Adapters, modules trained in full, buffers, normalisation layers that autocast computes in float32, and what a model
    of transformers names as float32 stay as they are. Where types then differ, calls of ``root`` outside of autocast
    enter it. In float16 nothing is cast if a weight would become infinite; a warning says so.

    Args:
        root: The adapted module, not sharded yet.
        dtype: bfloat16 or float16.
        hint: How to keep the weights in float32, for the message.

    Returns:
        Whether the base is held in ``dtype`` now.
    """
    frozen = _frozen(root, dtype)
    too_large = [name for name, weight in frozen.items() if _overflows(weight, dtype)]
    name = str(dtype).removeprefix("torch.")
    if too_large:
        rank_zero_warn(
            f"the base stays in float32: {len(too_large)} frozen weights are too large for {name} "
            f"({first_five(too_large)}), and products in it are infinite too. Train in bf16-mixed."
        )
        return False
    for weight in frozen.values():
        weight.data = weight.data.to(dtype)
    held = [weight for weight in root.parameters() if not weight.requires_grad and weight.dtype == dtype]
    size = sum(weight.nbytes for weight in held)
    rank_zero_info(f"base: {size / 1e6:,.1f} MB of frozen weights held in {name}, which products are computed in{hint}")
    factors = {id(factor) for factor in factor_parameters(root).values()}
    types = {p.dtype for p in root.parameters() if p.is_floating_point() and id(p) not in factors and p.itemsize > 1}
    if len(types) > 1:
        _Autocast(dtype).attach(root)
    return bool(held)


@contextmanager
def base_as_stored(module: LightningModule) -> Iterator[None]:
    """Within the context held weights have the type of their files again, so that a merged model is written in it."""
    held, stored = getattr(module, "_lora_held", None), getattr(module, "_lora_stored", None)
    weights = [p for p in module.parameters() if not p.requires_grad and p.dtype == held] if stored else []
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(stored)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def _frozen(root: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The frozen float32 weights by name, but for those that stay in float32."""
    norms = {id(p) for module in root.modules() if isinstance(module, NORMS) for p in module.parameters()}
    named = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype is torch.float16 else [])]
    # Globs in the names that transformers searches for in those of weights.
    wide = {kept.replace("*", ".*") for module in root.modules() for name in named for kept in _names(module, name)}
    return {
        name: weight
        for name, weight in root.named_parameters()
        if weight.dtype is torch.float32
        and not weight.requires_grad
        and type(weight) in PLAIN_TYPES
        and id(weight) not in norms
        and not any(re.search(kept, name) for kept in wide)
    }


def _names(module: nn.Module, attribute: str) -> list[str]:
    return list(getattr(type(module), attribute, None) or ())


def _overflows(weight: Tensor, dtype: torch.dtype) -> bool:
    if dtype is not torch.float16 or not has_values(weight) or not weight.numel():
        return False
    return bool(weight.detach().abs().amax().to(dtype).isinf())


class _Autocast:
    """Hooks that let a module of several types compute outside of a Trainer as it does inside.

    Args:
        dtype: The type of the autocast region.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._entered: list[torch.autocast | None] = []

    def attach(self, module: nn.Module) -> None:
        """Let every call of ``module`` run in the region."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        device = next(module.parameters()).device.type
        region = None if torch.is_autocast_enabled(device) else torch.autocast(device, self.dtype)
        self._entered.append(region)
        if region is not None:
            region.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        region = self._entered.pop()
        if region is not None:
            region.__exit__(None, None, None)
