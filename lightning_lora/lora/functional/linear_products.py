"""Products of a group of linear layers and their updates, and the gradients of these products.

The small product comes first and the large one is added to it (``beta = 1`` in BLAS), so no output is walked over once
more. Gradients come in two forms: written out, and through autograd where they must be differentiated again.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.lora.functional.gated_input import recomputed
from lightning_lora.lora.functional.linear_group import GroupTensors, Settings
from lightning_lora.lora.functional.narrow_products import times_narrow, transposed_times_narrow
from lightning_lora.lora.functional.seeded_dropout import drop


def affine_into(out: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """Write ``x matrix + bias`` to ``out``: ``(T, n)`` times ``(n, out)``, bias ``(out,)``."""
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def scaled_factors(group: GroupTensors, settings: Settings) -> Tensor:
    """``scale A`` of all layers below each other, ``(R, in)``."""
    factors = [A * scale for A, scale in zip(group.As, settings.scales, strict=True)]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def split_outputs(ys: Sequence[Tensor], rows: Tensor, group: GroupTensors, settings: Settings) -> Tensor:
    """Write ``x W^T + b + scale * drop(x) A^T B^T`` of each layer to its ``y``, ``(T, out)``.

    Args:
        ys: Uninitialised, ``(T, out)`` of each layer.
        rows: ``x``, ``(T, in)``.
        group: Tensors of the group.
        settings: Settings of the group.

    Returns:
        ``scale * drop(x) A^T`` of all layers side by side, ``(T, R)``.
    """
    inner = drop(rows, settings.dropout, settings.seed) @ scaled_factors(group, settings).T
    parts = _by_layer(inner, group.As, dim=1)
    for y, part, W, b, B in zip(ys, parts, group.weights, group.biases, group.Bs, strict=True):
        affine_into(y, part, B.T, b)
        torch.addmm(y, rows, W.T, out=y)
    return inner


def merged_outputs(ys: Sequence[Tensor], rows: Tensor, group: GroupTensors, settings: Settings) -> list[Tensor]:
    """Write ``x (W + scale B A)^T + b`` of each layer to its ``y``, with the arguments of `split_outputs`.

    Returns:
        ``W + scale B A`` of each layer, ``(out, in)``.
    """
    factors = _by_layer(scaled_factors(group, settings), group.As, dim=0)
    sums = [torch.addmm(W, B, A) for W, B, A in zip(group.weights, group.Bs, factors, strict=True)]
    for y, merged, b in zip(ys, sums, group.biases, strict=True):
        affine_into(y, rows, merged.T, b)
    return sums


def inner_gradient(group: GroupTensors, d_ys: Sequence[Tensor | None]) -> Tensor:
    """Gradient of ``scale A x`` of all layers side by side, ``(T, R)``.

    Args:
        group: Tensors of the group.
        d_ys: ``(T, out)`` of each layer; None where nothing depends on its output, but not for every layer.
    """
    rows = next(d_y for d_y in d_ys if d_y is not None)
    parts = [
        rows.new_zeros(len(rows), B.shape[1]) if d_y is None else times_narrow(d_y, B)
        for d_y, B in zip(d_ys, group.Bs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def factor_gradients(
    group: GroupTensors,
    settings: Settings,
    needs: GroupTensors,
    dropped: Tensor | None,
    inner: Tensor | None,
    d_inner: Tensor,
    d_ys: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of every ``A`` and every ``B``; None for those that need none.

    Args:
        group: Tensors of the group.
        settings: Settings of the group.
        needs: Which gradients are needed.
        dropped: ``drop(x)``, ``(T, in)``; None only where no ``A`` needs a gradient.
        inner: What `split_outputs` returned; None: computed here if a ``B`` needs a gradient.
        d_inner: What `inner_gradient` returned.
        d_ys: ``(T, out)`` of each layer, or None.
    """
    d_As: Sequence[Tensor | None] = [None] * len(group.As)
    d_Bs: Sequence[Tensor | None] = d_As
    if dropped is not None and any(needs.As):
        d_A = _by_layer(d_inner.T @ dropped, group.As, dim=0)
        d_As = [part * scale for part, scale in zip(d_A, settings.scales, strict=True)]
    if any(needs.Bs):
        if inner is None:
            assert dropped is not None
            inner = dropped @ scaled_factors(group, settings).T
        d_Bs = [
            transposed_times_narrow(d_y, part) if needed and d_y is not None else None
            for d_y, part, needed in zip(d_ys, _by_layer(inner, group.As, dim=1), needs.Bs, strict=True)
        ]
    return d_As, d_Bs


def input_gradient(
    group: GroupTensors,
    settings: Settings,
    sums: Sequence[Tensor],
    d_inner: Tensor,
    d_ys: Sequence[Tensor | None],
) -> Tensor:
    """Gradient of ``x``, ``(T, in)``.

    Args:
        group: Tensors of the group.
        settings: Settings of the group.
        sums: What `merged_outputs` returned; empty after `split_outputs`.
        d_inner: What `inner_gradient` returned.
        d_ys: ``(T, out)`` of each layer, or None.
    """
    d_x = None
    if not sums:
        d_x = drop(d_inner @ scaled_factors(group, settings), settings.dropout, settings.seed)
    for d_y, matrix in zip(d_ys, sums or group.weights, strict=True):
        if d_y is not None:
            d_x = d_y @ matrix if d_x is None else torch.addmm(d_x, d_y, matrix, out=d_x)
    assert d_x is not None
    return d_x


def differentiable_gradients(
    group: GroupTensors, settings: Settings, needs: GroupTensors, d_ys: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the tensors of a group, in their flat order.

    Args:
        group: Tensors of the group.
        settings: Settings of the group.
        needs: Which gradients are needed.
        d_ys: Gradient of each layer's output, ``(T, out)``; None where nothing depends on it.

    Raises:
        NotImplementedError: If the input was not kept, as every ``A`` is frozen.
    """
    x, _ = recomputed(settings.activation, group.sources)
    if x is None:
        raise NotImplementedError("there is no second derivative where every A is frozen: the input is not kept then.")
    rows = x.reshape(-1, x.shape[-1])
    dropped = drop(rows, settings.dropout, settings.seed)
    outputs = [
        (rows @ W.T + dropped @ (A * scale).T @ B.T, d_y)
        for W, A, B, scale, d_y in zip(group.weights, group.As, group.Bs, settings.scales, d_ys, strict=True)
        if d_y is not None
    ]
    return gradients_of(outputs, group.flat(), needs.flat())


def gradients_of(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ``needed`` inputs, None for the others; they can be differentiated again.

    Args:
        outputs: Each output with its gradient.
        inputs: Tensors that the outputs depend on.
        needed: Whether the gradient of each input is needed.
    """
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    ys, d_ys = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, d_ys, create_graph=True, allow_unused=True))
    return [next(found) if needs and tensor is not None else None for tensor, needs in zip(inputs, needed, strict=True)]


def _by_layer(together: Tensor, As: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """Split an axis of length ``R`` by layer."""
    return together.split([A.shape[0] for A in As], dim)
