"""Advantages, losses and divergences, and their gradients, are those of verl's own functions.

Tested with verl 0.9.1: in float64 all agree to 1e-12, but means over rows and whitened advantages, to whose
denominators verl adds 1e-8. Three differences are meant. verl always bounds the ratio of negative advantages (dual
clip, 3). Its means over rows leave out rows without a token; ours count them, as TRL does, so that a row that is masked
does not make the others weigh more. Its GSPO differentiates each token by itself: the gradient is the same unless
tokens of a row have different weights, where ours and TRL's is that of the row's ratio.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_lora.tasks.rl import gae, group_advantages, kl_estimate, policy_loss
from lightning_lora.tasks.rl.functional.advantages import value_loss, whiten
from lightning_lora.tasks.rl.functional.policy_loss import sampler_correction
from tests.oracle.token_numbers import same, token_numbers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None,
    reason="verl is not installed: pip install --no-deps verl, and what it imports",
)

LENGTHS = (5, 3, 4, 2, 6, 1)
CLIP = (0.2, 0.28)


def of_verl(name: str) -> Any:
    """A function of verl; importing it warns of what other packages deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]

        return getattr(core_algos, name)


def actor(clip: tuple[float, float], **settings: Any) -> Any:
    """verl's settings of a policy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from verl.workers.config import ActorConfig  # pyright: ignore[reportMissingImports]

        given = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "use_dynamic_bsz": True}
        return ActorConfig(clip_ratio=clip[0], clip_ratio_low=clip[0], clip_ratio_high=clip[1], **given | settings)


LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tokens": ("vanilla", "token-mean", {}),
    "rows": ("vanilla", "seq-mean-token-mean", {"normalise": "rows"}),
    "sums of rows": ("vanilla", "seq-mean-token-sum", {"normalise": "constant", "constant": 1}),
    "constant": ("vanilla", "seq-mean-token-sum-norm", {"normalise": "constant", "constant": max(LENGTHS)}),
    "sum": ("vanilla", "token-sum", {"normalise": "sum"}),
    "GSPO": ("gspo", "seq-mean-token-mean", {"ratio": "row_mean", "normalise": "rows", "clip": (0.01, 0.02)}),
    "CISPO": ("cispo", "token-mean", {"detach_ratio": True}),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "with weights"])
@pytest.mark.parametrize(("name", "mode", "ours"), LOSSES.values(), ids=LOSSES)
def test_losses_of_completions(name: str, mode: str, ours: dict[str, Any], weighted: bool) -> None:
    given = token_numbers(LENGTHS)
    clip = ours.get("clip", CLIP)
    weights = sampler_correction(given.old, given.ref, given.mask, high=1.2) if weighted else None
    settings = {"clip": clip, "dual_clip": 1.5 if name == "vanilla" else None} | ours

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(logprobs, given.old, given.advantages, given.mask, weights=weights, **settings)

    def expected(logprobs: Tensor) -> Tensor:
        advantages = given.advantages[:, None].expand(given.mask.shape)
        config = actor(clip, clip_ratio_c=1.5)
        function = of_verl("get_policy_loss_fn")(name)
        return function(given.old, logprobs, advantages, given.mask, mode, config, weights)[0]

    if name == "gspo" and weighted:
        torch.testing.assert_close(loss(given.logprobs), expected(given.logprobs), rtol=1e-7, atol=0)
        return
    same(loss, expected, given.logprobs, tolerance=1e-7 if mode == "seq-mean-token-mean" else 1e-12)


def test_rows_without_a_token_count_here_and_not_in_verl() -> None:
    given = token_numbers((5, 0, 4))
    losses = torch.rand_like(given.old)
    theirs = of_verl("agg_loss")(losses, given.mask, "seq-mean-token-mean")
    advantages = torch.ones(3, dtype=torch.float64)
    ours = policy_loss(losses, losses, advantages, given.mask, weights=-losses, normalise="rows")
    torch.testing.assert_close(ours * 3 / 2, theirs, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("mean", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("grpo", "compute_grpo_outcome_advantage", {"epsilon": 1e-4}),
        ("rloo", "compute_rloo_outcome_advantage", {}),
    ],
)
def test_advantages_within_groups(kind: str, name: str, options: dict[str, Any]) -> None:
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = np.repeat(np.arange(3), 4)
    theirs, _ = of_verl(name)(rewards.reshape(-1, 1).clone(), torch.ones(12, 1), groups, **options)
    torch.testing.assert_close(group_advantages(rewards, kind).view(-1, 1), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0)])
@pytest.mark.parametrize("gap", [False, True], ids=["", "with a gap"])
def test_generalised_advantages(gap: bool, gamma: float, lam: float) -> None:
    given = token_numbers((5, 3, 4))
    mask = given.mask.clone()
    if gap:  # tokens that somebody else wrote
        mask[0, 2] = mask[2, 1] = 0
    rewards = given.old * mask
    found, returns = gae(rewards, given.ref, mask, gamma, lam)
    theirs, their_returns = of_verl("compute_gae_advantage_return")(rewards, given.ref, mask, gamma, lam)
    torch.testing.assert_close(whiten(found, mask), theirs * mask, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(returns, their_returns * mask, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_estimates_of_the_divergence(kind: str) -> None:
    given = token_numbers(LENGTHS)

    def expected(logprobs: Tensor) -> Tensor:
        return of_verl("kl_penalty")(logprobs, given.ref, kind).sum()

    same(lambda logprobs: kl_estimate(logprobs, given.ref, kind).sum(), expected, given.logprobs)


def test_loss_of_values() -> None:
    given = token_numbers(LENGTHS)
    count = given.mask.sum()

    def expected(values: Tensor) -> Tensor:
        return of_verl("compute_value_loss")(values, given.ref, given.old, given.mask, 0.2)[0]

    def loss(values: Tensor) -> Tensor:
        return value_loss(values, given.old, given.ref, given.mask, 0.2).sum() / count

    same(loss, expected, given.logprobs)
