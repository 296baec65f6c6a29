"""Adapted experts whose weights a mixture of experts fuses into three-dimensional parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import LayerError
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer, WeightShape
from lightning_lora.lora.layers.effective_weights import effective_weights
from lightning_lora.lora.layers.expert_weights import ExpertWeight

# How transformers' experts interface names the implementations that use torch's products only.
_IN_TORCH = (None, "eager", "batched_mm", "grouped_mm")


class LoRAFusedExperts(LoRALayer):
    """Base of layers of fused experts: two weights, each with a low-rank update for every expert.

    With ``share_expert_factors`` all experts share the factor that touches the hidden dimension (``A`` of the first
    weight, ``B`` of the second).

    Shape:
        - Weights: ``(experts, out, in)``, or ``(experts, in, out)`` where `transposed` is true.
        - ``<weight>_lora_A``: ``(experts, rank, in)``, ``<weight>_lora_B``: ``(experts, out, rank)``; a shared factor
          has 1 for ``experts``.
    """

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
    def factor_shapes(cls, module: Any, weight: str, spec: AdapterSpec) -> tuple[tuple[int, ...], ...]:
        A, B = super().factor_shapes(module, weight, spec)
        if spec.config.share_expert_factors:
            inward = weight == cls.parameter_names(module)[0]
            return ((1, *A[1:]), B) if inward else (A, (1, *B[1:]))
        return A, B

    @override
    def base_matrix(self, weight: str = "weight") -> Tensor:
        matrices = getattr(self, weight)
        return matrices.mT if self.transposed(self) else matrices

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        delta = super().weight_delta(weight)
        return delta.transpose(1, 2) if self.transposed(self) else delta

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_active:
            return super().forward(*args, **kwargs)
        if not self._computes_in_torch():
            with effective_weights([self]):
                return super().forward(*args, **kwargs)
        base = {name: self._parameters[name] for name in self.lora_specs}
        adding: dict[str, Any] = {name: self._expert_weight(name) for name in base}
        try:
            self._parameters.update(adding)
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(base)

    def _expert_weight(self, weight: str) -> ExpertWeight:
        A, B = self.update_pair(weight)
        scale = self.lora_specs[weight].scale
        own = getattr(self, weight), A, B, scale, self.lora_dropout, self, self.transposed(self)
        return ExpertWeight(*own, self.lora_keeps_gate)

    def _computes_in_torch(self) -> bool:
        """Whether the base multiplies by its weights through functions of torch, where an update can be added."""
        return True


class LoRAExperts(LoRAFusedExperts):
    r"""Fused experts of transformers' experts interface: ``y_e = W_e x + scale * B_e A_e x`` for each active expert.

    Both weights take part: ``gate_up_proj`` (``up_proj`` where there is no gate) and ``down_proj``. The layer computes
    as its model's config says, with the code of transformers, and only products of width ``rank`` are added: no
    expert's ``B A`` is ever formed. Kernels that read the weights themselves get ``W + scale * B A``.

    Shape:
        - Input: hidden states ``(tokens, hidden)``, experts ``(tokens, k)``, their weights ``(tokens, k)``.
        - Output: ``(tokens, hidden)``.
    """

    config: Any

    @staticmethod
    @override
    def transposed(module: Any) -> bool:
        return module.is_transposed

    @staticmethod
    @override
    def parameter_names(module: Any) -> tuple[str, str]:
        return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"

    @override
    def _computes_in_torch(self) -> bool:
        implementation = getattr(self.config, "_experts_implementation", None)
        if implementation in _IN_TORCH:
            return True
        if self.lora_dropout:
            raise LayerError(
                f"the experts compute by {implementation!r}, a kernel that reads their weights, so dropout cannot act "
                f"on the input of their update: set dropout=0, or call model.set_experts_implementation('grouped_mm')."
            )
        return False


class LoRADenseExperts(LoRAFusedExperts):
    """Fused experts that each see all tokens, as in Llama 4; their input is multiplied by the router's weights already.

    Shape:
        - Weights: ``(experts, in, out)``.
        - Input and output: ``(experts * tokens, hidden)``, expert after expert.
    """

    @staticmethod
    @override
    def transposed(module: Any) -> bool:
        return True

    @staticmethod
    @override
    def parameter_names(module: Any) -> tuple[str, str]:
        return "gate_up_proj", "down_proj"
