r"""A group of linear layers and their updates in plain operations, for `torch.compile`.

A compiler sees every operation: it keeps or computes again what the backward pass needs, and adds products where that
is fast. What it cannot see is that layers have one input: here they share one product with it, forward and backward.

Shape legend: ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.linear_group import AdaptedWeight


def compiled_lora_linears(
    x: Tensor, layers: Sequence[AdaptedWeight], dropout: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """``x W^T + b + scale * drop(x) A^T B^T`` of each layer; what is dropped is the same for all of them.

    Args:
        x: ``(*, in)``.
        layers: One or more layers with the input ``x``.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``.
        dtype: The type in which torch multiplies by ``x`` here.

    Returns:
        ``(*, out)`` for each layer.
    """
    dropped = F.dropout(x, dropout) if dropout else x
    # The scale multiplies factors in their own type, before they are cast: a few thousand numbers instead of rows.
    As = [layer.A * layer.scale for layer in layers]
    if len(layers) > 1:
        inner = F.linear(dropped, torch.cat(As).to(dtype)).split([len(A) for A in As], -1)
    else:
        inner = [F.linear(dropped, As[0].to(dtype))]
    return tuple(
        F.linear(x, layer.weight, layer.bias) + F.linear(part, layer.B.to(dtype))
        for layer, part in zip(layers, inner, strict=True)
    )
