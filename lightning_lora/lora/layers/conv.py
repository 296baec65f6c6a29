"""Adapted convolutions, plain and transposed, of one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.effective_weights import effective_weights

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class LoRAConvolution(LoRALayer):
    """Base of adapted convolutions, whose factors are matrices over the unfolded kernel.

    A subclass with a ``forward`` of its own (weight standardisation, padding that depends on the input) runs unchanged
    with the effective weight ``W + scale * B A`` in place of ``W``; dropout cannot act there and is refused.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def computes_as_torch(module: Any) -> bool:
        """Whether an unadapted module computes as torch's own convolutions do, not by a ``forward`` of its own."""
        for name in ("forward", "_conv_forward"):
            owners = (kind for kind in type(module).__mro__ if name in vars(kind) and not issubclass(kind, LoRALayer))
            owner = next(owners, None)
            if owner is not None and owner.__module__ != nn.Conv2d.__module__:
                return False
        return True

    @classmethod
    @override
    def takes_dropout(cls, module: Any) -> bool:
        return cls.computes_as_torch(module)

    @override
    def base_matrix(self, weight: str = "weight") -> Tensor:
        return self.weight.flatten(1)

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        return super().weight_delta(weight).reshape(self.weight.shape)

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_active:
            return super().forward(input, *args, **kwargs)
        if not self.computes_as_torch(self):
            with effective_weights([self]):
                return super().forward(input, *args, **kwargs)
        y = super().forward(input, *args, **kwargs)
        x = F.dropout(input, self.lora_dropout) if self.lora_dropout else input
        return y + self._update(x, *args, **kwargs)

    def _update(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    @property
    def _forms_delta(self) -> bool:
        """Whether ``rank`` channels for every group are no fewer than the layer's own, as in depthwise convolutions."""
        return self.groups > 1 and self.groups * self.lora_spec.rank >= max(self.in_channels, self.out_channels)

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A grouped convolution with kernel 1; ``weight`` is ``(out, in / groups)``."""
        ones = (1,) * len(self.kernel_size)
        return _CONVOLUTIONS[len(ones)](x, weight.reshape(*weight.shape, *ones).to(x.dtype), groups=self.groups)


class LoRAConv(LoRAConvolution):
    r"""A frozen convolution plus a low-rank update: ``W * x + b + scale * B (A * x)``.

    A convolution to ``rank`` channels with the stride, padding and dilation of the layer comes first (in every group,
    from the same ``A``), then one with kernel 1. The update of the kernel, ``B A`` reshaped, is formed for merging, and
    in layers with so many groups that forming it is cheaper than ``rank`` channels for each.

    Shape:
        - ``W``: ``(out, in / groups, *kernel)``.
        - ``A``: ``(rank, in / groups * prod(kernel))``, ``B``: ``(out, rank)``.
    """

    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @staticmethod
    @override
    def dimensions(module: Any) -> tuple[int, int]:
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels

    @override
    def _update(self, x: Tensor) -> Tensor:
        if self._forms_delta:
            return self._conv_forward(x, self.weight_delta().to(x.dtype), None)
        A, B = self.update_pair()
        A = A.reshape(A.shape[0], -1, *self.kernel_size).to(x.dtype)
        inner = self._conv_forward(x, A.repeat(self.groups, *[1] * (A.ndim - 1)), None)
        return self._pointwise(inner, B * self.lora_spec.scale)


class LoRAConvTranspose(LoRAConvolution):
    r"""A frozen transposed convolution plus a low-rank update, which starts with a kernel of 1 to ``rank`` channels.

    Shape:
        - ``W``: ``(in, out / groups, *kernel)``.
        - ``A``: ``(rank, in)``, ``B``: ``(out / groups * prod(kernel), rank)``; the update of ``W`` is ``(B A)^T``.
    """

    output_padding: tuple[int, ...]
    _output_padding: Callable[..., list[int]]

    @staticmethod
    @override
    def dimensions(module: Any) -> tuple[int, int]:
        return module.in_channels, module.out_channels // module.groups * math.prod(module.kernel_size)

    @override
    def base_matrix(self, weight: str = "weight") -> Tensor:
        return self.weight.flatten(1).T

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        return LoRALayer.weight_delta(self, weight).T.reshape(self.weight.shape)

    @override
    def _update(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        num_dims = len(self.kernel_size)
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, num_dims, self.dilation
        )
        rest = (None, self.stride, self.padding, padding, self.groups, self.dilation)
        if self._forms_delta:
            return _TRANSPOSED[num_dims](x, self.weight_delta().to(x.dtype), *rest)
        rank = self.lora_spec.rank
        A, B = self.update_pair()
        A = A.reshape(rank, self.groups, -1).transpose(0, 1).reshape(self.groups * rank, -1)
        B = (B * self.lora_spec.scale).T.reshape(rank, -1, *self.kernel_size).to(x.dtype)
        return _TRANSPOSED[num_dims](self._pointwise(x, A), B.repeat(self.groups, *[1] * (num_dims + 1)), *rest)
