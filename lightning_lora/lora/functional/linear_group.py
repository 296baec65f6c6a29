"""Linear layers with one input, and their updates: what the ways to compute them have in common.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.lora.functional.gated_input import Origin, remade, source_gradients
from lightning_lora.lora.functional.narrow_products import times_narrow, transposed_times_narrow
from lightning_lora.lora.functional.seeded_dropout import drop


class AdaptedWeight(NamedTuple):
    """A frozen linear layer and its update: ``x W^T + b + scale * x A^T B^T``.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: alpha / r, dimensionless.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


class Settings(NamedTuple):
    """What is no tensor: scales by layer, dropout and its seed, and how the input came about (without its tensors)."""

    scales: tuple[float, ...]
    dropout: float
    seed: int
    origin: Origin | None


class Parts(NamedTuple):
    """The tensors of a group in the order autograd has them, or what there is for each: gradients, needs.

    All but the last are as many as layers; ``sources`` are what the input is, or was made from.
    """

    biases: Sequence[Any]
    weights: Sequence[Any]
    As: Sequence[Any]
    Bs: Sequence[Any]
    sources: Sequence[Any]

    @staticmethod
    def of(flat: Sequence[Any], settings: Settings) -> Parts:
        """Take a flat sequence apart."""
        n = len(settings.scales)
        return Parts(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : 4 * n], flat[4 * n :])

    def flat(self) -> list[Any]:
        """All of them, one after the other."""
        return [item for part in self for item in part]


def scaled(As: Sequence[Tensor], settings: Settings) -> Tensor:
    """``scale A`` of all layers below each other, ``(R, in)``."""
    parts = [A * scale for A, scale in zip(As, settings.scales, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_layer(together: Tensor, As: Sequence[Tensor], dim: int = 1) -> Sequence[Tensor]:
    """Take apart along an axis of length ``R``."""
    return together.split([A.shape[0] for A in As], dim)


def inner_gradient(d_ys: Sequence[Tensor | None], Bs: Sequence[Tensor]) -> Tensor:
    """Gradient of ``scale A x`` of all layers side by side, ``(T, R)``.

    Args:
        d_ys: ``(T, out)`` of each layer; None where nothing depends on its output, but not everywhere.
        Bs: ``(out, r)`` of each.
    """
    rows = next(d_y for d_y in d_ys if d_y is not None)
    parts = [
        rows.new_zeros(len(rows), B.shape[1]) if d_y is None else times_narrow(d_y, B)
        for d_y, B in zip(d_ys, Bs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def factor_gradients(
    settings: Settings,
    needs: Parts,
    As: Sequence[Tensor],
    dropped: Tensor | None,
    inner: Tensor | None,
    d_inner: Tensor,
    d_ys: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of every A and every B.

    Args:
        settings: Of the group.
        needs: Which gradients are asked for.
        As: Of the group.
        dropped: ``(T, in)``, the input as the updates see it; not needed where no A learns.
        inner: ``(T, R)``, ``scale A x``; not needed where no B learns.
        d_inner: ``(T, R)``, from `inner_gradient`.
        d_ys: ``(T, out)`` of each layer, or None.
    """
    d_As: Sequence[Tensor | None] = [None] * len(As)
    d_Bs: Sequence[Tensor | None] = d_As
    if dropped is not None and any(needs.As):
        d_A = by_layer(d_inner.T @ dropped, As, dim=0)
        d_As = [part * scale for part, scale in zip(d_A, settings.scales, strict=True)]
    if inner is not None and any(needs.Bs):
        d_Bs = [
            transposed_times_narrow(d_y, part) if needed and d_y is not None else None
            for d_y, part, needed in zip(d_ys, by_layer(inner, As), needs.Bs, strict=True)
        ]
    return d_As, d_Bs


def affine_into(out: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """Write ``x matrix + bias`` to ``out``: ``(T, n)`` times ``(n, out)``, bias ``(out,)``."""
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def new_output(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output ``(*, out)`` of a layer for ``x``, and a view of it, ``(T, out)``, to be written to.

    Made whole and written through a view: autograd lets nobody change an output in place that is a view.
    """
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    return output, output.view(-1, weight.shape[0])


def group_gradients(
    ctx: Any, parts: Parts, inner: Tensor | None, sums: Sequence[Tensor] | None, d_outputs: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Gradients of whatever asks for one, of settings and value (None) and then in the order of `Parts`.

    Args:
        ctx: Of the function: its ``settings`` and the ``shape`` of the input.
        parts: What was kept; sources may be None where no A learns.
        inner: ``(T, R)``, ``scale A x``; None: computed here if a B learns.
        sums: ``W + scale B A`` of each layer, for the gradient of the input; None: weights and updates one by one.
        d_outputs: ``(*, out)`` of each layer; None where nothing depends on it.
    """
    if all(d is None for d in d_outputs):
        return (None,) * len(ctx.needs_input_grad)
    settings: Settings = ctx.settings
    needs = Parts.of(ctx.needs_input_grad[2:], settings)
    d_ys = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_outputs]
    if torch.is_grad_enabled():
        return None, None, *differentiable_gradients(settings, parts, d_ys, needs)
    x, activated = remade(settings.origin, parts.sources)
    dropped = None if x is None else drop(x.reshape(-1, x.shape[-1]), settings.dropout, settings.seed)
    if inner is None and dropped is not None and any(needs.Bs):
        inner = dropped @ scaled(parts.As, settings).T
    d_inner = inner_gradient(d_ys, parts.Bs)
    d_As, d_Bs = factor_gradients(settings, needs, parts.As, dropped, inner, d_inner, d_ys)
    d_sources: Sequence[Tensor | None] = [None] * len(parts.sources)
    if any(needs.sources):
        d_x = drop(d_inner @ scaled(parts.As, settings), settings.dropout, settings.seed) if sums is None else None
        for d_y, matrix in zip(d_ys, parts.weights if sums is None else sums, strict=True):
            if d_y is not None:
                d_x = d_y @ matrix if d_x is None else torch.addmm(d_x, d_y, matrix, out=d_x)
        assert d_x is not None
        d_sources = source_gradients(settings.origin, parts.sources, d_x.view(ctx.shape), activated)
    nothing = [None] * len(parts.As)
    return None, None, *Parts(nothing, nothing, d_As, d_Bs, d_sources).flat()


def differentiable_gradients(
    settings: Settings, parts: Parts, d_ys: Sequence[Tensor | None], needs: Parts
) -> list[Tensor | None]:
    """All gradients as functions of whatever they depend on, by way of the written-out formula."""
    x, _ = remade(settings.origin, parts.sources)
    if x is None:
        raise NotImplementedError("no input is kept where every A is frozen, so there is no second derivative.")
    rows = x.reshape(-1, x.shape[-1])
    dropped = drop(rows, settings.dropout, settings.seed)
    outputs = [
        (rows @ W.T + dropped @ (A * scale).T @ B.T, d_y)
        for W, A, B, scale, d_y in zip(parts.weights, parts.As, parts.Bs, settings.scales, d_ys, strict=True)
        if d_y is not None
    ]
    return gradients_of(outputs, parts.flat(), needs.flat())


def gradients_of(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``needed`` inputs that can be differentiated again.

    Args:
        outputs: Each output with its gradient.
        inputs: What they depend on.
        needed: For which of the inputs.
    """
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    ys, d_ys = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, d_ys, create_graph=True, allow_unused=True))
    return [next(found) if needs and tensor is not None else None for tensor, needs in zip(inputs, needed, strict=True)]
