"""A user's own layers, adapted by kinds of the user's own: several weights, and a computation that cannot be split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora import register_layer
from lightning_lora.lora.functional import linear_update
from lightning_lora.lora.layers import LoRAEffective, LoRALayer, WeightShape
from tests.lora.layers.laws import Case, Laws, numbers


class Gated(nn.Module):
    """Two matrices whose products meet."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Parameter(torch.randn(6, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up.T * torch.sigmoid(x @ self.gate.T)


class Recursive(Gated):
    """The same, but used many times over, so that it is adapted as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(super().forward(x) @ self.up)
        return x


class LoRAGated(LoRALayer):
    """Adds each update where its product is."""

    up: Tensor
    gate: Tensor

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        return {"up": WeightShape(4, 6), "gate": WeightShape(4, 6)}

    def product(self, x: Tensor, weight: str) -> Tensor:
        y = x @ getattr(self, weight).T
        if weight not in self.lora_specs:
            return y
        return y + linear_update(x, *self.lora_pair(weight), self.lora_specs[weight].scale, self.lora_dropout)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_active:
            return super().forward(x)
        return self.product(x, "up") * torch.sigmoid(self.product(x, "gate"))


class LoRARecursive(LoRAEffective):
    """Runs the layer as it is."""

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        return LoRAGated.weights(module)


@pytest.mark.usefixtures("registries")
class TestOwnLayers(Laws):
    kinds = ("several weights", "as a whole")
    cases = {
        "several weights": Case(Gated, lambda: (numbers(3, 4),), 2),
        "one of several": Case(Gated, lambda: (numbers(3, 4),), 1, {"targets": ["layer.gate"]}),
        "as a whole": Case(Recursive, lambda: (numbers(3, 4),), 2),
    }

    @pytest.fixture(autouse=True)
    def register(self, registries: None) -> None:
        register_layer(Gated, LoRAGated)
        register_layer(Recursive, LoRARecursive)
