"""Rewards that compute with a model in the process that trains: in their own precision, and no part of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification
from typing_extensions import override

from lightning_lora import LoRAConfig
from lightning_lora.tasks.rl.rewards import ModelReward, RewardPool
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from tests.support import tiny_models
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED


class Recorded:
    """A reward that keeps what it was asked, what it answered, and whether that was in an evaluation."""

    sees_all_rows = True

    def __init__(self, reward: ModelReward) -> None:
        self.reward = reward
        self.calls: list[tuple[bool, list[str], list[str], list[float]]] = []
        self.policy: Any = None

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        scores = self.score(prompts, completions)
        self.calls.append((self.policy.trainer.validating, prompts, completions, scores))
        return scores

    def score(self, prompts: list[str], completions: list[str]) -> list[float]:
        # A tensor of the default type: it would round 0.1.
        return [score + float(torch.tensor(0.1)) for score in self.reward(prompts, completions)]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_text_has_one_reward_in_training_evaluation_and_outside(
    precision: Any, llama_folder: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    settings = tiny_models.llama_config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(settings).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    reward = Recorded(ModelReward(str(tmp_path / "reward"), device="cpu"))
    reward.policy = policies.make(llama_folder, reward, sampler=InProcessSampler())
    validation = policies.prompt_loader(2, shuffle=False)
    policies.fit(reward.policy, tmp_path, validation=validation, max_steps=2, precision=precision, val_check_interval=1)
    assert {is_evaluation for is_evaluation, *_ in reward.calls} == {False, True}
    for is_evaluation, prompts, completions, scores in reward.calls:
        assert scores == reward.score(prompts, completions), is_evaluation


class LengthReward(nn.Module):
    """A reward with weights, dropout and a place, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.25]))
        self.dropout = nn.Dropout(0.5)
        self.places: list[torch.device] = []

    @override
    def forward(self, prompts: list[str], completions: list[str], **columns: Any) -> Tensor:
        assert self.weight.dtype is torch.float32
        return self.dropout(self.weight * torch.tensor([float(len(text) % 5) for text in completions]))

    @override
    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.places.append(args[0])
        return super().to(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a reward model may be large: it is not copied into the hyperparameters")


class ModuleSampler(policies.PlainSampler, nn.Module):
    """A sampler that is a module."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        policies.PlainSampler.__init__(self)
        self.draft = nn.Linear(2, 2)


@pytest.mark.parametrize("pooled", [False, True], ids=["alone", "in a pool"])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None], ids=["adapted", "in full"])
def test_a_reward_and_a_sampler_with_weights_are_no_part_of_the_policy(
    lora: LoRAConfig | None, pooled: bool, llama_folder: Path, tmp_path: Path
) -> None:
    reward, sampler = LengthReward(), ModuleSampler()
    given: Any = RewardPool(reward) if pooled else reward
    module = policies.make(llama_folder, given, lora=lora, sampler=sampler, reward_workers=2)
    runner = policies.fit(module, tmp_path, max_steps=2)
    runner.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    own = {id(parameter) for part in (reward, sampler.draft) for parameter in part.parameters()}
    (optimizer,) = runner.optimizers
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert not own & {id(parameter) for parameter in [*module.parameters(), *trained]}
    assert not [name for name in saved["state_dict"] if not name.startswith("model.")]
    assert saved["hyper_parameters"].keys().isdisjoint({"reward", "sampler"})
    assert (module.reward, module.sampler) == (given, sampler)
    assert reward.places == [torch.device("cpu")]
    assert not reward.training
    assert (float(reward.weight.detach()), reward.weight.requires_grad) == (0.25, True)


def test_a_reward_with_weights_sees_all_rows_on_the_device_of_the_policy() -> None:
    pool, texts = RewardPool(reward := LengthReward(), workers=2), ["a", "bcd"]
    pool.place(torch.device("cpu"))
    assert pool(["p", "p"], texts, {}) == [0.25, 0.75]
    assert torch.is_grad_enabled()
    pool.place(torch.device("meta"))
    assert reward.weight.device.type == "meta"
