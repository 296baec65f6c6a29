"""Linear layers of other libraries, or, where these are not installed, their formulas under names that say so.

    python -m pip install --no-deps --target /tmp/contenders litgpt loralib

and ``--packages /tmp/contenders`` let the products themselves take part; neither adapts fused experts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from benchmarks.adapters import Adapter, shared_name
from lightning_lora.lora.layers.adapted import factor_owner

# Builds an adapted layer around a linear, sharing its weight: ``(linear, rank, scale)``; it has lora_A and lora_B.
LayerBuilder = Callable[[nn.Linear, int, float], nn.Module]


class NotApplicableError(ValueError):
    """A contender has no layer for this model."""


class LitgptFormula(nn.Module):
    """``y = W x + scale * (x A^T) B^T``, the scale on the full width, added out of place."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scale


class MicrosoftFormula(LitgptFormula):
    """The same, added to the base's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += (x @ self.lora_A.T @ self.lora_B.T) * self.scale
        return y


def litgpt_layer() -> tuple[str, LayerBuilder]:
    """Name and builder: litgpt's ``LoRALinear`` if it is installed, else its formula."""
    try:
        product: Any = import_module("litgpt.lora")
    except ModuleNotFoundError:
        return "formula of litgpt's LoRALinear (stand-in)", LitgptFormula

    def build(linear: nn.Linear, rank: int, scale: float) -> nn.Module:
        layer = product.LoRALinear(1, 1, r=rank)
        layer.linear, layer.scaling = linear, scale
        return _with_factors(layer, linear, rank)

    return f"litgpt {version('litgpt')} LoRALinear", build


def microsoft_layer() -> tuple[str, LayerBuilder]:
    """Name and builder: microsoft/LoRA's ``Linear`` if loralib is installed, else its formula."""
    try:
        product: Any = import_module("loralib")
    except ModuleNotFoundError:
        return "formula of microsoft/LoRA (stand-in)", MicrosoftFormula

    def build(linear: nn.Linear, rank: int, scale: float) -> nn.Module:
        # Merging in eval mode would write into the weights that all contenders share.
        layer = product.Linear(1, 1, r=rank, bias=False, merge_weights=False)
        layer.weight, layer.bias, layer.scaling = linear.weight, linear.bias, scale
        return _with_factors(layer, linear, rank)

    return f"microsoft/LoRA (loralib {version('loralib')})", build


def _with_factors(layer: nn.Module, linear: nn.Linear, rank: int) -> nn.Module:
    layer.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
    layer.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
    return layer


def linear_contender(model: nn.Module, adapter: Adapter, build: LayerBuilder) -> dict[str, nn.Parameter]:
    """Replace the adapted linears of ``model`` by layers that ``build`` makes, with the adapter's factors.

    Returns:
        The factors by PEFT's names.

    Raises:
        NotApplicableError: If the adapter holds weights of other layers than ``nn.Linear``.
    """
    model.requires_grad_(False)
    for name, scale in adapter.scales.items():
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise NotApplicableError(f"it has no layer for {name}, which is no nn.Linear")
        parent, _, leaf = name.rpartition(".")
        layer = build(linear, adapter.factors[f"{name}.lora_A"].shape[0], scale)
        setattr(model.get_submodule(parent), leaf, layer)
    factors = {}
    for name, values in adapter.factors.items():
        factor = model.get_parameter(name)
        factor.data.copy_(values)
        factors[shared_name(*factor_owner(name))] = factor
    return factors
