"""Adapted linear layers on a quantised base."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.functional import merged_weight, rounding_loss
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.quantised_weights import dequantised, dtype_before, is_quantised

# What the layers of bitsandbytes, transformers and torchao hold that a plain linear does not.
_OF_QUANTISED = (
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

    The base is computed by the library that quantised it; its codes and scales are never written to. A merged layer
    holds ``deq(W) + scale * B A``, summed in float32 and rounded once to the type the weight had before it was
    quantised, and is a plain linear layer in all but name.

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
        # bitsandbytes casts the bias to the type of the input for good.
        if bias is not None and bias.dtype != kept.dtype:  # pyright: ignore[reportOptionalMemberAccess]
            bias.data = kept  # pyright: ignore[reportAttributeAccessIssue]
        return y

    @override
    @torch.no_grad()
    def merge(self) -> float:
        """Put a plain weight with the update folded in where the quantised one is, which is kept aside.

        A layer that follows another does so too: it holds the quantised weight itself, and the same factors.
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
        """Put the quantised weight back, the very object."""
        assert self.lora_base_weights is not None
        base = self.lora_base_weights["weight"]
        assert isinstance(base, nn.Parameter)
        self._parameters["weight"] = base
        self.lora_base_weights = None

    @property
    @override
    def type_without_adapter(self) -> type[nn.Module]:
        """The quantised class, or ``nn.Linear`` once a merged weight has taken its place."""
        return nn.modules.linear.Linear if self.lora_merged else super().type_without_adapter

    @override
    def before_detach(self) -> None:
        """Strip a merged layer of what only its quantised class used."""
        if not self.lora_merged:
            return
        for name in _OF_QUANTISED:
            self.__dict__.pop(name, None)
        hooks = self._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("bitsandbytes."):
                del hooks[key]

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.lora_merged:
            # Linear8bitLt would add the scales of a weight that is not there.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
