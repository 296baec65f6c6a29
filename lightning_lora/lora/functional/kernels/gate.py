"""``x = activation(gate) * up`` and the gradients of both from that of ``x``, one pass over each tensor.

Everything between loading and storing is float32, so each result is rounded once.

Shape legend: ``*`` any leading axes, ``T`` all of them together, ``ff`` width of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.lora.functional.torch_internals import uninitialised

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": True}
"""Options of every launch; Triton warns where nobody says whether a product and a sum may be rounded together."""


def gated_product(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``, ``(*, ff)``, contiguous.

    Args:
        activation: ``"silu"``, or how gelu is approximated: ``"none"`` or ``"tanh"``.
    """
    x = uninitialised(gate, gate.shape)
    _launch(_product, activation, [gate, up, x])
    return x


def gated_gradients(
    activation: str, gate: Tensor, up: Tensor, d_x: Tensor, gradients: Sequence[Tensor], product: bool
) -> Tensor:
    """Gradients of ``gate`` and ``up``, and ``x`` if asked for.

    Args:
        d_x: Gradient of ``x``, ``(*, ff)``.
        gradients: Where the gradients of ``gate`` and ``up`` are written; their rows must be evenly spaced.
        product: Whether to write ``activation(gate) * up`` over ``d_x``.

    Returns:
        ``d_x``, or a copy of it if its rows are not evenly spaced: ``x`` if ``product``.
    """
    d_rows = d_x.reshape(-1, d_x.shape[-1])
    _launch(_gradients, activation, [gate, up, d_rows, *gradients], PRODUCT=product)
    return d_rows.view(d_x.shape)


def _launch(kernel: triton.JITFunction, activation: str, tensors: Sequence[Tensor], **constants: bool) -> None:
    """Run a kernel on the rows of ``tensors``; those that are written must be viewable as rows."""
    width = tensors[0].shape[-1]
    rows = [tensor.reshape(-1, width) for tensor in tensors]
    strides = [stride for each in rows for stride in each.stride()]
    grid = (len(rows[0]), triton.cdiv(width, BLOCK))
    with torch.cuda.device_of(rows[0]):
        kernel[grid](*rows, *strides, width, ACTIVATION=activation, BLOCK=BLOCK, **constants, **OPTIONS)


@triton.jit
def _activation_and_slope(gate, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation, float32."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
        return gate * share, share * (1 + gate * (1 - share))
    elif ACTIVATION == "tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z), which loses no digits where tanh is near -1.
        share = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))
        inner_slope = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
        return gate * share, share + gate * share * (1 - share) * inner_slope
    else:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        return gate * share, share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _product(
    gate, up, x,
    gate_row, gate_column, up_row, up_column, x_row, x_column,
    width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_row + column * up_column, mask=inside).to(tl.float32)
    activated, _ = _activation_and_slope(g, ACTIVATION)
    tl.store(x + row * x_row + column * x_column, activated * u, mask=inside)


@triton.jit
def _gradients(
    gate, up, d_x, d_gate, d_up,
    gate_row, gate_column, up_row, up_column, d_x_row, d_x_column, d_gate_row, d_gate_column, d_up_row, d_up_column,
    width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_row + column * up_column, mask=inside).to(tl.float32)
    d = tl.load(d_x + row * d_x_row + column * d_x_column, mask=inside).to(tl.float32)
    activated, slope = _activation_and_slope(g, ACTIVATION)
    tl.store(d_gate + row * d_gate_row + column * d_gate_column, d * u * slope, mask=inside)
    tl.store(d_up + row * d_up_row + column * d_up_column, d * activated, mask=inside)
    if PRODUCT:
        tl.store(d_x + row * d_x_row + column * d_x_column, activated * u, mask=inside)
