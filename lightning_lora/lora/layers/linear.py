"""Adapted linear layers: ``nn.Linear`` and its subclasses, and the transposed linear of GPT-2."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.functional import AdaptedWeight, base_product, can_fuse, fused_lora_linears, linear_update
from lightning_lora.lora.functional.torch_internals import run_while_compiling
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.class_swap import base_type
from lightning_lora.lora.layers.quantised_weights import is_quantised
from lightning_lora.lora.layers.siblings import CompiledGroup, sibling_output


class LoRALinear(LoRALayer, nn.Linear):
    r"""A frozen linear layer plus a trainable low-rank update: ``y = W x + b + scale * B A x``.

    ``B`` starts at zero, so a freshly adapted layer computes exactly what the base computes.

    Shape:
        - ``W``: ``(out, in)``, ``A``: ``(rank, in)``, ``B``: ``(out, rank)``.
        - Input ``(*, in)``, output ``(*, out)``.

    References:
        Hu et al., *LoRA*, ICLR 2022, section 4.1, https://arxiv.org/abs/2106.09685
    """

    # The layers that are compiled together with this one, and its number among them.
    lora_group: tuple[CompiledGroup, int] | None = None

    @staticmethod
    @override
    def dimensions(module: Any) -> tuple[int, int]:
        kind: Any = base_type(type(module)) if issubclass(type(module), LoRALayer) else type(module)
        weight = module._parameters.get("weight")
        computes_so = kind.forward is nn.Linear.forward
        if weight is not None and weight.dim() == 2 and computes_so and not is_quantised(weight):
            # Whoever gives a layer another weight leaves the attributes as they are, and nn.Linear does not ask them.
            return weight.shape[1], weight.shape[0]
        return module.in_features, module.out_features

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.lora_active:
            # Without gradients, bit for bit as before the weights were frozen; with gradients, torch decides.
            is_plain = not torch.is_grad_enabled() and self._computes_plainly(input)
            is_plain = is_plain and self.weight.dtype == input.dtype and not torch.compiler.is_compiling()
            return base_product(input, self.weight, self.bias) if is_plain else super().forward(input)
        if (adapted := self.adapted_weight(input)) is not None:
            return sibling_output(self, input, adapted)
        y = super().forward(input)
        return y + _update(self, input, *self.linear_factors()).to(y.dtype)

    def adapted_weight(self, x: Tensor) -> AdaptedWeight | None:
        """Weight and factors for an input ``x``; None where the update is not active or cannot be fused."""
        if not (self.lora_active and self._computes_plainly(x)):
            return None
        A, B = self.linear_factors()
        return AdaptedWeight(self.weight, self.bias, A, B, self.lora_spec.scale, self, self.lora_keeps_gate)

    def _computes_plainly(self, x: Tensor) -> bool:
        return can_fuse(x, self.weight, self.bias) and _computes_as_linear(type(self))

    @override
    def before_detach(self) -> None:
        self.__dict__.pop("lora_group", None)

    def linear_factors(self) -> tuple[Tensor, Tensor]:
        """``A`` ``(rank, in)`` and ``B`` ``(out, rank)``."""
        return self.update_pair()


def _update(layer: LoRALayer, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    dropped = F.dropout(x, p) if (p := layer.lora_dropout) else x
    if layer.lora_watcher is not None:
        layer.lora_watcher(dropped)
    return linear_update(dropped, A, B, layer.lora_spec.scale)


def _computes_as_linear(kind: type[LoRALinear]) -> bool:
    """Whether the unadapted layer computes as ``nn.Linear`` does, not by a ``forward`` of its own."""
    return _base_forward(kind) is nn.Linear.forward


run_while_compiling(_computes_as_linear)


@functools.cache
def _base_forward(kind: type[LoRALinear]) -> object:
    return base_type(kind).forward


class LoRAConv1D(LoRALayer):
    r"""GPT-2's ``Conv1D``, a linear layer that stores ``W^T`` ``(in, out)``, plus a low-rank update.

    ``A`` and ``B`` have the shapes of `LoRALinear`; only merging transposes.

    Shape:
        - ``weight``: ``(in, out)``, ``A``: ``(rank, in)``, ``B``: ``(out, rank)``.
        - Input ``(*, in)``, output ``(*, out)``.
    """

    bias: Tensor | None

    @staticmethod
    @override
    def dimensions(module: Any) -> tuple[int, int]:
        return module.nx, module.nf

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_active:
            return super().forward(x)
        if not can_fuse(x, self.weight, self.bias):
            y = super().forward(x)
            return y + _update(self, x, *self.update_pair()).to(y.dtype)
        A, B = self.update_pair()
        adapted = AdaptedWeight(self.weight.T, self.bias, A, B, self.lora_spec.scale, self, self.lora_keeps_gate)
        return fused_lora_linears(x, [adapted], self.lora_dropout)[0]

    @override
    def base_matrix(self, weight: str = "weight") -> Tensor:
        return self.weight.T

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        return super().weight_delta(weight).T
