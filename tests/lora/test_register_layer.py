"""Users can register adapters for their own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, inject_lora, merge_lora, register_layer, remove_lora
from lightning_lora.lora.layers import LoRALayer, LoRALinear
from tests.lora.models import output
from tests.support.tiny_models import wake


def test_a_registered_layer_is_adapted(registries: None) -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    class LoRARatio(LoRALayer):
        @staticmethod
        def dimensions(module: Any) -> tuple[int, int]:
            return 4, 6

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + self.lora_spec.scale * x @ self.lora_A.T @ self.lora_B.T if self.lora_active else y

    register_layer(Ratio, LoRARatio)
    module = nn.Sequential(Ratio(), nn.ReLU())
    assert list(inject_lora(module, LoRAConfig(rank=2)).layers) == ["0"]
    wake(module)
    x = torch.randn(3, 4)
    before = output(module, x)
    merge_lora(module)
    torch.testing.assert_close(output(module, x), before)
    remove_lora(module)
    assert type(module[0]) is Ratio


@pytest.mark.parametrize(
    ("kind", "adapter"), [(nn.Linear(2, 2), LoRALinear), (int, LoRALinear), (nn.Linear, nn.Linear)]
)
def test_a_bad_registration_is_refused(kind: Any, adapter: Any, registries: None) -> None:
    with pytest.raises(ConfigError, match="register_layer needs"):
        register_layer(kind, adapter)
