"""The losses of a minibatch of completions, and what is logged of it."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_lora.sharding.collectives import total_of_ranks
from lightning_lora.tasks.rl.functional.advantages import value_loss
from lightning_lora.tasks.rl.functional.kl import kl_estimate
from lightning_lora.tasks.rl.functional.policy_loss import probability_ratio, sampler_correction, token_losses
from lightning_lora.tasks.rl.policy_settings import PolicySettings
from lightning_lora.tasks.rl.rollout import Unrounded
from lightning_lora.tasks.rl.rollout_maker import TokenScores


def minibatch_losses(
    asked: PolicySettings, scores: TokenScores, old: Tensor, numbers: Unrounded, mask: Tensor
) -> Tensor:
    """The loss of every token, ``(rows, tokens)``: of the policy, of the divergence and of the values.

    Args:
        asked: The settings of the policy.
        scores: What the learner says of the tokens, with gradients.
        old: Log-probabilities that the ratio starts from, ``(rows, tokens)``.
        numbers: The other tensors of the minibatch, by name.
        mask: ``(rows, tokens)``.
    """
    weights = None
    if asked.sampler_cap is not None:
        weights = sampler_correction(old, numbers["sampler_logprobs"], mask, high=asked.sampler_cap)
    losses = token_losses(
        scores.logprobs,
        old,
        numbers["advantages"],
        mask,
        clip=asked.bounds,
        dual_clip=asked.dual_clip,
        ratio=_ratio(asked),
        detach_ratio=asked.loss == "cispo",
        weights=weights,
    )
    if asked.has_reference and asked.kl == "k2":
        divergence = kl_estimate(scores.logprobs, numbers["ref_logprobs"], "k2")
        losses = losses + asked.kl_coefficient * divergence.masked_fill(~mask, 0)
    if scores.values is not None:
        value = value_loss(scores.values, numbers["old_values"], numbers["returns"], mask, asked.value_clip)
        losses = losses + asked.value_coefficient * value
    return losses


@torch.no_grad()
def step_statistics(
    trainer: Trainer, asked: PolicySettings, scores: TokenScores, old: Tensor, numbers: Unrounded, mask: Tensor
) -> dict[str, Tensor | float]:
    """Means over the tokens of a minibatch on all ranks; a collective. The arguments are those of `minibatch_losses`.

    Args:
        trainer: The Trainer, whose ranks count together.
        asked: The settings of the policy.
        scores: What the learner says of the tokens.
        old: Log-probabilities that the ratio starts from.
        numbers: The other tensors of the minibatch, by name.
        mask: ``(rows, tokens)``.
    """
    tokens: dict[str, Tensor] = {"entropy": scores.entropy}
    if asked.bounds is not None:
        ratio, low, high = probability_ratio(scores.logprobs, old, mask, _ratio(asked)), *asked.bounds
        tokens |= {"clipped_low": (ratio < 1 - low).double(), "clipped_high": (ratio > 1 + high).double()}
    if asked.has_reference:
        tokens["kl"] = kl_estimate(scores.logprobs, numbers["ref_logprobs"], "k3")
    if scores.values is not None:
        tokens["value_loss"] = value_loss(scores.values, numbers["old_values"], numbers["returns"], mask)
    sums = torch.stack([mask, *tokens.values()]).double().masked_fill(~mask, 0).sum((1, 2))
    count, *found = total_of_ranks(trainer, sums)
    return {name: total / count.clamp(min=1) for name, total in zip(tokens, found, strict=True)}


def _ratio(asked: PolicySettings) -> str:
    return "row_mean" if asked.loss == "gspo" else "token"
