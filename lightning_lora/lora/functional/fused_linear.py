r"""Linear layers with one input, and their low-rank updates, as one differentiable function.

The updates cost little arithmetic; what makes LoRA slow is everything around it. Written out, ``W x + s B A x`` walks
over the output twice more than ``W x`` does, over the gradient of the input twice more, and with dropout over the input
four times more. Here the small product is added to the large one as it is computed, forward and backward; layers with
one input (query, key and value; gate and up) share the small product with it and its gradient; dropout keeps a seed
instead of a mask; and the product of a gate is computed again instead of kept. The large product is the base's own, so
an update of zero changes no bit of it.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_lora.lora.functional.compiled_linear import compiled_lora_linears
from lightning_lora.lora.functional.factor_copies import Factors, group_factors
from lightning_lora.lora.functional.gated_input import (
    gated_input,
    gradients_and_input,
    is_one_pass,
    recomputed,
    source_gradients,
)
from lightning_lora.lora.functional.linear_group import AdaptedWeight, GroupTensors, Settings
from lightning_lora.lora.functional.linear_products import (
    differentiable_gradients,
    factor_gradients,
    inner_gradient,
    input_gradient,
    merged_outputs,
    split_outputs,
)
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share, shared_seed
from lightning_lora.lora.functional.torch_internals import PLAIN_TYPES, is_transformed

# Tokens, as a multiple of a layer's longer side, above which the sum is cheaper (benchmarks/products.py).
_MERGED_TOKENS = 2


def fused_lora_linears(x: Tensor, layers: Sequence[AdaptedWeight], dropout: float = 0.0) -> tuple[Tensor, ...]:
    r"""``x W^T + b + scale * drop(x) A^T B^T`` of each layer, with gradients for ``x``, ``A`` and ``B``.

    ``W`` and ``b`` are frozen. For the backward pass it keeps ``x``, by reference, and ``A x``, ``(T, R)``, or where
    `merging_pays` each ``W + scale B A``; with dropout a seed instead of a mask. If ``x`` is an activation times a
    second tensor (`gated_input`), and the first layer does not ask to keep it, it keeps these two instead, and the
    gradient goes to them past ``x``. If no ``A``
    needs a gradient, it keeps no input at all. The gradient can be differentiated again.

    Under autocast, ``x``, ``W`` and ``b`` are cast as in ``F.linear``, but ``x`` once for all layers. ``A`` and ``B``
    may be of any type: they are cast to that of the product, and their gradients are in their own type.

    Args:
        x: ``(*, in)``.
        layers: One or more layers with the input ``x``; weights are of the type of ``x``, or autocast makes them so.
        dropout: Probability of zeroing an entry of ``x`` on its way to ``A``, rounded to a multiple of 1/256, at least
            one; what is kept is scaled by the exact probability of keeping it. Layers called one after the other with
            the same ``x`` drop the same entries.

    Returns:
        ``(*, out)`` for each layer.

    References:
        Zhu et al., *LoRAFusion*, 2025, https://arxiv.org/abs/2510.00206 (fusing, seeded dropout).
    """
    if torch.compiler.is_compiling():
        return compiled_lora_linears(x, layers, dropout, product_type(x))
    weights, biases, As, Bs, scales, callers, keeps_gate = zip(*layers, strict=True)
    seed = shared_seed(x, callers) if dropout else 0
    x, weights, biases = _as_multiplied(x, weights, biases)
    activation, sources = (None if keeps_gate[0] else gated_input(x)) or (None, (x,))
    settings = Settings(
        scales=tuple(scale / kept_share(dropout) for scale in scales),
        dropout=dropout,
        seed=seed,
        activation=activation,
        merges=not dropout and merging_pays(x, layers),
    )
    outputs: Any = FusedLinears.apply(settings, x.detach(), *GroupTensors(biases, weights, As, Bs, sources).flat())
    return outputs


def merging_pays(x: Tensor, layers: Sequence[AdaptedWeight]) -> bool:
    """Whether forming ``W + scale B A`` costs less than applying both: for many tokens through small layers on a CPU.

    Never below float32, where rounding the sum would lose a small update. Never where every ``A`` is frozen: merging
    needs the input then, which the other way does not keep.
    """
    longest = max(x.shape[-1], *(len(layer.weight) for layer in layers))
    is_many = x.numel() > _MERGED_TOKENS * longest * x.shape[-1]
    return is_many and x.is_cpu and x.element_size() >= 4 and any(layer.A.requires_grad for layer in layers)


def product_type(tensor: Tensor) -> torch.dtype:
    """The type in which torch multiplies by ``tensor`` here: that of autocast, if it is on and would cast it."""
    kind = tensor.device.type
    is_cast = torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else tensor.dtype


def _as_multiplied(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
    dtype = product_type(x)
    if all(tensor is None or tensor.dtype == dtype for tensor in (x, *weights, *biases)):
        return x, weights, biases
    # ``to`` returns what is of this type already as it is.
    return x.to(dtype), [W.to(dtype) for W in weights], [None if b is None else b.to(dtype) for b in biases]


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `fused_lora_linears` computes what the written-out formula does for these tensors, here and now.

    It does not where types or devices differ (and autocast does not make the types one), where base weights are
    trained, quantised or sharded, and where ``torch.func`` must see every operation (`is_transformed`).
    """
    frozen = [weight] if bias is None else [weight, bias]
    dtype = product_type(x)
    return (
        all(type(tensor) in PLAIN_TYPES and not tensor.requires_grad for tensor in frozen)
        and all(product_type(tensor) is dtype and tensor.device == x.device for tensor in frozen)
        and type(x) in PLAIN_TYPES
        and not is_transformed()
    )


class FusedLinears(torch.autograd.Function):
    """Outputs ``(*, out)`` of a group from its settings, its input and its `GroupTensors`.

    The input comes detached, for gradients go to its sources. The node in the graph has ``settings``, and ``is_done``:
    whether its backward pass has run.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        """``(*, out)`` of each layer."""
        group, needs = GroupTensors.of(tensors, settings), GroupTensors.of(ctx.needs_input_grad[2:], settings)
        factors = group_factors(group.As, group.Bs, x, any(needs.As) or any(needs.Bs))
        if settings.merges:
            ys, products = merged_outputs(x, group, factors, settings)
        else:
            ys, inner = split_outputs(x, group, factors, settings)
            products = [inner]
            if not any(needs.As) and settings.activation is None:
                group = group._replace(sources=[None])
        ctx.settings, ctx.shape, ctx.is_done = settings, x.shape, False
        ctx.save_for_backward(*products, factors.A, *factors.Bs, *group.flat())
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> Any:
        """Gradients of the tensors that need one."""
        ctx.is_done = True
        settings: Settings = ctx.settings
        n = len(settings.scales)
        # Read once: activation checkpointing hands out what was saved a single time.
        saved = iter(ctx.saved_tensors)
        products = list(islice(saved, n if settings.merges else 1))
        factors = Factors(next(saved), list(islice(saved, n)))
        group = GroupTensors.of(list(saved), settings)
        needs = GroupTensors.of(ctx.needs_input_grad[2:], settings)
        if all(d is None for d in d_outputs):
            return (None,) * len(ctx.needs_input_grad)
        d_ys = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_outputs]
        if torch.is_grad_enabled():
            return None, None, *differentiable_gradients(group, settings, needs, d_ys)
        inner, sums = (None, products) if settings.merges else (products[0], ())
        d_inner, d_Bs = inner_gradient(factors, settings, needs, inner, d_ys)

        def of_factors(x: Tensor | None) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
            dropped = None if x is None else drop(x.reshape(-1, x.shape[-1]), settings.dropout, settings.seed)
            return factor_gradients(group, factors, settings, needs, dropped, inner, d_inner, d_Bs, d_ys)

        d_sources: Sequence[Tensor | None] = [None] * len(group.sources)
        activation = settings.activation
        if any(needs.sources) and activation is not None and is_one_pass(activation, group.sources):
            d_x = input_gradient(group, factors, settings, sums, d_inner, d_ys).view(ctx.shape)
            d_sources, x = gradients_and_input(activation, group.sources, d_x)
            d_As, d_Bs = of_factors(x)
        else:
            x, activated = recomputed(activation, group.sources)
            d_As, d_Bs = of_factors(x)
            del x  # the gradient of the input, which is as large, takes its place
            if any(needs.sources):
                d_x = input_gradient(group, factors, settings, sums, d_inner, d_ys).view(ctx.shape)
                d_sources = source_gradients(activation, group.sources, d_x, activated)
        frozen = [None] * n
        return None, None, *GroupTensors(frozen, frozen, d_As, d_Bs, d_sources).flat()
