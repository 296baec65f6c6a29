"""What is counted of an operation: floating-point operations, and bytes that it holds only while it runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Operations of forward: scores and their product with the values.

    Args:
        query: ``(batch, heads, queries, width)``.
        key: ``(batch, heads or a divisor, keys, width)``.
        value: ``(batch, as key, keys, width of values)``.
    """
    return _pairs(query, key) * (query.shape[-1] + value.shape[-1])


def attention_backward_flops(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Operations of backward: the scores again, and the gradients of scores, values, queries and keys."""
    return _pairs(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _pairs(query: Tensor, key: Tensor) -> int:
    """Multiplications and additions for each number of width, over all pairs of a query and a key."""
    batch, heads, queries, _ = query.shape
    return 2 * batch * heads * queries * key.shape[-2]


aten: Any = torch.ops.aten


class Counted(NamedTuple):
    """What is counted of an operation.

    Args:
        flops: Its floating-point operations from arguments, keyword arguments and result; None if it has none.
        is_attention: Whether they grow with the square of a row's length.
        inside: Bytes that it holds inside and does not return, from its arguments.
    """

    flops: Callable[[Any, Any, Any], int] | None
    is_attention: bool
    inside: Callable[..., int] | None


@functools.cache
def counted_of(func: Any) -> Counted:
    """What is counted of an operation, looked up once."""
    packet = getattr(func, "_overloadpacket", None)
    flops = None
    if (own := _OWN_FLOPS.get(str(packet))) is not None:
        flops = functools.partial(_by_own, own)
    elif (formula := _formula(packet)) is not None:
        flops = functools.partial(_by_formula, formula)
    return Counted(flops, "_attention" in str(func), _INSIDE.get(str(func)))


def _formula(packet: Any) -> Any:
    formula = flop_registry.get(packet)
    if formula is None and str(packet).endswith("_"):
        # The registry of torch lacks the forms that write into their first argument.
        namespace, _, name = str(packet).rpartition(".")
        formula = flop_registry.get(getattr(aten, name[:-1], None)) if namespace == "aten" else None
    return formula


def _by_own(formula: Any, args: Any, kwargs: Any, result: Any) -> int:
    return formula(*args)


def _by_formula(formula: Any, args: Any, kwargs: Any, result: Any) -> int:
    return formula(*args, **{name: value for name, value in kwargs.items() if name != "out"}, out_val=result)


def _dequantised(x: Tensor, _: Tensor, shape: Sequence[int], *__: Any) -> int:
    return math.prod(shape) * x.element_size()


def _widened(x: Tensor, _: int, dtype: torch.dtype | None = None, **__: Any) -> int:
    return 0 if dtype in (None, x.dtype) else x.numel() * dtype.itemsize


def _reordered(x: Tensor, weight: Tensor, _: Tensor | None, stride: Sequence[int], *__: Any) -> int:
    outputs = x.shape[0] * weight.shape[0] * math.prod(-(-n // s) for n, s in zip(x.shape[2:], stride, strict=False))
    return max(x.nbytes + weight.nbytes, outputs * x.element_size())


def _reordered_backward(d_y: Tensor, x: Tensor, *arguments: Any) -> int:
    needs_weight = arguments[-1][1]
    return x.nbytes + d_y.nbytes if needs_weight else max(x.nbytes, d_y.nbytes)


# Operations that hold more inside than they return, on a CPU: copies in the layout of oneDNN, in another type, or of a
# dequantised weight; as the allocator's events show.
_INSIDE: dict[str, Any] = {
    "bitsandbytes.gemm_4bit.default": _dequantised,
    "aten.softmax.int_out": _widened,
    "aten.convolution.default": _reordered,
    "aten.convolution_backward.default": _reordered_backward,
}


def _grouped(x: Tensor, matrices: Tensor, *_: Any) -> int:
    """Every row (or column) takes part in one product."""
    if x.ndim == 2 and matrices.ndim == 2:  # (m, rows) (rows, n), one result for each group
        return 2 * x.shape[0] * x.shape[1] * matrices.shape[1]
    return 2 * x.numel() * matrices.shape[-1]


def _four_bits(x: Tensor, _: Tensor, shape: Sequence[int], *__: Any) -> int:
    return 2 * x.numel() * shape[0]


_OWN_FLOPS: dict[str, Any] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_flops,
    "aten._grouped_mm": _grouped,
    "bitsandbytes.gemm_4bit": _four_bits,
}
