"""Random log-probabilities and advantages of tokens, and the comparison of two losses on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenNumbers(NamedTuple):
    """Of completions, ``(rows, tokens)`` float64 each but the advantages, ``(rows,)``, and the mask, integers."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor


def token_numbers(lengths: Sequence[int]) -> TokenNumbers:
    """Ratios on both sides of the usual bounds, and advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    shape = len(lengths), max(lengths)
    logprobs, old, ref = (-torch.rand(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    advantages = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return TokenNumbers(logprobs, old, ref, advantages, mask)


def same(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], at: Tensor, tolerance: float = 1e-12
) -> None:
    """Require equal values, and equal gradients which are not all zero."""
    found = []
    for loss in (ours, theirs):
        inputs = at.clone().requires_grad_()
        value = loss(inputs)
        found.append((value.detach(), *torch.autograd.grad(value, inputs)))
    (value, gradient), (expected, expected_gradient) = found
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=0, atol=tolerance * float(expected_gradient.abs().max())
    )
    assert expected_gradient.any()
