"""Convolutions: every group, dilation, stride and padding mode, plain and transposed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.layers import LoRAConv, LoRAConvTranspose
from tests.lora.layers.laws import Case, Laws, numbers
from tests.support.tiny_models import wake


class Standardised(nn.Conv2d):
    """Computes with another weight than it holds, as the convolutions of BiT do."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(nn.Conv2d):
    """Pads by the size of its input, as the convolutions of EfficientNet do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, input.shape[-1] % 2, 0, 1)))


def image() -> tuple[Tensor]:
    return (numbers(2, 4, 7, 8),)


def plain(**options: Any) -> Case:
    return Case(lambda: nn.Conv2d(4, 6, (3, 2), **options), image, 1)


def transposed(delta: Tensor, weight: Tensor) -> Tensor:
    return delta.T.reshape(weight.shape)


class TestConvolutions(Laws):
    kinds = ("all at once", "depthwise", "another weight")
    cases = {
        "1d": Case(lambda: nn.Conv1d(4, 6, 3), lambda: (numbers(2, 4, 9),), 1),
        "2d": plain(),
        "3d": Case(lambda: nn.Conv3d(3, 4, (1, 3, 2)), lambda: (numbers(2, 3, 4, 5, 6),), 1),
        "no batch": Case(lambda: nn.Conv2d(4, 6, 3), lambda: (numbers(4, 7, 8),), 1),
        "no bias": plain(bias=False),
        "kernel 1": Case(lambda: nn.Conv2d(4, 6, 1), image, 1),
        "stride": plain(stride=(2, 3)),
        "dilation": plain(dilation=(2, 3)),
        "groups": plain(groups=2),
        "many groups": Case(lambda: nn.Conv2d(12, 12, 3, groups=4), lambda: (numbers(2, 12, 7, 8),), 1),
        "depthwise": Case(lambda: nn.Conv2d(4, 8, 3, groups=4), image, 1),
        "zeros": plain(padding=(2, 1)),
        "reflect": plain(padding=(2, 1), padding_mode="reflect"),
        "replicate": plain(padding=(2, 1), padding_mode="replicate"),
        "circular": plain(padding=(2, 1), padding_mode="circular"),
        "same": Case(lambda: nn.Conv2d(4, 6, 3, padding="same"), image, 1),
        "same, reflected, dilated": plain(padding="same", padding_mode="reflect", dilation=2, groups=2),
        "valid": plain(padding="valid"),
        "all at once": plain(stride=2, dilation=(1, 2), groups=2, padding=(3, 1), padding_mode="circular"),
        "another weight": Case(lambda: Standardised(4, 6, 3, groups=2), image, 1),
        "another padding": Case(lambda: Padded(4, 6, 3), image, 1),
    }


class TestTransposedConvolutions(Laws):
    kinds = ("all at once", "depthwise")
    cases = {
        "1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3), lambda: (numbers(2, 4, 9),), 1, {}, transposed),
        "2d": Case(lambda: nn.ConvTranspose2d(4, 6, (3, 2)), image, 1, {}, transposed),
        "3d": Case(lambda: nn.ConvTranspose3d(3, 4, 2), lambda: (numbers(2, 3, 4, 5, 6),), 1, {}, transposed),
        "all at once": Case(
            lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
            image,
            1,
            {},
            transposed,
        ),
        "depthwise": Case(lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), image, 1, {}, transposed),
        "size of the output": Case(
            lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: (*image(), [16, 18]), 1, {}, transposed
        ),
    }


def adapted(layer: nn.Module, **settings: Any) -> nn.Module:
    inject_lora(layer, LoRAConfig.from_dict({"rank": 2, **settings}))
    wake(layer, size=0.5)
    return layer


def test_factors_are_matrices_over_the_unfolded_kernel() -> None:
    layer = adapted(nn.Conv2d(8, 6, (3, 5), groups=2), rank=3)
    assert isinstance(layer, (LoRAConv, nn.Conv2d))
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((3, 4 * 15), (6, 3))
    layer = adapted(nn.ConvTranspose1d(8, 6, 5, groups=2))
    assert isinstance(layer, (LoRAConvTranspose, nn.ConvTranspose1d))
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 8), (3 * 5, 2))


def test_the_update_of_an_ordinary_convolution_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, weight: str = "weight") -> Tensor:
        raise AssertionError("the update was formed")

    monkeypatch.setattr(LoRAConv, "weight_delta", fail)
    adapted(nn.Conv2d(4, 16, 3)).train()(numbers(1, 4, 5, 5).float())
    with pytest.raises(AssertionError, match="was formed"):
        adapted(nn.Conv2d(4, 4, 3, groups=4)).train()(numbers(1, 4, 5, 5).float())


@pytest.mark.parametrize("groups", [1, 4], ids=["factors", "depthwise"])
def test_dropout_acts_on_the_input_of_the_update_in_training_only(groups: int) -> None:
    layer = adapted(nn.Conv2d(4, 4, 3, groups=groups), dropout=0.5)
    x = numbers(2, 4, 6, 6).float()
    with torch.no_grad():
        base = F.conv2d(x, layer.weight, layer.bias, groups=groups)  # pyright: ignore
        update = layer.lora_spec.scale * layer.lora_B @ layer.lora_A  # pyright: ignore
        kernel = update.reshape(layer.weight.shape)  # pyright: ignore
        torch.testing.assert_close(layer.eval()(x), base + F.conv2d(x, kernel, groups=groups), rtol=1e-4, atol=1e-4)
        torch.manual_seed(0)
        dropped = F.conv2d(F.dropout(x, 0.5), kernel, groups=groups)
        torch.manual_seed(0)
        torch.testing.assert_close(layer.train()(x), base + dropped, rtol=1e-4, atol=1e-4)


def test_dropout_is_refused_where_a_convolution_has_a_forward_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"dropout=0.1 cannot act on 1 of the targeted layers \(0\)"):
        inject_lora(nn.Sequential(Standardised(4, 6, 3)), LoRAConfig(rank=2, dropout=0.1))


def test_factors_stay_float32_beside_a_bfloat16_convolution() -> None:
    layer = adapted(nn.Conv2d(4, 6, 3).bfloat16())
    y = layer(numbers(1, 4, 5, 5).bfloat16())
    assert (y.dtype, lora_layers(layer)[""].lora_A.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert lora_layers(layer)[""].lora_A.grad is not None
