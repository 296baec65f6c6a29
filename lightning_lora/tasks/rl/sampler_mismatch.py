"""How far the log-probabilities of the sampler are from those of the learner, for the same tokens and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_lora.errors import GuardError
from lightning_lora.sharding.collectives import largest_of_ranks, total_of_ranks

# A change of probability that counts as a disagreement. Models in bfloat16 have 4 to 8 % of such tokens.
_LARGE_CHANGE = 0.1


class SamplerMismatch(NamedTuple):
    """The disagreement over all tokens of a minibatch on all ranks.

    Args:
        largest: Largest difference of two log-probabilities, nats.
        k2: Mean of half their square, an estimate of the divergence, nats per token.
        share: Share of tokens whose probabilities differ by more than a tenth.
    """

    largest: float
    k2: float
    share: float


def measure_mismatch(trainer: Trainer, logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> SamplerMismatch:
    """Compare learner and sampler; a collective.

    Args:
        trainer: The Trainer, whose ranks count together.
        logprobs: Log-probabilities by the learner, ``(rows, tokens)``, nats.
        sampler_logprobs: Log-probabilities by the sampler, ``(rows, tokens)``.
        mask: ``(rows, tokens)``.
    """
    differences = (logprobs.detach() - sampler_logprobs).double()[mask.bool()]
    is_large = (differences.exp() - 1).abs() > _LARGE_CHANGE
    sums = torch.stack([differences.square().sum() / 2, is_large.sum(), mask.sum().double()])
    squares, large, count = total_of_ranks(trainer, sums).tolist()
    largest = largest_of_ranks(trainer, differences.abs().amax() if len(differences) else sums.new_zeros(()))
    return SamplerMismatch(float(largest), squares / max(1, count), large / max(1, count))


def check_mismatch(found: SamplerMismatch, limit: float) -> None:
    """Stop where the sampler draws from another policy than the one that is trained.

    Args:
        found: The measured disagreement.
        limit: Largest ``k2``.

    Raises:
        GuardError: If it is larger, or not a number.
    """
    if not found.k2 <= limit:
        raise GuardError(
            f"sampler and learner disagree on the same tokens: the divergence is {found.k2:.3g} nats per token (limit "
            f"{limit:g}), the largest difference {found.largest:.3g} nats, and {found.share:.1%} of the tokens differ "
            "by more than a tenth. The sampler has other weights, another temperature or other tokens; if only its "
            "precision is lower, raise mismatch_limit and set sampler_cap."
        )
