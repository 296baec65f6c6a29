"""Losses and their gradients are those of TRL's own trainers, run on log-probabilities of our choice.

Tested with TRL 1.16.0: in float64 values and gradients agree to 1e-12. One difference is meant, and a test holds it:
``sft`` beside ``sigmoid`` is a mean over the tokens of a micro-batch. Ours is one over pairs, as in the paper, and does
not change with the division of a batch.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.tasks.rl import policy_loss, preference_loss, reward_model_loss
from lightning_lora.tasks.rl.functional.kl import kl_estimate
from lightning_lora.tasks.rl.functional.policy_loss import sampler_correction
from tests.oracle.token_numbers import TokenNumbers, same, token_numbers

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install trl")


def trainer_of(name: str) -> Any:
    """A class of trainers; importing it warns of what other packages deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl  # pyright: ignore[reportMissingImports]

        return getattr(trl, name)


def same_everywhere(values: Any, reduction: str = "") -> Any:
    return values


ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=same_everywhere,
    gather_for_metrics=same_everywhere,
    reduce=same_everywhere,
)
"""An accelerator of one process."""


def own(**settings: Any) -> Any:
    """What a trainer has: settings of its own, one process, and a model in training."""
    common = {"accelerator": ALONE, "model": SimpleNamespace(training=True), "aux_loss_enabled": False}
    return SimpleNamespace(_metrics={"train": defaultdict(list)}, **common, **settings)


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"loss_types": ["sigmoid"]}, {"kind": "sigmoid"}),
    "hinge": ({"loss_types": ["hinge"]}, {"kind": "hinge"}),
    "ipo": ({"loss_types": ["ipo"]}, {"kind": "ipo"}),
    "robust": ({"loss_types": ["robust"], "label_smoothing": 0.2}, {"kind": "robust", "label_smoothing": 0.2}),
    "length_normalised": ({"loss_types": ["sigmoid_norm"]}, {"kind": "length_normalised"}),
    # Sorting one pair changes nothing, and leaves the smoothed loss that TRL's sigmoid has not.
    "cDPO": ({"loss_types": ["aot_unpaired"], "label_smoothing": 0.2}, {"kind": "sigmoid", "label_smoothing": 0.2}),
}
LENGTHS = (5, 3, 4, 2, 6, 1)
"""Of three chosen answers, then of three rejected ones."""


def dpo_of_trl(logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float, **settings: Any) -> Tensor:
    """TRL's loss of pairs, from log-probabilities of tokens ``(2 pairs, tokens)``, chosen rows first."""
    zeros = mask * 0.0
    outputs = SimpleNamespace(log_probs=logprobs * mask, entropy=zeros, mean_logits=zeros, is_top1=mask.bool())
    ids = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids + 1}
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), (reference * mask).sum(-1).chunk(2), strict=True))
    inputs["completion_mask"] = torch.nn.functional.pad(mask, (1, 0)).long()
    settings = {"loss_weights": [1.0] * len(settings["loss_types"]), "label_smoothing": 0.0} | settings
    trainer = own(
        beta=beta,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    return trainer_of("DPOTrainer")._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS)
def test_losses_of_pairs(theirs: dict[str, Any], ours: dict[str, Any], beta: float) -> None:
    given = token_numbers(LENGTHS)
    rows = [0, 3] if theirs["loss_types"] == ["aot_unpaired"] else [0, 1, 2, 3, 4, 5]
    names = ("chosen_lengths", "rejected_lengths")
    lengths = dict(zip(names, given.mask[rows].sum(-1).chunk(2), strict=True))

    def loss(logprobs: Tensor) -> Tensor:
        policy, reference = ((of * given.mask)[rows].sum(-1).chunk(2) for of in (logprobs, given.ref))
        return preference_loss(*policy, *reference, beta=beta, **ours, **lengths).mean()

    def expected(logprobs: Tensor) -> Tensor:
        return dpo_of_trl(logprobs[rows], given.ref[rows], given.mask[rows], beta, **theirs)

    same(loss, expected, given.logprobs)


def test_likelihood_of_chosen_answers_is_pooled_by_trl_and_a_mean_over_pairs_here() -> None:
    for lengths, agree in (((4, 4, 4, 2, 6, 1), True), (LENGTHS, False)):
        given = token_numbers(lengths)
        policy, reference = ((of * given.mask).sum(-1).chunk(2) for of in (given.logprobs, given.ref))
        sizes = given.mask.sum(-1).chunk(2)
        ours = preference_loss(
            *policy, *reference, beta=0.1, nll_weight=1.0, chosen_lengths=sizes[0], rejected_lengths=sizes[1]
        ).mean()
        theirs = dpo_of_trl(given.logprobs, given.ref, given.mask, 0.1, loss_types=["sigmoid", "sft"])
        assert torch.allclose(ours, theirs, rtol=1e-12) is agree


def grpo_of_trl(given: TokenNumbers, logprobs: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """TRL's loss of completions, from log-probabilities of their tokens."""
    mask = given.mask
    inputs = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask}
    inputs |= {"advantages": given.advantages, "old_per_token_logps": given.old, "ref_per_token_logps": given.ref}
    inputs |= {"num_items_in_batch": mask.sum(), "importance_sampling_ratio": settings.pop("weights", None)}
    args = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    trainer = own(
        args=args,
        loss_type=loss_type,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        use_vllm=inputs["importance_sampling_ratio"] is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=7,
        _entropy_bonus_enabled=False,
        **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0} | settings,
    )
    return trainer_of("GRPOTrainer")._compute_loss(trainer, None, inputs)


CLIP = (0.2, 0.28)
COMPLETIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows (GRPO)": ({"loss_type": "grpo"}, {"normalise": "rows"}),
    "tokens of the micro-batch (BNPO)": ({"loss_type": "bnpo"}, {"normalise": "tokens"}),
    "tokens of the step (DAPO)": ({"loss_type": "dapo"}, {"normalise": "tokens"}),
    "constant (Dr. GRPO)": ({"loss_type": "dr_grpo"}, {"normalise": "constant", "constant": 7}),
    "sums of rows (LUSPO)": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"normalise": "constant", "constant": 1, "ratio": "row_mean"},
    ),
    "dual clip": ({"loss_type": "dapo", "delta": 1.5}, {"normalise": "tokens", "dual_clip": 1.5}),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.02},
        {"normalise": "rows", "ratio": "row_mean", "clip": (0.01, 0.02)},
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        {"normalise": "tokens", "detach_ratio": True, "clip": (1.0, 0.5)},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_losses_of_completions(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    given = token_numbers(LENGTHS)

    settings: dict[str, Any] = {"clip": CLIP} | ours

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(logprobs, given.old, given.advantages, given.mask, **settings)

    same(loss, lambda logprobs: grpo_of_trl(given, logprobs, **theirs), given.logprobs)


def test_divergence_in_the_loss() -> None:
    given = token_numbers(LENGTHS)

    def loss(logprobs: Tensor) -> Tensor:
        policy = policy_loss(logprobs, given.old, given.advantages, given.mask, clip=CLIP)
        divergence = kl_estimate(logprobs, given.ref, "k3")
        return policy + 0.3 * (divergence * given.mask).sum() / given.mask.sum()

    same(loss, lambda logprobs: grpo_of_trl(given, logprobs, "dapo", beta=0.3), given.logprobs)


@pytest.mark.parametrize(("level", "ratio"), [("token", "token"), ("sequence", "row_mean")])
def test_weights_for_the_sampler(level: str, ratio: str) -> None:
    given = token_numbers(LENGTHS)
    weights = sampler_correction(given.old, given.ref, given.mask, high=1.2)

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(logprobs, given.old, given.advantages, given.mask, clip=CLIP, weights=weights, ratio=ratio)

    def expected(logprobs: Tensor) -> Tensor:
        return grpo_of_trl(given, logprobs, "dapo", weights=weights, importance_sampling_level=level)

    same(loss, expected, given.logprobs)


def test_ratio_of_whole_completions_as_in_rloo() -> None:
    given = token_numbers(LENGTHS)

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(
            logprobs, given.old, given.advantages, given.mask, clip=(0.2, 0.2), ratio="row_sum", normalise="rows"
        )

    def expected(logprobs: Tensor) -> Tensor:
        mask = given.mask
        inputs = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask}
        inputs |= {"completion_mask": mask, "advantages": given.advantages, "old_logps": (given.old * mask).sum(-1)}
        trainer = own(
            epsilon_low=0.2,
            epsilon_high=0.2,
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        )
        return trainer_of("RLOOTrainer")._compute_loss(trainer, None, inputs)

    same(loss, expected, given.logprobs)


@pytest.mark.parametrize(("margin", "centre"), [(False, 0.0), (True, 0.01)])
def test_loss_of_reward_models(margin: bool, centre: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, dtype=torch.float64, generator=generator)
    margins = torch.rand(3, dtype=torch.float64, generator=generator)

    def loss(scores: Tensor) -> Tensor:
        chosen, rejected = scores.chunk(2)
        return reward_model_loss(chosen, rejected, margin=margins if margin else 0.0, centre=centre).mean()

    def expected(scores: Tensor) -> Tensor:
        ids = torch.ones(6, 2, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids} | ({"margin": margins} if margin else {})
        trainer = own(args=SimpleNamespace(center_rewards_coefficient=centre), _total_train_tokens=0, _tp_size=1)
        return trainer_of("RewardTrainer").compute_loss(
            trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs
        )

    same(loss, expected, scores)
