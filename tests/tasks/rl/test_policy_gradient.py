"""What a policy learns, and what it is told where it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import GPT2LMHeadModel
from typing_extensions import override

from lightning_lora import ConfigError, DataError, LoRAConfig
from lightning_lora.callbacks import BatchSizeMonitor, LoRAGuard
from lightning_lora.errors import GuardError
from lightning_lora.tasks.rl import group_advantages, policy_loss
from lightning_lora.tasks.rl.sampling.samples import Samples
from tests.support import toys
from tests.support.tiny_models import gpt2
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED


class Gradients(Callback):
    """The gradients of each step, before clipping, and the batches it was made of."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.batches: list[dict[str, Any]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def test_the_gradient_of_a_step_is_that_of_the_formula(llama_folder: Path, tmp_path: Path) -> None:
    seen, module = Gradients(), policies.make(llama_folder, max_new_tokens=4, learning_rate=1e-12)
    policies.fit(module, tmp_path, max_steps=1, callbacks=[seen])
    (batch,), (found,) = seen.batches, seen.steps
    module.zero_grad()
    assert module.model is not None
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    policy_loss(logprobs, logprobs.detach(), batch["numbers"]["advantages"][:, :-1], batch["mask"][:, :-1]).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-7), name
    assert any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("normalise", ["tokens", "rows", "constant", "sum"])
def test_minibatches_that_are_accumulated_give_the_gradient_of_the_whole_rollout(
    normalise: str, llama_folder: Path, tmp_path: Path
) -> None:
    """Also where the last window is short: six prompts are three minibatches of two, in windows of two."""
    found = []
    for minibatches, accumulate in ((1, 1), (3, 3), (3, 4)):
        seen, module = Gradients(), policies.make(llama_folder, minibatches=minibatches, normalise=normalise)
        torch.manual_seed(0)
        loader = policies.prompt_loader(6, batch_size=6, shuffle=False)
        policies.fit(module, tmp_path, callbacks=[seen], loader=loader, accumulate_grad_batches=accumulate)
        assert len(seen.steps) == 1
        found.append(seen.steps[0])
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_a_policy_earns_more_than_at_the_start(llama_folder: Path, tmp_path: Path) -> None:
    module = policies.make(llama_folder, learning_rate=5e-3, group_size=8, lora=LoRAConfig(rank=2, adapt_head=True))
    rewards: list[float] = []

    class Record(Callback):
        @override
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            rewards.append(float(trainer.callback_metrics["reward"]))

    policies.fit(module, tmp_path, max_steps=25, callbacks=[Record()], loader=policies.prompt_loader(32, 4))
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


LOGGED = {"train_loss", "reward", "reward_std", "completion_tokens", "truncated", "constant_groups", "entropy"}
LOGGED |= {"sampler_mismatch", "sampler_mismatch_share", "rollout_age", "information_bits"}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, set()),
        ({"loss": "clip", "dual_clip": 3.0, "minibatches": 2, "epochs": 2}, {"clipped_low", "clipped_high"}),
        ({"loss": "gspo", "normalise": "rows"}, {"clipped_low", "clipped_high"}),
        ({"loss": "cispo", "sampler_cap": 2.0}, {"clipped_low", "clipped_high"}),
        ({"advantage": "grpo", "kl_coefficient": 0.1}, {"kl"}),
        ({"advantage": "rloo", "kl_coefficient": 0.1, "kl": "k1"}, {"kl"}),
        ({"advantage": "batch", "length_buffer": 2}, set()),
        (
            {"advantage": "gae", "group_size": 1, "loss": "clip", "epochs": 2},
            {"value_loss", "clipped_low", "clipped_high"},
        ),
        ({"lora": None, "learning_rate": 1e-2}, set()),
        ({"temperature": 0.7, "normalise": "sum"}, set()),
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()) if isinstance(options, dict) else "",
)
def test_every_method_trains_under_the_guard_and_logs_its_names(
    options: dict[str, Any], more: set[str], llama_folder: Path, tmp_path: Path
) -> None:
    module = policies.make(llama_folder, **options)
    module.configure_model()
    before = policies.trained(module)
    validation = policies.prompt_loader(4, shuffle=False)
    settings: dict[str, Any] = {"gradient_clip_val": 1.0, "callbacks": [LoRAGuard()], "validation": validation}
    runner = policies.fit(module, tmp_path, **settings)
    assert set(runner.callback_metrics) == LOGGED | more | {"val_reward", "val_reward_greedy"}
    assert all(torch.isfinite(value) for value in runner.callback_metrics.values())
    assert runner.callback_metrics["sampler_mismatch"] < 1e-4
    assert any(not torch.equal(one, two) for one, two in zip(before, policies.trained(module), strict=True))


def test_dropout_of_the_model_is_off_and_that_of_adapters_is_refused(tmp_path: Path) -> None:
    folder = toys.save_llama(tmp_path / "wet", attention_dropout=0.5)
    module = policies.make(folder)
    runner = policies.fit(module, tmp_path, max_steps=3)
    assert runner.callback_metrics["sampler_mismatch"] < 1e-4
    with pytest.raises(ConfigError, match=r"set lora.dropout to 0"):
        policies.make(folder, lora=LoRAConfig(rank=2, dropout=0.1))


def test_without_a_reward_nothing_moves_and_the_run_says_so(llama_folder: Path, tmp_path: Path) -> None:
    module = policies.make(llama_folder, policies.nothing)
    runner = toys.trainer(tmp_path, max_epochs=-1, max_steps=50, callbacks=[LoRAGuard()])
    before: list[torch.Tensor] = []

    class Start(Callback):
        @override
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.extend(policies.trained(pl_module))

    runner.callbacks.insert(0, Start())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(
        UserWarning, match="no learning signal: for 20 rollouts all completions of a prompt had the same"
    ):
        runner.fit(module, policies.prompt_loader())
    assert runner.global_step == 20
    assert all(torch.equal(one, other) for one, other in zip(before, policies.trained(module), strict=True))
    assert runner.callback_metrics["constant_groups"] == 1
    assert torch.isfinite(runner.callback_metrics["train_loss"])


def test_a_sampler_that_draws_from_another_policy_is_stopped(llama_folder: Path, tmp_path: Path) -> None:
    module = policies.make(llama_folder, sampler=policies.PlainSampler(shift=0.3))
    with pytest.raises(GuardError, match=r"sampler and learner disagree .* 0.045 nats per token \(limit 0.02\)"):
        policies.fit(module, tmp_path)


class OldWeights(policies.PlainSampler):
    """Goes on with the weights of the first step."""

    @override
    def load(self, model: Any, version: int) -> None:
        super().load(model, 0)


class Silent(policies.PlainSampler):
    """Ends one completion before it begins."""

    @override
    def sample(
        self, prompts: list[torch.Tensor], group_size: int, settings: Any, generator: torch.Generator
    ) -> Samples:
        samples = super().sample(prompts, group_size, settings, generator)
        samples.lengths[0] = 0
        return samples


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (OldWeights(), GuardError, "the sampler drew with weights of step 0 and the policy is at step 1"),
        (Silent(), DataError, "1 of 8 completions have no token"),
    ],
)
def test_faulty_samplers_are_refused(
    sampler: Any, error: type[Exception], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        policies.fit(policies.make(llama_folder, sampler=sampler), tmp_path)


def test_prompts_that_leave_no_room_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt \d of a batch has \d tokens, which leave no room for 62 new ones"):
        policies.fit(policies.make(llama_folder, max_new_tokens=62), tmp_path)


def test_completions_that_are_cut_off_are_told_of_once_and_can_be_left_out(llama_folder: Path, tmp_path: Path) -> None:
    sampler = policies.PlainSampler(end=-1)
    module = policies.make(llama_folder, sampler=sampler, truncated="mask")
    with pytest.warns(UserWarning, match="100% of the completions were cut off at max_new_tokens=5") as told:
        runner = policies.fit(module, tmp_path)
    assert sum("cut off" in str(warning.message) for warning in told) == 1
    assert runner.callback_metrics["train_loss"] == 0
    assert not module.has_learning_signal


def test_the_noise_scale_counts_prompts(llama_folder: Path, tmp_path: Path) -> None:
    monitor = BatchSizeMonitor(every_n_steps=1)
    monitor.warmup_steps = 0
    module = policies.make(llama_folder, learning_rate=1e-5)
    with pytest.warns(UserWarning, match="few whatever the noise|in the order"):
        policies.fit(module, tmp_path, callbacks=[monitor], loader=policies.prompt_loader(16, 4, shuffle=False))
    assert monitor.batch is not None
    assert monitor.batch.rows == 4
    assert monitor._judge.history.num_measured == 4
    assert monitor.estimate is not None


def test_gpt2_with_its_own_positions_learns_too(tmp_path: Path) -> None:
    folder = toys.save_llama(tmp_path / "gpt2")
    config = gpt2().config
    config.vocab_size = 400
    GPT2LMHeadModel(config).save_pretrained(folder)
    runner = policies.fit(policies.make(folder, sampler=None), tmp_path, max_steps=2)
    assert runner.callback_metrics["sampler_mismatch"] < 1e-4


def test_checkpoints_hold_plain_types_and_the_settings_but_no_function(llama_folder: Path, tmp_path: Path) -> None:
    module = policies.make(llama_folder)
    runner = policies.fit(module, tmp_path, max_steps=1, logger=CSVLogger(tmp_path))
    runner.save_checkpoint(tmp_path / "policy.ckpt")
    checkpoint = torch.load(tmp_path / "policy.ckpt", weights_only=True)
    assert not {"reward", "sampler"} & set(checkpoint["hyper_parameters"])
    assert checkpoint["hyper_parameters"]["group_size"] == 4
    again = type(module).load_from_checkpoint(tmp_path / "policy.ckpt", reward=policies.count_letters)
    assert toys.same(toys.snapshot(again), toys.snapshot(module))


def test_information_is_told_beside_the_parameters(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policies.fit(policies.make(llama_folder, policies.coin), tmp_path)
    assert re.search(
        r"information budget: 32 completions with [123]\d bits of reward at most, for 992 trained", caplog.text
    )


def test_truncated_completions_leave_the_mean_of_their_group(llama_folder: Path, tmp_path: Path) -> None:
    seen = Gradients()
    policies.fit(policies.make(llama_folder, truncated="mask"), tmp_path, callbacks=[seen])
    some = [batch for batch in seen.batches if batch["mask"].any()]
    assert some
    for batch in some:
        advantages, rows = batch["numbers"]["advantages"], batch["mask"].any(1)
        assert not advantages[~rows].any()
        of_rows = advantages.sum(1) / batch["mask"].sum(1).clamp(min=1)
        assert of_rows.view(2, 4).sum(1).abs().max() < 1e-6


def test_advantages_of_a_rollout_are_those_of_its_rewards(llama_folder: Path, tmp_path: Path) -> None:
    told: list[float] = []

    def reward(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        assert [f"p{number}" for number in answer] == prompts
        told[:] = [float(number + len(text) % 3) for number, text in zip(answer, completions, strict=True)]
        return list(told)

    seen = Gradients()
    policies.fit(policies.make(llama_folder, reward), tmp_path, callbacks=[seen], max_steps=1)
    batch = seen.batches[0]
    of_rows = batch["numbers"]["advantages"].sum(1) / batch["mask"].sum(1)
    expected = group_advantages(torch.tensor(told).view(2, 4))[batch["prompts"]]
    assert torch.allclose(of_rows.view(2, 4), expected, atol=1e-6)
