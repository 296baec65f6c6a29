"""Floating-point operations of attention, of as many heads of keys as of queries or fewer.

`torch.utils.flop_counter` of torch 2.11 refuses fewer heads of keys and values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


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
