"""Reinforcement learning of a causal language model from rewards of its own completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.token_loss import one_if_zero
from lightning_lora.callbacks.progress import needs_metric
from lightning_lora.errors import PolicySettingError, check_arguments
from lightning_lora.lightning_private import wrap_training_loader
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.lora.reports import count_parameters
from lightning_lora.lora.shards import reshard
from lightning_lora.tasks.rl.completions import texts_of
from lightning_lora.tasks.rl.functional.policy_loss import loss_sum_and_count
from lightning_lora.tasks.rl.learning_signal import LearningSignal
from lightning_lora.tasks.rl.policy_model import PolicyModel
from lightning_lora.tasks.rl.policy_settings import PolicySettings, warn_of_unused
from lightning_lora.tasks.rl.policy_step import minibatch_losses, step_statistics
from lightning_lora.tasks.rl.rewards.pool import RewardPool
from lightning_lora.tasks.rl.rollout import Rollout, RolloutLoader, seed_of
from lightning_lora.tasks.rl.rollout_maker import RolloutMaker
from lightning_lora.tasks.rl.sampler_mismatch import check_mismatch, measure_mismatch
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import Sampler, Samples, SamplingSettings
from lightning_lora.tasks.running_mean import RunningMean

_SIGNAL_KEY = "lightning_lora_rewards"


class PolicyGradient(PolicyModel):
    """Reinforcement learning of a causal language model: it writes completions, and learns from their rewards.

    Prompts become rollouts inside of the training loader: completions are sampled with the weights of that moment,
    rewarded, compared with the other completions of the same prompt, and handed to ``training_step`` in minibatches.
    The loss is normalised over the optimizer step, as in the other tasks. Dropout is off. With LoRA, the reference of a
    KL penalty is the same model as training begins. What is logged is listed in docs/use/reinforcement.md.

    Args:
        model: Folder of a model on this machine, or its hub name. Weights must be stored as safetensors.
        learning_rate: The learning rate *of full fine-tuning*; see `PretrainedTask`.
        lora: LoRA settings; None trains the whole model. For RL adapt the output layer too (``adapt_head``).
        reward: ``reward(prompts, completions, **columns) -> list of numbers``, one for each completion; or a
            `RewardPool` of one, which sets more than ``reward_workers`` and ``reward_timeout`` do. A ``nn.Module`` is
            put on the policy's device in eval mode; it is no part of the policy, which does not train or save it.
        group_size: Completions of each prompt.
        max_new_tokens: Tokens of a completion at most.
        loss: ``"importance"`` (the ratio of probabilities times the advantage), ``"clip"`` (PPO), ``"gspo"`` (the ratio
            of a whole completion, clipped) or ``"cispo"`` (the clipped ratio only weighs the gradient).
        advantage: ``"mean"`` (reward minus the mean of its group), ``"grpo"``, ``"rloo"`` and ``"batch"``: see
            `group_advantages`; ``"gae"`` adds a value head that learns what to expect of each token.
        normalise: The loss is a mean over ``"tokens"`` or ``"rows"`` of the optimizer step, is divided by
            ``"constant"`` (completions times ``max_new_tokens``), or is the ``"sum"``.
        clip: How far the ratio may fall below 1 and rise above it. None takes what suits the loss.
        dual_clip: Largest ratio that counts for a negative advantage with ``loss="clip"``; None sets no limit.
        kl: ``"k2"`` in the loss, or ``"k1"`` in the reward.
        kl_coefficient: Weight of the divergence from the reference; 0 needs no reference.
        reference: ``"adapter_off"`` (the base) or ``"frozen"`` (a copy of the adapter as training begins). None takes
            the base for a new adapter, and a copy for one that was loaded.
        minibatches: Parts of a rollout, each a batch of the training loader.
        epochs: Times that a rollout is trained on.
        temperature: Divides the logits, of sampler and learner alike.
        top_p: Only 1 can be trained on.
        stop: Texts that end a completion.
        truncated: ``"keep"`` trains completions that were cut off like others; ``"mask"`` leaves them out of the loss
            and of the mean of their group.
        length_buffer: Tokens before ``max_new_tokens`` over which a penalty grows to 1; 0 gives none.
        gamma: Discount per token with ``"gae"``.
        lam: Weight of later tokens with ``"gae"``.
        value_coefficient: Weight of the loss of the value head.
        value_clip: How far a value may move from that of its rollout; None does not clip.
        sampler_cap: Largest weight that corrects a token for the sampler's probability; None corrects nothing.
        mismatch_limit: Nats per token by which sampler and learner may disagree before the run stops.
        patience: Rollouts in succession without a difference in any group before the run says so and ends.
        sampler: Draws completions; None draws them with the model itself.
        reward_workers: Processes that compute rewards; 0 computes them in this one, without a time limit.
        reward_timeout: Seconds that a reward may take; None sets no limit.
        settings: The other settings of `PretrainedTask`.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
        TargetNotFoundError: If a LoRA pattern matches nothing in this model.
    """

    _unsaved = ("reward", "sampler")
    reward: Callable[..., Any] | None
    sampler: Sampler | None

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        reward: Callable[..., Any] | None = None,
        group_size: int = 8,
        max_new_tokens: int = 256,
        loss: str = "importance",
        advantage: str = "mean",
        normalise: str = "tokens",
        clip: tuple[float, float] | None = None,
        dual_clip: float | None = None,
        kl: str = "k2",
        kl_coefficient: float = 0.0,
        reference: str | None = None,
        minibatches: int = 1,
        epochs: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        truncated: str = "keep",
        length_buffer: int = 0,
        gamma: float = 1.0,
        lam: float = 0.95,
        value_coefficient: float = 0.5,
        value_clip: float | None = 0.2,
        sampler_cap: float | None = None,
        mismatch_limit: float = 0.02,
        patience: int = 20,
        sampler: Sampler | None = None,
        reward_workers: int = 2,
        reward_timeout: float | None = 10.0,
        **settings: Any,
    ) -> None:
        given = locals()
        check_arguments(PolicyGradient, given, PolicySettingError)
        fields = [field.name for field in dataclasses.fields(PolicySettings)]
        self.policy_settings = asked = PolicySettings(**{name: given[name] for name in fields})
        warn_of_unused(PolicyGradient, given)
        if asked.has_reference and lora is None:
            raise PolicySettingError(
                "kl_coefficient needs a reference, which is the model with its adapters off, and lora=None trains the "
                "whole model: give lora, or kl_coefficient=0."
            )
        super().__init__(model, learning_rate, lora, reference, **settings)
        # Past `nn.Module`, which would make a module a part of the policy: converted, trained and saved with it.
        vars(self).update(reward=reward, sampler=sampler)
        # In this process a reward sees all rows at once, as one that compares them or uses a model needs.
        at_once = 1 if reward_workers else None
        self._pool = reward if isinstance(reward, RewardPool) else None
        if reward is not None and self._pool is None:
            self._pool = RewardPool(reward, reward_workers, reward_timeout, at_once)
        self.sampling = SamplingSettings(max_new_tokens, temperature, top_p, tuple(stop))
        self.signal = LearningSignal(patience)
        self.mean_reward, self.mean_greedy = RunningMean(), RunningMean()
        self._maker: RolloutMaker | None = None

    @property
    def has_learning_signal(self) -> bool:
        """Whether any rollout had completions of one prompt with different rewards; True before the first."""
        return self.signal.had_any or not self.signal.episodes

    @property
    def rows_per_sample(self) -> int:
        """Rows of a batch that belong to one independent sample: the completions of a prompt."""
        return self.policy_settings.group_size

    @override
    def setup(self, stage: str) -> None:
        """Turn the prompts of the training loader into rollouts."""
        super().setup(stage)
        self._maker = None  # another Trainer may have another precision, and its data another tokenizer
        if self._pool is None:
            raise PolicySettingError(
                "PolicyGradient has no reward: give reward= a function reward(prompts, completions, **columns) that "
                "returns a number for each completion."
            )
        self._pool.place(self.trainer.strategy.root_device)
        if stage == "fit":
            wrap_training_loader(self.trainer, self, self._rollouts)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the minibatch's share of the loss of the optimizer step."""
        if "numbers" not in batch:
            # Not an error of ours: a trace of the step takes those for what a run would end with.
            raise ValueError("a policy trains on completions of prompts, which its loader writes during fit only.")
        asked, numbers = self.policy_settings, batch["numbers"]
        scores = self.score(batch)
        # A token that the policy or the sampler gives no probability has no ratio.
        mask = batch["mask"].bool() & scores.logprobs.isfinite() & numbers["sampler_logprobs"].isfinite()
        is_fresh = batch["version"] == self.trainer.global_step
        old = scores.logprobs.detach() if is_fresh else numbers["old_logprobs"]
        losses = minibatch_losses(asked, scores, old, numbers, mask)
        rows = mask.any(-1) | (asked.truncated == "keep")
        constant = asked.max_new_tokens if asked.normalise == "constant" else None
        total, count = loss_sum_and_count(losses[rows], mask[rows], asked.normalise, constant)
        if is_fresh:
            mismatch = measure_mismatch(self.trainer, scores.logprobs, numbers["sampler_logprobs"], mask)
            check_mismatch(mismatch, asked.mismatch_limit)
            batch["statistics"] |= {"sampler_mismatch": mismatch.largest, "sampler_mismatch_share": mismatch.share}
        found = step_statistics(self.trainer, asked, scores, old, numbers, mask)
        found |= batch["statistics"] | {"rollout_age": float(self.trainer.global_step - batch["version"])}
        num_prompts = len(batch["prompts"])
        prog_bar = needs_metric(self._trainer, "train_loss")
        self.log("train_loss", total.detach() / one_if_zero(count), prog_bar=prog_bar, batch_size=num_prompts)
        self.log("reward", found.pop("reward"), prog_bar=True, batch_size=num_prompts)
        self.log_dict(found, batch_size=num_prompts)
        # A count of 0 is divided by as 1.
        return self.token_loss(total, torch.zeros_like(count) if asked.normalise == "sum" else count)

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the rewards of one sampled and one greedy completion of each prompt to the means."""
        self._evaluate_rewards(batch, batch_idx)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the rewards of one sampled and one greedy completion of each prompt to the means."""
        self._evaluate_rewards(batch, batch_idx)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """One sampled completion of each prompt: its ``text`` and its ``reward``, each a list."""
        samples = self._draw(batch, batch_idx, self.sampling)
        maker = self._rollout_maker()
        texts = texts_of(samples, batch["prompts"], 1, maker.tokenizer)
        return {"text": texts, "reward": maker.rewards(batch, samples, 1).tolist()}

    @override
    def on_train_end(self) -> None:
        """Say how much the rewards can have taught."""
        super().on_train_end()
        trained = count_parameters(self).trainable
        rank_zero_info(self.signal.budget(trained))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the rewards of the run were like."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SIGNAL_KEY] = self.signal.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting where the run was interrupted."""
        super().on_load_checkpoint(checkpoint)
        self.signal.load_state_dict(checkpoint.get(_SIGNAL_KEY, {}))

    def _rollouts(self, prompts: Any) -> Any:
        """The training loader that makes rollouts of prompts."""
        asked = self.policy_settings
        return RolloutLoader(
            prompts, self._roll_out, asked.minibatches, asked.epochs, self.trainer, torch.initial_seed()
        )

    def _roll_out(self, batch: Any, seed: int) -> Rollout:
        assert self.model is not None
        with in_eval_mode(self.model):
            rollout = self._rollout_maker().make(self.trainer, batch, seed)
        reshard(self)
        return rollout

    def _rollout_maker(self) -> RolloutMaker:
        if self._maker is None:
            assert self._pool is not None
            tokenizer = self.trained_tokenizer
            self._maker = RolloutMaker(
                self.policy_settings,
                self.sampling,
                self.sampler or InProcessSampler(tokenizer),
                self._pool,
                tokenizer,
                self.context_length,
                self.model,
                self.score,
                self.as_reference,
                self.trainer.precision_plugin.forward_context,
                self.signal,
            )
        return self._maker

    def _evaluate_rewards(self, batch: dict[str, Any], batch_idx: int) -> None:
        maker, greedy = self._rollout_maker(), dataclasses.replace(self.sampling, temperature=0.0)
        for mean, how in ((self.mean_reward, self.sampling), (self.mean_greedy, greedy)):
            rewards = maker.rewards(batch, self._draw(batch, batch_idx, how), 1)
            weights = batch.get("weights", torch.ones(len(rewards))).to(rewards.device)
            mean.update(rewards * weights, weights.sum())

    def _draw(self, batch: dict[str, Any], batch_idx: int, how: SamplingSettings) -> Samples:
        """One completion of each prompt; the same random numbers in every evaluation."""
        seed = seed_of("evaluation", self.trainer.global_rank, batch_idx)
        prompts = [ids.to(self.device) for ids in batch["input_ids"]]
        with torch.no_grad():
            samples = self._rollout_maker().draw(prompts, 1, self.trainer.global_step, seed, how)
        reshard(self)
        return samples

    @override
    def _log_means(self, stage: str) -> None:
        metrics = {"reward": self.mean_reward.compute(), "reward_greedy": self.mean_greedy.compute()}
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()}, prog_bar=True, sync_dist=True)
