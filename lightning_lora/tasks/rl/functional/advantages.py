"""How much better a completion, or a token, was than expected.

Shape legend: ``prompts`` prompts, ``group`` completions of one prompt, ``rows`` completions, ``tokens`` positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lora.errors import PolicySettingError, check_choice

ADVANTAGES = ("mean", "grpo", "rloo", "batch", "maxrl")


def group_advantages(
    rewards: Tensor,
    kind: str = "mean",
    *,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Compute ``A = R - mean(R of the same prompt)``, and what other methods divide it by.

    A group whose rewards are all equal has advantages of exactly 0.

    Args:
        rewards: ``(prompts, group)``, with at least 2 completions of a prompt.
        kind: ``"mean"`` divides by nothing; ``"grpo"`` by the sample standard deviation of the group plus ``eps``;
            ``"batch"`` by that of all rewards plus ``eps``; ``"rloo"`` subtracts the mean of the *others* instead,
            which is ``G / (G - 1)`` times ``"mean"``; ``"maxrl"`` divides by the group's mean, and is 0 where that is
            not positive.
        eps: Added to standard deviations; 1e-4 as in TRL, verl has 1e-6.
        mask: False for completions that are left out of means and deviations, ``(prompts, group)``; their advantage
            is 0. None leaves out none.
        sum_over_ranks: Adds up a tensor over all ranks, for ``"batch"``; None on one rank.

    Returns:
        ``(prompts, group)``.

    Raises:
        ConfigError: If the kind is unknown, or a group has a single completion.

    References:
        GRPO https://arxiv.org/abs/2402.03300; without the deviation https://arxiv.org/abs/2503.20783; RLOO
        https://arxiv.org/abs/2402.14740; MaxRL https://arxiv.org/abs/2602.02710

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    check_choice("advantage", kind, ADVANTAGES)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise PolicySettingError(
            f"rewards must be (prompts, group) with at least 2 completions of each prompt, got "
            f"{tuple(rewards.shape)}: a single completion has nothing to be compared with."
        )
    is_used = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    count = is_used.sum(1, keepdim=True)
    mean = rewards.masked_fill(~is_used, 0).sum(1, keepdim=True) / count.clamp(min=1)
    # Rounding of the mean must not give a constant group a gradient.
    is_idle = ~is_used | constant_groups(rewards, is_used)[:, None] | (count < 2)
    centred = (rewards - mean).masked_fill(is_idle, 0)
    if kind == "grpo":
        return centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)
    if kind == "batch":
        return centred / (_deviation(rewards, is_used, sum_over_ranks) + eps)
    if kind == "rloo":
        return centred * count / (count - 1).clamp(min=1)
    if kind == "maxrl":
        return torch.where(mean > 0, centred / mean, 0)
    return centred


def constant_groups(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Whether all rewards of a group are exactly equal, ``(prompts,)``: such a group teaches nothing.

    Args:
        rewards: ``(prompts, group)``.
        mask: False for completions that are left out, ``(prompts, group)``.
    """
    is_used = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    first = rewards.gather(1, is_used.int().argmax(1, keepdim=True))
    return ((rewards == first) | ~is_used).all(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Compute generalised advantage estimates, ``A_t = delta_t + gamma lam A_{t+1}``, and returns ``A + values``.

    ``delta_t = R_t + gamma V_{t+1} - V_t``, and the value after the last token of a row is 0. Tokens whose mask is 0
    are passed over, also in the middle of a row: the value and the advantage of the next trained token are carried
    across them.

    Args:
        rewards: Of each token, ``(rows, tokens)``; that of a completion stands at its last trained token.
        values: ``(rows, tokens)``.
        mask: ``(rows, tokens)``.
        gamma: Discount per token, in (0, 1].
        lam: Weight of later tokens, in [0, 1].

    Returns:
        Advantages and returns, ``(rows, tokens)`` each; 0 where the mask is 0.

    References:
        https://arxiv.org/abs/1506.02438
    """
    is_trained = mask.bool()
    values = values.masked_fill(~is_trained, 0)
    advantages = torch.zeros_like(values)
    following, advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    for at in reversed(range(values.shape[1])):
        delta = rewards[:, at] + gamma * following - values[:, at]
        advantage = torch.where(is_trained[:, at], delta + gamma * lam * advantage, advantage)
        following = torch.where(is_trained[:, at], values[:, at], following)
        advantages[:, at] = advantage.masked_fill(~is_trained[:, at], 0)
    return advantages, advantages + values


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    unbiased: bool = True,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Shift and scale the trained tokens to mean 0 and variance 1; 0 where the mask is 0.

    Args:
        values: ``(rows, tokens)``.
        mask: ``(rows, tokens)``.
        unbiased: Whether the variance is divided by one less than the number of tokens.
        sum_over_ranks: Adds up a tensor over all ranks, whose tokens then count together; None on one rank.
    """
    is_trained = mask.bool()
    mean, variance = _mean_and_variance(values, is_trained, unbiased, sum_over_ranks)
    # The first as TRL and verl, the second as OpenRLHF.
    variance = variance + 1e-8 if unbiased else variance.clamp(min=1e-8)
    return ((values - mean) * variance.rsqrt()).masked_fill(~is_trained, 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = None) -> Tensor:
    """Compute ``max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each token, ``(rows, tokens)``.

    Args:
        values: ``(rows, tokens)``, with gradients.
        old_values: When the completions were sampled, ``(rows, tokens)``.
        returns: ``(rows, tokens)``.
        mask: ``(rows, tokens)``; the loss is 0 where it is 0.
        clip: How far a value may move from the old one; None does not clip.
    """
    losses = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns).square())
    return (losses / 2).masked_fill(~mask.bool(), 0)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """Compute the soft penalty of DAPO for long completions, in [-1, 0], of the shape of ``lengths``.

    It is 0 up to ``longest - buffer`` tokens, falls linearly over the next ``buffer`` tokens, and is -1 beyond.

    Args:
        lengths: Tokens of each completion.
        longest: Tokens from which the penalty is -1.
        buffer: Tokens over which it grows, at least 1.

    References:
        https://arxiv.org/abs/2503.14476, equation 13
    """
    return ((longest - buffer - lengths) / buffer).clamp(-1, 0)


def _deviation(rewards: Tensor, is_used: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
    return _mean_and_variance(rewards, is_used, True, sum_over_ranks)[1].sqrt()


def _mean_and_variance(
    values: Tensor, is_used: Tensor, unbiased: bool, sum_over_ranks: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    total = sum_over_ranks or (lambda numbers: numbers)
    sums = total(torch.stack([values.masked_fill(~is_used, 0).sum(), is_used.sum().to(values)]))
    mean, count = sums[0] / sums[1].clamp(min=1), sums[1]
    squares = total((values - mean).masked_fill(~is_used, 0).square().sum())
    return mean, squares / (count - int(unbiased)).clamp(min=1)
