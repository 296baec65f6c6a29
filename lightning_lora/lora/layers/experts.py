"""Adapted experts whose weights a mixture of experts fuses into three-dimensional parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.lora.functional import AdaptedWeight, can_fuse
from lightning_lora.lora.functional.experts import (
    combine_experts,
    dispatch,
    expert_linear,
    expert_update,
    sort_by_expert,
)
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer, WeightShape


class LoRAFusedExperts(LoRALayer):
    """Base of layers of fused experts: two weights, each with a low-rank update for every expert.

    With ``share_expert_factors`` all experts share the factor that touches the hidden dimension (``A`` of the first
    weight, ``B`` of the second).

    Shape:
        - Weights: ``(experts, out, in)``, or ``(experts, in, out)`` where `transposed` is true.
        - ``<weight>_lora_A``: ``(experts, rank, in)``, ``<weight>_lora_B``: ``(experts, out, rank)``; a shared factor
          has 1 for ``experts``.
    """

    has_bias: bool

    @staticmethod
    def transposed(module: Any) -> bool:
        """Whether the weights are stored ``(experts, in, out)``."""
        raise NotImplementedError

    @staticmethod
    def parameter_names(module: Any) -> tuple[str, str]:
        """Names of the weight that maps hidden states to the inner dimension, and of the one that maps back."""
        raise NotImplementedError

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        shapes = {}
        for name in cls.parameter_names(module):
            num_experts, num_out, num_in = getattr(module, name).shape
            if cls.transposed(module):
                num_out, num_in = num_in, num_out
            shapes[name] = WeightShape(num_in, num_out, num_experts)
        return shapes

    @classmethod
    @override
    def factor_shapes(cls, module: Any, weight: str, spec: AdapterSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        A, B = super().factor_shapes(module, weight, spec)
        if spec.config.share_expert_factors:
            inward = weight == cls.parameter_names(module)[0]
            return ((1, *A[1:]), B) if inward else (A, (1, *B[1:]))
        return A, B

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        delta = super().weight_delta(weight)
        return delta.transpose(1, 2) if self.transposed(self) else delta

    def expert_matrices(self, weight: str) -> Tensor:
        """The parameter called ``weight`` as ``(experts, out, in)``."""
        stored = getattr(self, weight)
        return stored.transpose(1, 2) if self.transposed(self) else stored

    def adapted_product(self, x: Tensor, weight: str, counts: list[int]) -> Tensor:
        """Rows sorted by expert times a weight and its update, plus the bias: ``(rows, in)`` to ``(rows, out)``."""
        matrices = self.expert_matrices(weight)
        bias = getattr(self, f"{weight}_bias") if self.has_bias else None
        if weight not in self.lora_specs:
            return _with_bias(expert_linear(x, matrices, counts), bias, counts)
        A, B = self.lora_pair(weight)
        scale, dropout = self.lora_specs[weight].scale, self.lora_dropout
        if can_fuse(x, matrices, bias):
            adapted = AdaptedWeight(matrices, bias, A.to(x.dtype), B.to(x.dtype), scale, self)
            return fused_expert_linear(x, adapted, counts, dropout)
        y = _with_bias(expert_linear(x, matrices, counts), bias, counts)
        return y + expert_update(x, A, B, scale, counts, dropout)


class LoRAExperts(LoRAFusedExperts):
    r"""Fused experts of transformers' experts interface: ``y_e = W_e x + scale * B_e A_e x`` for each active expert.

    Both weights take part: ``gate_up_proj`` (``up_proj`` where there is no gate) and ``down_proj``. Tokens are sorted
    by expert once, and only products of width ``rank`` are added: no expert's ``B A`` is ever formed. Gate, bias and
    norm are those of the layer. Where no adapter is active, the layer computes as transformers does.

    Shape:
        - Input: hidden states ``(tokens, hidden)``, experts ``(tokens, k)``, their weights ``(tokens, k)``.
        - Output: ``(tokens, hidden)``.
    """

    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    @staticmethod
    @override
    def transposed(module: Any) -> bool:
        return module.is_transposed

    @staticmethod
    @override
    def parameter_names(module: Any) -> tuple[str, str]:
        return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._adapted(*args, **kwargs) if self.lora_active else super().forward(*args, **kwargs)

    def _adapted(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = self.parameter_names(self)
        routing = sort_by_expert(top_k_index, getattr(self, down).shape[0])
        inner = self.adapted_product(dispatch(hidden_states, routing), up, routing.counts)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y = self.adapted_product(inner, down, routing.counts)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        return combine_experts(y, routing, top_k_weights).to(hidden_states.dtype)


class LoRADenseExperts(LoRAFusedExperts):
    """Fused experts that each see all tokens, as in Llama 4; their input is multiplied by the router's weights already.

    Shape:
        - Weights: ``(experts, in, out)``.
        - Input and output: ``(experts * tokens, hidden)``, expert after expert.
    """

    has_bias = False
    act_fn: Callable[[Tensor], Tensor]

    @staticmethod
    @override
    def transposed(module: Any) -> bool:
        return True

    @staticmethod
    @override
    def parameter_names(module: Any) -> tuple[str, str]:
        return "gate_up_proj", "down_proj"

    @override
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.lora_active:
            return super().forward(hidden_states)
        num_experts = self.weights(self)["down_proj"].num_experts
        counts = [len(hidden_states) // num_experts] * num_experts
        gate, up = self.adapted_product(hidden_states, "gate_up_proj", counts).chunk(2, dim=-1)
        return self.adapted_product(up * self.act_fn(gate), "down_proj", counts)


def _with_bias(y: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """Add the bias of each expert, ``(experts, out)``, to its rows of ``y``, ``(rows, out)`` sorted by expert."""
    if bias is None:
        return y
    return y + bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0, output_size=len(y))
