"""Products of a group of linear layers and their updates, and the gradients of these products.

The large product comes first, as the base computes it, and the small one is added to it in the same pass in which it is
computed (``beta = 1`` in BLAS): a small product of zero leaves every bit of the large one. Gradients come in two forms:
written out, and through autograd where they must be differentiated again.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.factor_copies import Factors
from lightning_lora.lora.functional.gated_input import recomputed
from lightning_lora.lora.functional.linear_group import GroupTensors, Settings
from lightning_lora.lora.functional.narrow_products import narrow_gradients, scaled_product, transposed_products
from lightning_lora.lora.functional.seeded_dropout import drop
from lightning_lora.lora.functional.torch_internals import uninitialised, whole


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` as the layer computes it before it is adapted, bit for bit; contiguous, and nobody's view.

    Torch multiplies by a weight that needs a gradient in another order, where ``x`` is not contiguous. The weights of a
    model that nobody has frozen yet need one.

    Args:
        x: ``(*, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
    """
    with torch.no_grad():
        return whole(F.linear(x, weight.detach().requires_grad_(), bias).contiguous())


def affine_into(out: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """Write ``x matrix + bias`` to ``out``: ``(T, n)`` times ``(n, out)``, bias ``(out,)``."""
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def scaled_inner(x: Tensor, factors: Factors, settings: Settings) -> Tensor:
    """``scale * x A^T`` of all layers side by side, ``(T, R)``, of ``x`` ``(T, in)``."""
    inner = uninitialised(x, (len(x), len(factors.A)))
    if len(set(settings.scales)) == 1:
        return scaled_product(inner, x, factors.A.T, settings.scales[0])
    for part, A, scale in zip(
        _by_layer(inner, factors, 1), _by_layer(factors.A, factors, 0), settings.scales, strict=True
    ):
        scaled_product(part, x, A.T, scale)
    return inner


def split_outputs(x: Tensor, group: GroupTensors, factors: Factors, settings: Settings) -> tuple[list[Tensor], Tensor]:
    """``x W^T + b + scale * drop(x) A^T B^T`` of each layer.

    Args:
        x: ``(*, in)``.
        factors: Its factors, in the type of ``x``.

    Returns:
        ``(*, out)`` of each layer, and ``scale * drop(x) A^T`` of all layers side by side, ``(T, R)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    inner = scaled_inner(drop(rows, settings.dropout, settings.seed), factors, settings)
    ys = [base_product(x, W, b) for W, b in zip(group.weights, group.biases, strict=True)]
    for y, part, B in zip(ys, _by_layer(inner, factors, 1), factors.Bs, strict=True):
        y.view(-1, len(B)).addmm_(part, B.T)
    return ys, inner


def merged_outputs(
    x: Tensor, group: GroupTensors, factors: Factors, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """``x (W + scale B A)^T + b`` of each layer, with the arguments of `split_outputs`.

    Returns:
        ``(*, out)`` of each layer, and ``W + scale B A`` of each layer, ``(out, in)``.
    """
    each = zip(group.weights, factors.Bs, _by_layer(factors.A, factors, 0), settings.scales, strict=True)
    sums = [torch.addmm(W, B, A, alpha=scale) for W, B, A, scale in each]
    return [base_product(x, merged, b) for merged, b in zip(sums, group.biases, strict=True)], sums


def inner_gradient(
    factors: Factors, settings: Settings, needs: GroupTensors, inner: Tensor | None, d_ys: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradient of ``A x`` of all layers side by side, ``(T, R)``, and of each ``B`` that comes with it, in float32.

    Args:
        inner: What `split_outputs` returned; None after `merged_outputs`.
        d_ys: ``(T, out)`` of each layer; None where nothing depends on its output, but not for every layer.
    """
    rows = next(d_y for d_y in d_ys if d_y is not None)
    d_inner = uninitialised(rows, (len(rows), len(factors.A)))
    S = [None] * len(factors.Bs) if inner is None else _by_layer(inner, factors, 1)
    d_Bs: list[Tensor | None] = [None] * len(factors.Bs)
    for i, (part, d_y) in enumerate(zip(_by_layer(d_inner, factors, 1), d_ys, strict=True)):
        if d_y is None:
            part.zero_()
        else:
            S_i = S[i] if needs.Bs[i] else None
            d_Bs[i] = narrow_gradients(part, d_y, factors.Bs[i], S_i, settings.scales[i])
    return d_inner, d_Bs


def factor_gradients(
    group: GroupTensors,
    factors: Factors,
    settings: Settings,
    needs: GroupTensors,
    dropped: Tensor | None,
    inner: Tensor | None,
    d_inner: Tensor,
    d_Bs: Sequence[Tensor | None],
    d_ys: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of every ``A`` and every ``B``, in their types; None for those that need none.

    Args:
        dropped: ``drop(x)``, ``(T, in)``; None only where no ``A`` needs a gradient.
        inner: What `split_outputs` returned; None: computed here if a ``B`` needs a gradient.
        d_ys: ``(T, out)`` of each layer, or None.
    """
    d_As: list[Tensor | None] = [None] * len(group.As)
    found = [None if d_B is None else d_B.to(B.dtype) for d_B, B in zip(d_Bs, group.Bs, strict=True)]
    pairs: list[tuple[Tensor, Tensor]] = []
    if any(needs.As):
        assert dropped is not None
        pairs.append((d_inner, dropped))
    missing = {i: d_y for i, d_y in enumerate(d_ys) if needs.Bs[i] and d_y is not None and found[i] is None}
    if missing:
        if inner is None:
            assert dropped is not None
            inner = scaled_inner(dropped, factors, settings)
        parts = _by_layer(inner, factors, 1)
        pairs += [(d_y, parts[i]) for i, d_y in missing.items()]
    products = transposed_products(pairs, group.As[0].dtype) if pairs else []
    if any(needs.As):
        d_A, *products = products
        d_As = list(_by_layer(d_A, factors, 0))
    for i, d_B in zip(missing, products, strict=True):
        found[i] = d_B
    return d_As, found


def input_gradient(
    group: GroupTensors,
    factors: Factors,
    settings: Settings,
    sums: Sequence[Tensor],
    d_inner: Tensor,
    d_ys: Sequence[Tensor | None],
) -> Tensor:
    """Gradient of ``x``, ``(T, in)``.

    Args:
        sums: What `merged_outputs` returned; empty after `split_outputs`.
        d_ys: ``(T, out)`` of each layer, or None.
    """
    # As autograd adds up the gradients of layers that are called one after the other: the last one first, each computed
    # alone. Below float32 each sum would be rounded, and is left to the product.
    pairs = zip(reversed(d_ys), reversed(sums or group.weights), strict=True)
    (d_y, matrix), *others = [(d_y, matrix) for d_y, matrix in pairs if d_y is not None]
    d_x = d_y @ matrix
    is_rounded = d_x.element_size() < 4
    alone = uninitialised(d_x, d_x.shape) if others and not is_rounded else d_x
    for d_y, matrix in others:
        if is_rounded:
            d_x.addmm_(d_y, matrix)
        else:
            d_x += torch.mm(d_y, matrix, out=alone)
    if sums:
        return d_x
    if settings.dropout:
        return d_x.add_(drop(d_inner @ factors.A, settings.dropout, settings.seed))
    return d_x.addmm_(d_inner, factors.A)


def differentiable_gradients(
    group: GroupTensors, settings: Settings, needs: GroupTensors, d_ys: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the tensors of a group, in their flat order.

    Args:
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
        (rows @ W.T + dropped @ (A.to(rows.dtype) * scale).T @ B.to(rows.dtype).T, d_y)
        for W, A, B, scale, d_y in zip(group.weights, group.As, group.Bs, settings.scales, d_ys, strict=True)
        if d_y is not None
    ]
    return gradients_of(outputs, group.flat(), needs.flat())


def gradients_of(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the ``needed`` inputs, None for the others; they can be differentiated again."""
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    ys, d_ys = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, d_ys, create_graph=True, allow_unused=True))
    return [next(found) if needs and tensor is not None else None for tensor, needs in zip(inputs, needed, strict=True)]


def _by_layer(together: Tensor, factors: Factors, dim: int) -> Sequence[Tensor]:
    """Split an axis of length ``R`` by layer."""
    return together.split([B.shape[1] for B in factors.Bs], dim)
