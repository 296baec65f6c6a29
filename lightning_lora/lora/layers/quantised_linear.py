"""Adapted linear layers on a quantised base."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.functional import merged_weight, rounding_loss
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.quantised_weights import dequantised, dtype_before, hook_module, is_quantised

# Attributes of layers of bitsandbytes, transformers and torchao that a plain linear layer does not have.
_QUANTISED_ATTRIBUTES = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "state",
    "index",
    "source_cls",
    "extra_repr",
)


class LoRAQuantisedLinear(LoRALinear):
    r"""A frozen quantised linear layer plus a low-rank update in full precision: ``y = deq(W) x + b + scale * B A x``.

    The library that quantised the base computes it; its codes and scales are never written to. A merged layer holds
    ``deq(W) + scale * B A``, summed in float32 and rounded once to the type that the weight had before it was
    quantised, and computes as a plain linear layer.

    Shape:
        - ``W``: ``(out, in)``, ``A``: ``(rank, in)``, ``B``: ``(out, rank)``.
        - Input ``(*, in)``, output ``(*, out)``.

    References:
        Dettmers et al., *QLoRA*, NeurIPS 2023, section 3, https://arxiv.org/abs/2305.14314
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if self.lora_merged:
            return F.linear(input, self.weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        kept = None if bias is None else bias.data
        y = super().forward(input)
        # bitsandbytes casts the bias to the type of the input and leaves it so.
        if bias is not None and bias.dtype != kept.dtype:  # pyright: ignore[reportOptionalMemberAccess]
            bias.data = kept  # pyright: ignore[reportAttributeAccessIssue]
        return y

    @override
    def base_matrix(self, weight: str = "weight") -> Tensor:
        return dequantised(self)

    @override
    @torch.no_grad()
    def merge(self) -> float:
        """Replace the quantised weight, which is kept aside, by a plain weight with the update folded in.

        A layer that shares the weight of another does so too, since it holds the quantised weight and the same factors.
        """
        base = self.weight
        value = dequantised(self) if is_quantised(base) else base.detach()
        delta = self.weight_delta().to(base.device)
        merged = merged_weight(value, delta).to(dtype_before(base))
        self._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
        self.lora_base_weights = {"weight": base}
        return rounding_loss(value, merged, delta) if merged.element_size() < 4 else 0.0

    @override
    def unmerge(self) -> None:
        """Restore the quantised weight, the very object."""
        assert self.lora_base_weights is not None
        base = self.lora_base_weights["weight"]
        assert isinstance(base, nn.Parameter)
        self._parameters["weight"] = base
        self.lora_base_weights = None

    @property
    @override
    def type_without_adapter(self) -> type[nn.Module]:
        """The quantised class, or ``nn.Linear`` while the weight is merged."""
        return nn.modules.linear.Linear if self.lora_merged else super().type_without_adapter

    @override
    def before_detach(self) -> None:
        """Remove what only the quantised class used from a merged layer."""
        super().before_detach()
        if not self.lora_merged:
            return
        for name in _QUANTISED_ATTRIBUTES:
            self.__dict__.pop(name, None)
        hooks = self._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if hook_module(hook).startswith("bitsandbytes."):
                del hooks[key]

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.lora_merged:
            # Linear8bitLt would add scales that a merged weight does not have.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
