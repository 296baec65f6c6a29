r"""Adapted layers with a magnitude (DoRA): ``W' = m (W + scale * B A) / ||W + scale * B A||``.

The norm is that of each output feature, and a constant for autograd (section 4.3 of the paper). So an adapted layer is
the one without magnitude, followed by one factor for each output: ``y = g (W x + scale * B A x) + b`` with
``g = m / ||W + scale * B A||``. ``m`` starts as the norm of ``W``, where ``g`` is 1. All is as in PEFT.

References:
    Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, ICML 2024, https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_lora.lora.functional import linear_update, magnitude_ratio, rescaled, row_norms
from lightning_lora.lora.functional.torch_internals import has_values
from lightning_lora.lora.layers.base import MAGNITUDE, AdapterSpec, LoRALayer
from lightning_lora.lora.layers.conv import LoRAConv
from lightning_lora.lora.layers.effective_weights import effective_weights
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.lora.layers.quantised_weights import dequantised, is_quantised
from lightning_lora.lora.shards import is_dtensor, is_flattened


class DoRALayer(LoRALayer):
    """Base of adapted layers with ``lora_magnitude`` ``(out,)`` beside ``lora_A`` and ``lora_B``.

    A row of the base that is zero has no direction and keeps a magnitude of zero at first; it learns slowly.
    """

    lora_magnitude: nn.Parameter
    # The axis of the parameter along which output features lie.
    lora_output_axis = 0

    @classmethod
    @override
    def factor_shapes(cls, module: Any, weight: str, spec: AdapterSpec) -> tuple[tuple[int, ...], ...]:
        return *super().factor_shapes(module, weight, spec), (cls.weights(module)[weight].num_out,)

    @override
    def lora_factors(self) -> dict[str, nn.Parameter]:
        return super().lora_factors() | {MAGNITUDE: self.lora_magnitude}

    @override
    @torch.no_grad()
    def reset_factors(self) -> None:
        """Reset ``A`` and ``B`` as without a magnitude, and set the magnitude to the norms of the base weight."""
        super().reset_factors()
        self.lora_magnitude.copy_(self.lora_norms())

    def lora_norms(self) -> Tensor:
        """``||W + scale * B A||`` of every output feature, ``(out,)``."""
        return self._norms(self.lora_spec.scale)

    def _norms(self, scale: float) -> Tensor:
        weight = self.base_weight()
        matrix = weight.T if self.lora_output_axis else weight.flatten(1)
        return row_norms(matrix, *self.lora_pair(), scale)

    @torch.no_grad()
    def magnitude_change(self) -> float:
        """How far the magnitudes are from the norms of ``W``, ``|m - ||W||| / |||W|||`` over all output features."""
        norms = self._norms(0.0)
        return float((self.lora_magnitude - norms).norm() / norms.norm())

    def lora_ratio(self) -> Tensor:
        """``m / ||W + scale * B A||`` of every output feature, ``(out,)``."""
        return magnitude_ratio(self.lora_magnitude, self.lora_norms())

    @property
    def _is_fresh(self) -> bool:
        """Whether magnitudes are the norms of the weight, as at first; False if they are sharded or have no values."""
        tensors = (self.weight, *self.lora_factors().values())
        if self.lora_merged or any(is_dtensor(t) or is_flattened(t) or not has_values(t) for t in tensors):
            return False
        if self.lora_moved:
            return False
        magnitude = self.lora_magnitude.detach()
        return torch.allclose(self.lora_norms().to(magnitude.dtype), magnitude, rtol=0, atol=0, equal_nan=True)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let fresh magnitudes follow a weight that gets another type or is quantised; never lower their own type."""
        is_fresh, before = self._is_fresh, self.lora_magnitude.data
        super()._apply(fn, recurse)
        magnitude = self.lora_magnitude
        dtype = torch.promote_types(before.dtype, magnitude.dtype)
        if is_fresh and not magnitude.is_meta:
            magnitude.data = self.lora_norms().to(dtype)
        elif dtype != magnitude.dtype and not is_dtensor(magnitude):
            magnitude.data = before.to(magnitude.device)
        return self

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Let fresh magnitudes follow a base weight that is loaded without adapters."""
        is_fresh = self._is_fresh
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if is_fresh and f"{prefix}{MAGNITUDE}" not in state_dict and not self.lora_magnitude.is_meta:
            with torch.no_grad():
                self.lora_magnitude.copy_(self.lora_norms())

    def base_weight(self) -> Tensor:
        """The frozen weight in the layout of the parameter, also while the update is merged."""
        return self.weight if self.lora_base_weights is None else self.lora_base_weights["weight"]

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        """``W' - W`` in the layout of the parameter and at least float32, differentiable by factors and magnitude."""
        delta = super().weight_delta(weight)
        ratio = self.lora_ratio()
        ratio = ratio if self.lora_output_axis else ratio.reshape(-1, *[1] * (delta.ndim - 1))
        return (ratio - 1) * self.base_weight().to(delta.dtype) + ratio * delta

    def _scaled(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer without magnitude, times the ratio."""
        bias: Any = self.bias
        bias = None if bias is None else self._over_features(bias)
        ratio = self._over_features(self.lora_ratio())
        if not self.lora_dropout:
            return rescaled(super().forward(x, *args, **kwargs), bias, ratio)
        # As in the paper's code and PEFT, the factor on the base's own product sees the dropped input too.
        dropped = F.dropout(x, self.lora_dropout)
        if self.lora_watcher is not None:
            self.lora_watcher(dropped)
        with _disabled(self):
            y, product = super().forward(x, *args, **kwargs), super().forward(dropped, *args, **kwargs)
        product = product if bias is None else product - bias.to(y.dtype)
        update = self._update_of(dropped).to(y.dtype)
        return y + (ratio - 1).to(y.dtype) * product + ratio.to(y.dtype) * update

    def _over_features(self, values: Tensor) -> Tensor:
        """Values of each output feature, in a shape that broadcasts to the output."""
        return values

    def _update_of(self, dropped: Tensor) -> Tensor:
        """``scale * B A`` times an input that has been dropped already."""
        return linear_update(dropped, *self.lora_pair(), self.lora_spec.scale)


class DoRALinear(DoRALayer, LoRALinear):
    r"""A frozen linear layer whose rows learn directions and magnitudes: ``y = m (W + scale * B A) x / ||...|| + b``.

    A subclass with a ``forward`` of its own runs unchanged with ``W'`` in place of ``W``.

    Shape:
        - ``W``: ``(out, in)``, ``A``: ``(rank, in)``, ``B``: ``(out, rank)``, ``m``: ``(out,)``.
        - Input ``(*, in)``, output ``(*, out)``.
    """

    @classmethod
    @override
    def takes_dropout(cls, module: Any) -> bool:
        owners = (kind for kind in type(module).__mro__ if "forward" in vars(kind) and not issubclass(kind, LoRALayer))
        return next(owners) is nn.Linear

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.lora_active:
            return super().forward(input)
        if not self.takes_dropout(self):
            with effective_weights([self]):
                return super().forward(input)
        return self._scaled(input)


class DoRAConv1D(DoRALayer, LoRAConv1D):
    r"""GPT-2's ``Conv1D``, which stores ``W^T`` ``(in, out)``, with magnitudes as in `DoRALinear`."""

    lora_output_axis = 1

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(x) if self.lora_active else super().forward(x)


class DoRAConv(DoRALayer, LoRAConv):
    r"""A frozen convolution whose kernels, one for each output channel, learn directions and magnitudes."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.lora_active or not self.computes_as_torch(self):
            return super().forward(input)
        return self._scaled(input)

    @override
    def _over_features(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * len(self.kernel_size))

    @override
    def _update_of(self, dropped: Tensor) -> Tensor:
        return self._update(dropped)


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    r"""A frozen embedding table with one magnitude for each feature, as in PEFT: the norm runs over the vocabulary.

    So every row changes with the magnitudes, unlike in `LoRAEmbedding`.

    Shape:
        - ``W``: ``(vocab, dim)``, ``A``: ``(rank, vocab)``, ``B``: ``(dim, rank)``, ``m``: ``(dim,)``.
    """

    lora_output_axis = 1

    @override
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return rescaled(y, None, self.lora_ratio()) if self.lora_active else y


class DoRAQuantisedLinear(DoRALayer, LoRAQuantisedLinear):
    r"""A quantised linear layer with magnitudes as in `DoRALinear`; norms are those of the numbers it stands for."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self._scaled(input) if self.lora_active else super().forward(input)

    @override
    def base_weight(self) -> Tensor:
        # A merged layer holds the quantised weight aside, which alone cannot be read.
        assert not self.lora_merged
        return dequantised(self) if is_quantised(self.weight) else self.weight


_KINDS: dict[type[LoRALayer], type[DoRALayer]] = {
    LoRALinear: DoRALinear,
    LoRAConv1D: DoRAConv1D,
    LoRAConv: DoRAConv,
    LoRAEmbedding: DoRAEmbedding,
    LoRAQuantisedLinear: DoRAQuantisedLinear,
}


def with_magnitude(kind: type[LoRALayer]) -> type[DoRALayer] | None:
    """The adapted layer with a magnitude for one without; None if there is none."""
    return _KINDS.get(kind)


@contextmanager
def _disabled(layer: LoRALayer) -> Iterator[None]:
    layer.lora_enabled = False
    try:
        yield
    finally:
        layer.lora_enabled = True
