r"""Linear layers with one input, and their low-rank updates, as one differentiable function.

The updates cost little arithmetic; what makes LoRA slow is everything around it. Written out, ``W x + s B A x`` walks
over the output twice more than ``W x`` does, over the gradient of the input twice more, and with dropout over the input
four times more. Here the small product comes first and the large one adds itself to it (``beta = 1`` in BLAS), forward
and backward; layers with one input (query, key and value; gate and up) share the small products with it and its
gradient; dropout keeps no mask but the seed of one; and an activation that is cheap to compute again is not kept.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.functional.narrow import times_narrow, transposed_times_narrow
from lightning_lora.functional.origin import Origin, origin, remade, source_gradients
from lightning_lora.functional.second_order import gradients_of
from lightning_lora.functional.seeded_dropout import drop, kept_share, shared_seed


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


def fused_lora_linears(x: Tensor, layers: Sequence[AdaptedWeight], dropout: float = 0.0) -> tuple[Tensor, ...]:
    r"""``x W^T + b + scale * drop(x) A^T B^T`` of each layer, with gradients for ``x``, ``A`` and ``B``.

    ``W`` and ``b`` are frozen. For the backward pass it keeps ``x``, by reference, and ``A x``, ``(T, R)``; with
    dropout a seed instead of a mask. If ``x`` is an activation, perhaps times a second tensor (`origin`), it keeps what
    that was computed from instead, and the gradient goes there past ``x``. If no ``A`` needs a gradient, it keeps no
    input at all. The gradient can be differentiated again. All tensors have one type.

    Args:
        x: ``(*, in)``.
        layers: Those that are given ``x``, one or more.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``, rounded to a multiple of 1/256, at least
            one; what is kept is scaled by the exact probability of keeping it. Calls with the same ``x``, one after the
            other, drop the same entries.

    Returns:
        ``(*, out)`` for each layer.

    References:
        Zhu et al., *LoRAFusion*, 2025, https://arxiv.org/abs/2510.00206 (fusing, seeded dropout).
    """
    seed = shared_seed(x, layers[0].A) if dropout else 0
    weights, biases, As, Bs, scales = zip(*layers, strict=True)
    made = origin(x)
    value, sources = (None, (x,)) if made is None else (x.detach(), made.tensors)
    kind = None if made is None else made._replace(tensors=())
    settings = _Settings(tuple(scale / kept_share(dropout) for scale in scales), dropout, seed, kind)
    return _FusedLoRALinears.apply(settings, value, *biases, *sources, *weights, *As, *Bs)


def fused_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`fused_lora_linears` of a single layer, ``(*, in)`` to ``(*, out)``."""
    return fused_lora_linears(x, [AdaptedWeight(weight, bias, A, B, scale)], dropout)[0]


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `fused_lora_linears` computes what the written-out formula does for these tensors, here and now.

    Not where types or devices differ or autocast chooses types, where base weights learn, in quantised or sharded ones,
    and where ``torch.compile`` or a transform of ``torch.func`` must see through: those take the formula.
    """
    frozen = [weight] if bias is None else [weight, bias]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad for tensor in frozen)
        and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in frozen)
        and type(x) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Settings(NamedTuple):
    """What is no tensor: scales by layer, dropout and its seed, and how the input came about (without its tensors)."""

    scales: tuple[float, ...]
    dropout: float
    seed: int
    origin: Origin | None


class _FusedLoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, value: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        biases, sources, weights, As, Bs = _sorted(tensors, settings)
        x: Tensor = sources[0] if value is None else value
        rows = x.reshape(-1, x.shape[-1])
        inner = drop(rows, settings.dropout, settings.seed) @ _scaled(As, settings.scales).T
        outputs = []
        for inner_part, weight, bias, B in zip(_by_layer(inner, As), weights, biases, Bs, strict=True):
            # Made whole and written through a view: autograd lets nobody change an output in place that is a view.
            outputs.append(x.new_empty(*x.shape[:-1], weight.shape[0]))
            y = outputs[-1].view(-1, weight.shape[0])
            if bias is None:
                torch.mm(inner_part, B.T, out=y)
            else:
                torch.addmm(bias, inner_part, B.T, out=y)
            torch.addmm(y, rows, weight.T, out=y)
        ctx.settings, ctx.shape = settings, x.shape
        _, needs_sources, _, needs_A, _ = _sorted(ctx.needs_input_grad[2:], settings)
        keeps_input = any(needs_A) or (settings.origin is not None and any(needs_sources))
        kept = sources if keeps_input else [None] * len(sources)
        ctx.save_for_backward(inner, *[None] * len(biases), *kept, *weights, *As, *Bs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        settings: _Settings = ctx.settings
        inner, *saved = ctx.saved_tensors
        _, sources, weights, As, Bs = _sorted(saved, settings)
        needed = _sorted(ctx.needs_input_grad[2:], settings)
        d_ys = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_outputs]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(settings, sources, weights, As, Bs, d_ys, needed)
        _, needs_sources, _, needs_A, needs_B = needed
        x, activated = remade(settings.origin, sources)
        d_inners = [
            inner.new_zeros(len(inner), B.shape[1]) if d_y is None else times_narrow(d_y, B)
            for d_y, B in zip(d_ys, Bs, strict=True)
        ]
        d_inner = d_inners[0] if len(d_inners) == 1 else torch.cat(d_inners, 1)
        d_As: Sequence[Tensor | None] = [None] * len(As)
        if any(needs_A):
            assert x is not None
            d_A = d_inner.T @ drop(x.reshape(-1, x.shape[-1]), settings.dropout, settings.seed)
            d_As = [part * scale for part, scale in zip(_by_layer(d_A, As, dim=0), settings.scales, strict=True)]
        d_Bs = [
            transposed_times_narrow(d_y, part) if needs and d_y is not None else None
            for d_y, part, needs in zip(d_ys, _by_layer(inner, As), needs_B, strict=True)
        ]
        d_sources: Sequence[Tensor | None] = [None] * len(sources)
        if any(needs_sources):
            d_x = drop(d_inner @ _scaled(As, settings.scales), settings.dropout, settings.seed)
            for d_y, weight in zip(d_ys, weights, strict=True):
                if d_y is not None:
                    torch.addmm(d_x, d_y, weight, out=d_x)
            d_sources = source_gradients(settings.origin, sources, d_x.view(ctx.shape), activated)
        nothing = [None] * len(As)
        return None, None, *nothing, *d_sources, *nothing, *d_As, *d_Bs


def _differentiable(
    settings: _Settings,
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    d_ys: Sequence[Tensor | None],
    needed: Sequence[Sequence[bool]],
) -> list[Tensor | None]:
    """The gradients as functions of all that they depend on, by way of the written-out formula."""
    x, _ = remade(settings.origin, sources)
    if x is None:
        raise NotImplementedError("no input is kept where every A is frozen, so there is no second derivative.")
    rows = x.reshape(-1, x.shape[-1])
    dropped = drop(rows, settings.dropout, settings.seed)
    pairs = [
        (rows @ W.T + dropped @ (A * scale).T @ B.T, d_y)
        for W, A, B, scale, d_y in zip(weights, As, Bs, settings.scales, d_ys, strict=True)
        if d_y is not None
    ]
    everything = [*[None] * len(weights), *sources, *weights, *As, *Bs]
    return gradients_of(pairs, everything, [need for part in needed for need in part])


def _sorted(tensors: Sequence[Any], settings: _Settings) -> list[Sequence[Any]]:
    """Biases, sources of the input, weights, A and B, or what there is for each of them."""
    num_layers = len(settings.scales)
    num_sources = len(tensors) - 4 * num_layers
    parts, start = [], 0
    for length in (num_layers, num_sources, num_layers, num_layers, num_layers):
        parts.append(tensors[start : start + length])
        start += length
    return parts


def _scaled(As: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """``scale A`` of all layers below each other, ``(R, in)``."""
    scaled = [A * scale for A, scale in zip(As, scales, strict=True)]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _by_layer(together: Tensor, As: Sequence[Tensor], dim: int = 1) -> Sequence[Tensor]:
    return together.split([A.shape[0] for A in As], dim)
