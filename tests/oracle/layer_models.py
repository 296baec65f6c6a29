"""Modules with convolutions and attention that the comparisons with PEFT share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from tests.lora.layers.laws import numbers
from tests.support.tiny_models import wake

TWICE = "PEFT up to 0.21 adds the update of .* twice"


class Net(nn.Module):
    """A convolution, then attention over its positions."""

    def __init__(self, width: int = 8, **options: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"padding": 1, "stride": 2}
        self.conv = nn.Conv2d(3, width, 3, **settings | options)
        self.narrow = nn.Conv1d(width, width, 2)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(torch.relu(self.conv(x)).flatten(2)).transpose(1, 2)
        return self.head(y + self.attention(y, y, y)[0])


class Upsampling(nn.Module):
    """A transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


X = numbers(2, 3, 6, 6).float()

BOTH = ["attention", "attention.out_proj"]


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def adapted(build: Callable[[], nn.Module], settings: dict[str, Any]) -> nn.Module:
    module = built(build)
    inject_lora(module, LoRAConfig.from_dict({"rank": 2, **settings}))
    wake(module, size=0.1)
    return module


def save(module: nn.Module, path: Path, twice: bool) -> None:
    if twice:
        with pytest.warns(UserWarning, match=TWICE):
            save_adapter(module, path)
    else:
        save_adapter(module, path)
