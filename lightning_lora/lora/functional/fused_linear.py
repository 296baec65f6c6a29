r"""Linear layers with one input, and their low-rank updates, as one differentiable function.

The updates cost little arithmetic; what makes LoRA slow is everything around it. Written out, ``W x + s B A x`` walks
over the output twice more than ``W x`` does, over the gradient of the input twice more, and with dropout over the input
four times more. Here the small product comes first and the large one adds itself to it (``beta = 1`` in BLAS), forward
and backward; layers with one input (query, key and value; gate and up) share the small products with it and its
gradient; dropout keeps no mask but the seed of one; and the product of a gate is computed again instead of kept.

Shape legend: ``T`` rows of input (all leading axes together), ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.lora.functional.gated_input import origin
from lightning_lora.lora.functional.linear_group import AdaptedWeight, Parts, Settings
from lightning_lora.lora.functional.linear_products import MergedLinears, SplitLinears
from lightning_lora.lora.functional.seeded_dropout import kept_share, shared_seed

# Tokens, as a multiple of a layer's longer side, above which the sum is cheaper (benchmarks/products.py).
_MERGED_TOKENS = 2


def fused_lora_linears(x: Tensor, layers: Sequence[AdaptedWeight], dropout: float = 0.0) -> tuple[Tensor, ...]:
    r"""``x W^T + b + scale * drop(x) A^T B^T`` of each layer, with gradients for ``x``, ``A`` and ``B``.

    ``W`` and ``b`` are frozen. For the backward pass it keeps ``x``, by reference, and ``A x``, ``(T, R)``, or where
    `merging_pays` each ``W + scale B A``; with dropout a seed instead of a mask. If ``x`` is an activation times a
    second tensor (`origin`), it keeps these two instead, and the gradient goes there past ``x``. If no ``A`` needs a
    gradient, it keeps no input at all. The gradient can be differentiated again. All tensors have one type.

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
    settings = Settings(tuple(scale / kept_share(dropout) for scale in scales), dropout, seed, kind)
    compute = MergedLinears if not dropout and merging_pays(x, layers) else SplitLinears
    outputs: Any = compute.apply(settings, value, *Parts(biases, weights, As, Bs, sources).flat())
    return outputs


def fused_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`fused_lora_linears` of a single layer, ``(*, in)`` to ``(*, out)``."""
    return fused_lora_linears(x, [AdaptedWeight(weight, bias, A, B, scale)], dropout)[0]


def merging_pays(x: Tensor, layers: Sequence[AdaptedWeight]) -> bool:
    """Whether forming ``W + scale B A`` costs less than applying both: for many tokens through small layers on a CPU.

    Below float32 never, for rounding the sum would take a small update away; nor where every A is frozen, for it needs
    the input then, which the other way does not keep.
    """
    longest = max(x.shape[-1], *(len(layer.weight) for layer in layers))
    is_many = x.numel() > _MERGED_TOKENS * longest * x.shape[-1]
    return is_many and x.is_cpu and x.element_size() >= 4 and any(layer.A.requires_grad for layer in layers)


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
