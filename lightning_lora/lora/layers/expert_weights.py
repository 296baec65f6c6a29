"""Fused weights of experts that add their update wherever the base's own code multiplies by them.

How a mixture of experts computes is a choice of its model: token by token, expert by expert, or in one grouped product,
with a bias after the product or none, in the type of an autocast region or not. Sums of another order are other bits.
So the base's code runs as it is, and its weights are replaced by objects that take part in torch's products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional import AdaptedWeight, can_fuse, fused_lora_linears, linear_update, merged_weight
from lightning_lora.lora.functional.expert_rows import can_multiply, rows_by_expert
from lightning_lora.lora.functional.experts import expert_linear, expert_update, grouped_update
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.functional.torch_internals import let_arguments_override

# What `torch.nn.functional.grouped_mm` calls.
let_arguments_override(torch._grouped_mm)

# Facts about a weight that do not depend on its values.
_FACTS = {"shape", "dtype", "device", "ndim", "dim", "size", "stride", "layout", "is_cuda", "data_ptr", "is_contiguous"}


@dataclass(eq=False)
class ExpertWeight:
    """A weight ``(experts, in, out)``, or one expert's ``(in, out)``, that adds its update to every product with it.

    It can be indexed by expert and transposed. For torch functions that are no products it is ``W + scale * B A``.

    Args:
        weight: The frozen weight, as indexed and transposed so far.
        A: ``(experts, rank, in)``, or ``(1, rank, in)`` shared by all experts; without the first axis for one expert.
        B: ``(experts, out, rank)``, or ``(1, out, rank)``; likewise.
        scale: Factor of the update.
        dropout: Probability of zeroing an entry of the update's input.
        caller: The layer, by which dropout tells callers apart.
        transposed: Whether ``weight`` is ``(*, in, out)``, not ``(*, out, in)``.
        keeps_gate: Whether an input that a gate computed is kept for the backward pass.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    caller: object
    transposed: bool
    keeps_gate: bool = False

    def __getitem__(self, expert: Any) -> Any:
        if self.weight.ndim != 3 or isinstance(expert, (tuple, slice, list)) or expert is None or expert is Ellipsis:
            return self.effective()[expert]
        if not isinstance(expert, Tensor) or expert.ndim == 0:
            A, B = (own[int(expert) if len(own) > 1 else 0] for own in self._own_factors)
        else:
            A, B = (factor[expert] if len(factor) > 1 else factor for factor in (self.A, self.B))
        return replace(self, weight=self.weight[expert], A=A, B=B)

    @cached_property
    def _own_factors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # Split once: the gradient of a factor indexed by expert would be filled with zeros anew for every expert.
        return self.A.unbind(), self.B.unbind()

    def transpose(self, first: int, second: int) -> Any:
        """The weight with its last two axes swapped."""
        if {first % self.weight.ndim, second % self.weight.ndim} != {self.weight.ndim - 2, self.weight.ndim - 1}:
            return self.effective().transpose(first, second)
        return replace(self, weight=self.weight.transpose(first, second), transposed=not self.transposed)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        if name == "mT" or (name == "T" and self.weight.ndim == 2):
            return self.transpose(-2, -1)
        return getattr(self.weight if name in _FACTS else self.effective(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Add the update to a product with one of these weights; call ``func`` with effective weights otherwise."""
        kwargs = dict(kwargs or {})
        product = _PRODUCTS.get(getattr(func, "__name__", ""))
        result = product(func, *args, **kwargs) if product is not None else NotImplemented
        if result is not NotImplemented:
            return result
        kwargs = {name: _effective(value) for name, value in kwargs.items()}
        return func(*map(_effective, args), **kwargs)

    def effective(self) -> Tensor:
        """``W + scale * B A`` in the layout of the weight, rounded once to its type."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        delta = (self.B.to(dtype) @ self.A.to(dtype)) * self.scale
        return merged_weight(self.weight, delta.mT if self.transposed else delta)

    def matrices(self) -> Tensor:
        """The weight as ``(*, out, in)``."""
        return self.weight.mT if self.transposed else self.weight

    def adapted(self) -> AdaptedWeight:
        """Weight and factors."""
        return AdaptedWeight(self.matrices(), None, self.A, self.B, self.scale, self.caller, self.keeps_gate)


def _effective(value: Any) -> Any:
    return value.effective() if isinstance(value, ExpertWeight) else value


def _linear(func: Callable[..., Tensor], x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """``x W^T + b`` of one expert."""
    if not isinstance(weight, ExpertWeight) or weight.weight.ndim != 2 or weight.transposed:
        return NotImplemented
    if can_fuse(x, weight.weight, bias):
        return fused_lora_linears(x, [weight.adapted()._replace(bias=bias)], weight.dropout)[0]
    return _with_update(func(x, weight.weight, bias), x, weight)


def _matmul(func: Callable[..., Tensor], x: Any, weight: Any) -> Any:
    """``x W`` of one expert, or of each expert."""
    if not isinstance(x, Tensor) or not isinstance(weight, ExpertWeight) or not weight.transposed:
        return NotImplemented
    if weight.weight.ndim == 3:
        return _batched(func, x, weight)
    if can_fuse(x, weight.weight, None):
        return fused_lora_linears(x, [weight.adapted()], weight.dropout)[0]
    return _with_update(func(x, weight.weight), x, weight)


def _batched(func: Callable[..., Tensor], first: Any, second: Any) -> Any:
    """``x_e W_e`` with ``x`` ``(E, rows, in)``, or ``W_e x_e`` with ``x`` ``(E, in, rows)``, of each expert."""
    if isinstance(second, ExpertWeight) and second.transposed:
        return _with_update(func(first, second.weight), first, second)
    if isinstance(first, ExpertWeight) and not first.transposed and isinstance(second, Tensor):
        return _with_update(func(first.weight, second).mT, second.mT, first).mT
    return NotImplemented


def _grouped(func: Callable[..., Tensor], x: Any, weight: Any, offs: Any = None, **options: Any) -> Any:
    """``x_e W_e`` of rows sorted by expert; ``offs`` holds the end of each expert's rows."""
    has_options = any(value is not None for value in options.values())
    if not isinstance(weight, ExpertWeight) or not weight.transposed or offs is None or has_options or x.ndim != 2:
        return NotImplemented
    if torch.compiler.is_compiling():
        update = grouped_update(x, weight.A, weight.B, weight.scale, offs, func, weight.dropout)
        return func(x, weight.weight, offs=offs) + update
    rows = rows_by_expert(x, weight.matrices(), offs)

    def product(x: Tensor, matrices: Tensor) -> Tensor:
        if can_multiply(x, matrices):
            return func(x, matrices, offs=offs)
        counts = rows.counts
        return _padded(expert_linear(x[: sum(counts)], matrices.mT, counts), len(x))

    if _can_fuse_grouped(x, weight.weight):
        return fused_expert_linear(x, weight.adapted(), rows, weight.dropout, product)
    y, counts = product(x, weight.weight), rows.counts
    update = expert_update(x[: sum(counts)], weight.A, weight.B, weight.scale, counts, weight.dropout)
    return y + _padded(update.to(y.dtype), len(y))


def _padded(y: Tensor, num_rows: int) -> Tensor:
    """``y`` with rows of zeros for those that belong to no expert."""
    return y if len(y) == num_rows else F.pad(y, (0, 0, 0, num_rows - len(y)))


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _batched,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}


def _with_update(y: Tensor, x: Tensor, weight: ExpertWeight) -> Tensor:
    """``y + scale * drop(x) A^T B^T``, ``(*, out)``."""
    x = F.dropout(x, weight.dropout) if weight.dropout else x
    if weight.weight.ndim == 2:
        return y + linear_update(x, weight.A, weight.B, weight.scale).to(y.dtype)
    inner = (x @ weight.A.to(x.dtype).mT) * weight.scale
    return y + (inner @ weight.B.to(x.dtype).mT).to(y.dtype)


def _can_fuse_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether `can_fuse` without autocast, under which grouped products keep their type."""
    with torch.autocast(x.device.type, enabled=False):
        return can_fuse(x, weight, None)
