"""The one adapter that every LoRA contender gets: A and B by PEFT's tensor names, B not zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.files.adapter.peft_format import PREFIX
from lightning_lora.files.adapter.peft_layers import PEFTLayout
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters


@dataclass(frozen=True)
class Adapter:
    """Factors and what is needed to apply them.

    Args:
        config: The settings they were made with.
        factors: By our names.
        scales: Adapted weight to the factor of ``B A``.
        folder: The same in PEFT's format.
    """

    config: LoRAConfig
    factors: Mapping[str, Tensor]
    scales: Mapping[str, float]
    folder: Path


def make_adapter(model: nn.Module, config: LoRAConfig, folder: Path, seed: int = 0) -> Adapter:
    """A random adapter of ``model``, which is adapted in place and of no use afterwards."""
    generator = torch.Generator().manual_seed(seed)
    inject_lora(model, config)
    factors = factor_parameters(model)
    for name, factor in factors.items():
        # A zero B would make the gradient of A zero, and let a contender skip work.
        std = 0.02 if name.endswith("lora_B") else factor.shape[-1] ** -0.5
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * std)
    scales = {name: layer.lora_specs[weight].scale for name, (layer, weight) in adapted_weights(model).items()}
    save_adapter(model, folder)
    return Adapter(config, {name: factor.detach().clone() for name, factor in factors.items()}, scales, folder)


def shared_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of our adapted ``model``, or their gradients, by PEFT's names and in its layout."""
    return PEFTLayout(model).tensors(tensors)


def shared_name(layer: str, factor: str) -> str:
    """PEFT's name of ``lora_A`` or ``lora_B`` of a linear layer."""
    return f"{PREFIX}{layer}.{factor}.weight"
