"""Layers that can have a magnitude, with and without one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_lora
from tests.lora.models import Doubled

Build = Callable[[], nn.Module]


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


# Builder of the layer, its input, and whether its weight is stored with the output features last.
LAYERS: dict[str, tuple[Build, Callable[[], Tensor], bool]] = {
    "linear": (lambda: nn.Linear(12, 10), rows(3, 7, 12), False),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), rows(5, 12), False),
    "many rows": (lambda: nn.Linear(12, 10), rows(64, 12), False),
    "a user's linear": (lambda: Doubled(12, 10), rows(3, 12), False),
    "transposed linear": (lambda: Conv1D(10, 12), rows(3, 7, 12), True),
    "convolution": (lambda: nn.Conv2d(4, 10, 3, stride=2, padding=1), rows(3, 4, 6, 6), False),
    "convolution of one image": (lambda: nn.Conv2d(4, 10, 3), rows(4, 6, 6), False),
    "groups": (lambda: nn.Conv1d(4, 10, 3, groups=2, padding_mode="circular", padding=1), rows(3, 4, 8), False),
    "three dimensions": (lambda: nn.Conv3d(4, 10, 2, bias=False), rows(3, 4, 4, 4, 4), False),
    "embedding": (lambda: nn.Embedding(20, 10), lambda: torch.arange(12).reshape(3, 4), True),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """The base in a container, the same adapted with a magnitude, and an input."""
    build, draw, _ = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base, x = nn.Sequential(build()).to(dtype), draw()
        module = copy.deepcopy(base)
        inject_lora(module, LoRAConfig(rank=3, alpha=5.0, targets=["0"], dora=True))
    return base, module, x.to(dtype) if x.is_floating_point() else x


def wake(module: nn.Module) -> None:
    """Give factors random values and move magnitudes by a third."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "lora_" in name:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                tensor.mul_(1 + 0.3 * noise) if "magnitude" in name else tensor.copy_(0.4 * noise)
