"""Settings of policies that nothing reads beside the others are told; those that agree with what happens are not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_lora.tasks import DPO, PolicyGradient
from lightning_lora.tasks.rl.rewards.pool import RewardPool
from tests.support import toys

pytestmark = toys.expected_warnings


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


class Module(nn.Module):
    def forward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


UNUSED: list[tuple[dict[str, Any], str]] = [
    ({"gamma": 0.9, "value_clip": None}, "gamma=0.9 and value_clip=None has no effect: needs advantage='gae'."),
    ({"kl": "k1"}, "kl='k1' has no effect: needs a kl_coefficient above 0."),
    ({"reward": RewardPool(reward, 0), "reward_workers": 4}, "reward_workers=4 has no effect: the reward is a Reward"),
    ({"reward": Module(), "reward_workers": 4}, "reward_workers=4 has no effect: the reward is called in this"),
    ({"reward_workers": 0, "reward_timeout": 3.0}, "reward_timeout=3.0 has no effect: a reward in this process has no"),
]
USED: list[dict[str, Any]] = [
    {"advantage": "gae", "gamma": 0.9, "value_clip": None},
    {"kl": "k1", "kl_coefficient": 0.1, "lora": {"rank": 2}},
    {"reward": Module(), "reward_workers": 0},
    {"reward_workers": 0, "reward_timeout": None},
]


@pytest.mark.parametrize(("settings", "told"), UNUSED, ids=[told.partition(" ")[0] for _, told in UNUSED])
def test_a_setting_that_nothing_reads_is_told(settings: dict[str, Any], told: str, llama_folder: Path) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        PolicyGradient(str(llama_folder), **{"reward": reward, **settings})
    assert [told in str(each.message) for each in caught] == [True]


@pytest.mark.parametrize("settings", USED, ids=str)
def test_a_setting_that_agrees_with_the_others_is_not(settings: dict[str, Any], llama_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PolicyGradient(str(llama_folder), **{"reward": reward, **settings})


def test_the_weight_of_a_loss_that_is_not_taken_is_told(llama_folder: Path) -> None:
    with pytest.warns(UserWarning, match="dpop_weight=5.0 has no effect: only loss='dpop' reads it"):
        DPO(str(llama_folder), dpop_weight=5.0)
