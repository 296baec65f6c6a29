r"""Losses of policies on the log-probabilities of sampled tokens, and the weights that correct for the sampler.

Shape legend: ``rows`` completions, ``tokens`` positions; a mask is 1 at the tokens that are trained. What stands at
masked positions never matters: log-ratios are masked *before* the exponential, whose gradient there would be NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lora.errors import PolicySettingError, check_choice

NORMALISE = ("tokens", "rows", "constant", "sum")
RATIOS = ("token", "row_mean", "row_sum")

# exp(20) is 5e8: a larger ratio means nothing, and would overflow sums.
_LARGEST_LOG_RATIO = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    ratio: str = "token",
    detach_ratio: bool = False,
    weights: Tensor | None = None,
    normalise: str = "tokens",
    constant: float | None = None,
) -> Tensor:
    r"""Compute the policy-gradient loss ``-mean(r A)`` with ``r = exp(logprobs - old_logprobs)``, clipped or not.

    With ``logprobs`` equal to ``old_logprobs`` the gradient is that of REINFORCE, ``-A grad(logprobs)``, while the
    value is about ``-mean(A)``: learning cannot be read off the value.

    Args:
        logprobs: Of the policy that is trained, ``(rows, tokens)``, nats.
        old_logprobs: Of the policy that is the origin of the ratio, ``(rows, tokens)``.
        advantages: ``(rows, tokens)``, or ``(rows,)`` for one number per completion.
        mask: 1 at trained tokens, ``(rows, tokens)``.
        clip: The other arguments are those of `token_losses`.
        dual_clip: See `token_losses`.
        ratio: See `token_losses`.
        detach_ratio: See `token_losses`.
        weights: See `token_losses`.
        normalise: What the sum is divided by, see `loss_sum_and_count`.
        constant: The divisor of a row with ``normalise="constant"``.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: If a choice is unknown or a bound is out of its range.

    Example:
        >>> logprobs, mask = torch.log(torch.tensor([[0.5, 0.25]])), torch.ones(1, 2)
        >>> float(policy_loss(logprobs, logprobs, torch.tensor([2.0]), mask))
        -2.0
    """
    losses = token_losses(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip=clip,
        dual_clip=dual_clip,
        ratio=ratio,
        detach_ratio=detach_ratio,
        weights=weights,
    )
    total, count = loss_sum_and_count(losses, mask, normalise, constant)
    return total / count.masked_fill(count == 0, 1)


def token_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    ratio: str = "token",
    detach_ratio: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Compute the loss of every token, ``(rows, tokens)``; 0 where the mask is 0.

    ========================================  ===================================================================
    importance weighted                       the defaults: ``-r A``
    PPO, with clip-higher                     ``clip=(0.2, 0.28)``: ``-min(r A, clamp(r, 1 - 0.2, 1 + 0.28) A)``
    dual clip                                 ``dual_clip=3``: at most ``-3 A`` for negative ``A``
    GSPO                                      ``ratio="row_mean"``, ``clip=(3e-4, 4e-4)``, ``normalise="rows"``
    RLOO of TRL                               ``ratio="row_sum"``, ``clip=(0.2, 0.2)``, ``normalise="rows"``
    CISPO                                     ``detach_ratio=True``: ``-stop(clamp(r)) A logprobs``
    REINFORCE                                 ``detach_ratio=True, clip=(0, 0)``: ``-A logprobs``
    ========================================  ===================================================================

    Args:
        logprobs: ``(rows, tokens)``, with gradients.
        old_logprobs: ``(rows, tokens)``.
        advantages: ``(rows, tokens)`` or ``(rows,)``.
        mask: ``(rows, tokens)``.
        clip: How far the ratio may fall below 1 and rise above it; None does not clip.
        dual_clip: Largest ratio that counts where the advantage is negative, above 1; None sets no limit.
        ratio: ``"token"`` compares tokens; ``"row_mean"`` and ``"row_sum"`` use the exponential of the mean, or of the
            sum, of the log-ratios of a row for all of its tokens.
        detach_ratio: Whether the ratio only weighs the gradient of ``logprobs``, so that clipped tokens still learn.
        weights: Multiplies the losses, ``(rows, tokens)``, such as `sampler_correction`.

    Raises:
        ConfigError: If a choice is unknown or a bound is out of its range.

    References:
        PPO https://arxiv.org/abs/1707.06347; dual clip https://arxiv.org/abs/1912.09729; clip-higher (DAPO)
        https://arxiv.org/abs/2503.14476; GSPO https://arxiv.org/abs/2507.18071; CISPO https://arxiv.org/abs/2506.13585
    """
    _check(clip, dual_clip, ratio)
    is_trained = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.masked_fill(~is_trained, 0)
    r = probability_ratio(logprobs, old_logprobs, mask, ratio)
    clipped = r if clip is None else r.clamp(1 - clip[0], 1 + clip[1])
    if detach_ratio:
        losses = -clipped.detach() * advantages * logprobs.masked_fill(~is_trained, 0)
    else:
        losses = -r * advantages
        if clip is not None:
            losses = torch.maximum(losses, -clipped * advantages)
        if dual_clip is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        losses = losses * weights
    return losses.masked_fill(~is_trained, 0)


def loss_sum_and_count(
    losses: Tensor, mask: Tensor, normalise: str = "tokens", constant: float | None = None
) -> tuple[Tensor, Tensor]:
    """Add up the losses of tokens, and count what the sum is divided by.

    Sums and counts of several batches may be added before dividing: the result is that of one large batch.

    Args:
        losses: ``(rows, tokens)``.
        mask: 1 at trained tokens, ``(rows, tokens)``.
        normalise: ``"tokens"`` gives the mean over tokens; ``"rows"`` the mean over rows of the means of their tokens
            (rows without a token count as 0); ``"constant"`` divides by ``rows * constant`` (Dr. GRPO, with the most
            tokens of a completion); ``"sum"`` divides by 1.
        constant: The divisor of a row with ``normalise="constant"``.

    Raises:
        ConfigError: If ``normalise`` is unknown, or ``constant`` is missing or not wanted.
    """
    check_choice("normalise", normalise, NORMALISE)
    if (normalise == "constant") != (constant is not None):
        raise PolicySettingError(
            f"constant divides rows with normalise='constant' only, got {constant} and {normalise!r}."
        )
    losses, mask = losses.masked_fill(~mask.bool(), 0), mask.long()
    if normalise == "tokens":
        return losses.sum(), mask.sum()
    if normalise == "rows":
        return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), mask.new_tensor(len(mask))
    if normalise == "constant":
        return losses.sum(), losses.new_tensor(len(mask) * constant)  # type: ignore[operator]
    return losses.sum(), mask.new_tensor(1)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, ratio: str = "token") -> Tensor:
    """Compute ``exp(logprobs - old_logprobs)`` for every token, ``(rows, tokens)``; 1 where the mask is 0.

    Log-ratios are held within 20 nats.

    Args:
        logprobs: ``(rows, tokens)``.
        old_logprobs: ``(rows, tokens)``.
        mask: ``(rows, tokens)``.
        ratio: ``"token"``, ``"row_mean"`` or ``"row_sum"``, as in `token_losses`.
    """
    # Before the exponential: infinity at padding times a gradient of 0 would be NaN.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask.bool(), 0)
    if ratio != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True)
        if ratio == "row_mean":
            log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.expand(mask.shape)
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def sampler_correction(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    low: float = 0.0,
    high: float = math.inf,
    ratio: str = "token",
    outside: str = "clamp",
) -> Tensor:
    """Compute weights ``exp(old_logprobs - sampler_logprobs)`` for tokens that another program has sampled.

    The sampler and the learner give a token slightly different probabilities. `policy_loss` takes these weights.

    Args:
        old_logprobs: Of the learner, ``(rows, tokens)``.
        sampler_logprobs: Of the sampler, ``(rows, tokens)``.
        mask: ``(rows, tokens)``.
        low: Smallest weight.
        high: Largest weight.
        ratio: ``"token"``, or ``"row_sum"`` for one weight for all tokens of a row.
        outside: ``"clamp"`` holds the weight within the bounds (truncated importance sampling); ``"drop"`` makes it 0
            outside of them (IcePop with tokens, the sequence mask of TRL with rows).

    Raises:
        ConfigError: If ``outside`` is unknown.
    """
    if outside not in ("clamp", "drop"):
        raise PolicySettingError(f"outside must be 'clamp' or 'drop', got {outside!r}.")
    weights = probability_ratio(old_logprobs, sampler_logprobs, mask, ratio).detach()
    if outside == "clamp":
        return weights.clamp(low, high)
    return weights.masked_fill((weights < low) | (weights > high), 0)


def _check(clip: tuple[float, float] | None, dual_clip: float | None, ratio: str) -> None:
    check_choice("ratio", ratio, RATIOS)
    if clip is not None and (len(clip) != 2 or not 0 <= clip[0] <= 1 or clip[1] < 0):
        raise PolicySettingError(
            f"clip must be two numbers, how far the ratio may fall below 1 (at most 1) and rise above it, such as "
            f"(0.2, 0.28); got {clip!r}."
        )
    if dual_clip is not None and not dual_clip > 1:
        raise PolicySettingError(f"dual_clip must be above 1, got {dual_clip!r}.")
