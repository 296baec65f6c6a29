"""From a batch of prompts to a rollout: sample, score, compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_lora.sharding.collectives import total_of_ranks
from lightning_lora.tasks.rl.completions import check_prompts, check_samples, rows_of, texts_of
from lightning_lora.tasks.rl.functional.advantages import (
    constant_groups,
    gae,
    group_advantages,
    overlong_penalty,
    whiten,
)
from lightning_lora.tasks.rl.functional.kl import kl_estimate
from lightning_lora.tasks.rl.learning_signal import LearningSignal, reward_bits
from lightning_lora.tasks.rl.policy_settings import PolicySettings
from lightning_lora.tasks.rl.rewards.pool import RewardPool
from lightning_lora.tasks.rl.rollout import Rollout, minibatch_orders, seed_of
from lightning_lora.tasks.rl.sampling.samples import Sampler, Samples, SamplingSettings

# Of the completions of a rollout: above it a warning says so.
_LARGE_SHARE = 0.5


class TokenScores(NamedTuple):
    """What the learner says of the tokens of a minibatch, each ``(rows, tokens)``.

    Args:
        logprobs: Log-probabilities of the sampled tokens, nats.
        entropy: Entropies of the distributions they were drawn from, nats.
        values: What the value head expects; None without one.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


@dataclasses.dataclass
class RolloutMaker:
    """Samples completions of prompts, has them rewarded, and computes all that their training needs.

    Args:
        settings: Settings of the policy.
        sampling: Settings of the sampler.
        sampler: Draws completions.
        pool: Scores them.
        tokenizer: Turns tokens into the text that a reward reads.
        context: Tokens of a row that the model was made for; None if it sets no limit.
        model: The model of transformers that is trained.
        score: The learner's `TokenScores` of a minibatch.
        as_reference: A context in which ``score`` is that of the reference.
        precision: A context in which models compute as in a step of the Trainer.
        signal: Follows the rewards of the run.

    Attributes:
        has_warned: Whether the user knows that most completions are cut off.
    """

    settings: PolicySettings
    sampling: SamplingSettings
    sampler: Sampler
    pool: RewardPool
    tokenizer: Any
    context: int | None
    model: Any
    score: Callable[[Mapping[str, Any]], TokenScores]
    as_reference: Callable[[], AbstractContextManager[Any]]
    precision: Callable[[], AbstractContextManager[Any]]
    signal: LearningSignal
    has_warned: bool = dataclasses.field(default=False, init=False)

    @torch.no_grad()
    def make(self, trainer: Trainer, batch: Mapping[str, Any], seed: int) -> Rollout:
        """A rollout of the present weights.

        Args:
            trainer: The Trainer that will train on it.
            batch: A batch of prompts, as `PromptDataModule` makes it.
            seed: Decides what is sampled and in which order it is trained on.
        """
        asked, version = self.settings, trainer.global_step
        device = trainer.strategy.root_device
        prompts = [ids.to(device) for ids in batch["input_ids"]]
        check_prompts(prompts, asked.max_new_tokens, self.context)
        samples = self.draw(prompts, asked.group_size, version, seed)
        rewards = self.rewards(batch, samples, asked.group_size).to(device)
        tokens, sampler_logprobs, lengths = rows_of(prompts, samples, asked.group_size)
        is_used = samples.finished | (asked.truncated == "keep")
        tokens["mask"] *= is_used[:, None]
        order = torch.Generator().manual_seed(seed_of(seed, "order"))
        orders = minibatch_orders(len(prompts), asked.minibatches, asked.epochs, order)
        rollout = Rollout(
            tokens,
            lengths,
            {"sampler_logprobs": sampler_logprobs},
            asked.group_size,
            version,
            [each.to(device) for each in orders],
        )
        with self.precision():
            self._score(rollout, trainer.accumulate_grad_batches)
        shaped = rewards
        if asked.length_buffer:
            shaped = rewards + overlong_penalty(samples.lengths, asked.max_new_tokens, asked.length_buffer)
        rollout.numbers["advantages"] = self._advantages(trainer, rollout, shaped, is_used)
        rollout.statistics = self._statistics(trainer, rollout, rewards, samples.lengths, samples.finished)
        return rollout

    def draw(
        self, prompts: list[Tensor], group_size: int, version: int, seed: int, how: SamplingSettings | None = None
    ) -> Samples:
        """Completions of prompts by the present weights, checked; drawn as in training, or as ``how`` says."""
        self.sampler.load(self.model, version)
        generator = torch.Generator(prompts[0].device).manual_seed(seed)
        with self.precision():
            samples = self.sampler.sample(prompts, group_size, how or self.sampling, generator)
        check_samples(samples, len(prompts) * group_size, version)
        return samples

    def rewards(self, batch: Mapping[str, Any], samples: Samples, group_size: int) -> Tensor:
        """What the reward says of completions, ``(rows,)`` float32."""
        texts = texts_of(samples, batch["prompts"], group_size, self.tokenizer)
        prompts = [prompt for prompt in batch["prompts"] for _ in range(group_size)]
        columns = {
            name: [value for value in values for _ in range(group_size)] for name, values in batch["columns"].items()
        }
        return torch.tensor(self.pool(prompts, texts, columns), dtype=torch.float32)

    def _score(self, rollout: Rollout, accumulation: int) -> None:
        """Keep what learner and reference say of the tokens now, where training needs it later."""
        asked = self.settings
        # Within the first optimizer step the learner's own log-probabilities are those of now.
        is_reused = asked.minibatches * asked.epochs > accumulation
        for index in range(asked.minibatches):
            minibatch = rollout.minibatch(index)
            if is_reused or asked.has_values or (asked.has_reference and asked.kl == "k1"):
                scores = self.score(minibatch)
                rollout.fill("old_logprobs", index, scores.logprobs)
                if scores.values is not None:
                    rollout.fill("old_values", index, scores.values)
            if asked.has_reference:
                with self.as_reference():
                    rollout.fill("ref_logprobs", index, self.score(minibatch).logprobs)

    def _advantages(self, trainer: Trainer, rollout: Rollout, rewards: Tensor, is_used: Tensor) -> Tensor:
        """Advantages of tokens, ``(rows, tokens)``; with a value head, the returns are kept too."""
        asked, mask, numbers = self.settings, rollout.tokens["mask"], rollout.numbers
        penalty = torch.zeros_like(numbers["sampler_logprobs"])
        if asked.has_reference and asked.kl == "k1":
            penalty = asked.kl_coefficient * kl_estimate(numbers["old_logprobs"], numbers["ref_logprobs"], "k1") * mask

        def over_ranks(sums: Tensor) -> Tensor:
            return total_of_ranks(trainer, sums)

        if not asked.has_values:
            shape = (-1, asked.group_size)
            totals = (rewards - penalty.sum(-1)).view(shape)
            found = group_advantages(totals, asked.advantage, mask=is_used.view(shape), sum_over_ranks=over_ranks)
            return found.view(-1, 1) * mask
        per_token = -penalty
        per_token[torch.arange(len(mask)), rollout.lengths - 2] += rewards
        found, numbers["returns"] = gae(per_token, numbers["old_values"], mask, asked.gamma, asked.lam)
        return whiten(found, mask, sum_over_ranks=over_ranks)

    def _statistics(
        self, trainer: Trainer, rollout: Rollout, rewards: Tensor, lengths: Tensor, finished: Tensor
    ) -> dict[str, float]:
        """What is logged of a rollout, of all ranks together; a collective."""
        groups = rewards.view(-1, rollout.group_size)
        constant = constant_groups(groups).sum()
        has_advantage = rollout.numbers["advantages"].any()
        wide = rewards.double()
        sums = [wide.sum(), wide.square().sum(), lengths.sum(), (~finished).sum(), constant, has_advantage]
        sums += [torch.tensor(float(count), device=wide.device) for count in (len(wide), len(groups))]
        sums.append(torch.tensor(reward_bits(rewards), device=wide.device))
        total, squares, tokens, cut, constant, advantage, rows, prompts, bits = total_of_ranks(
            trainer, torch.stack([each.double() for each in sums])
        ).tolist()
        truncated = cut / rows
        if truncated > _LARGE_SHARE and not self.has_warned:
            self.has_warned = True
            rank_zero_warn(
                f"{truncated:.0%} of the completions were cut off at max_new_tokens={self.settings.max_new_tokens}: "
                "most rewards judge an answer that is not there. Raise max_new_tokens, or check that the model can end "
                "its turn."
            )
        said = self.signal.add(bool(advantage), round(rows), bits)
        if said is not None:
            rank_zero_warn(said)
            trainer.should_stop = True
        return {
            "reward": total / rows,
            "reward_std": max(0.0, squares / rows - (total / rows) ** 2) ** 0.5,
            "completion_tokens": tokens / rows,
            "truncated": truncated,
            "constant_groups": constant / prompts,
            "information_bits": self.signal.bits,
        }
