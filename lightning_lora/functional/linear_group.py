"""Linear layers with one input, and their updates: what the ways to compute them have in common.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.functional.narrow import times_narrow, transposed_times_narrow
from lightning_lora.functional.origin import Origin, remade
from lightning_lora.functional.second_order import gradients_of
from lightning_lora.functional.seeded_dropout import drop


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
