"""Settings of a policy that are refused, before a model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_lora import ConfigError
from lightning_lora.tasks import PolicyGradient
from tests.support import toys
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, "group_size must be at least 2 with advantage='mean', got 1: a single completion"),
    ({"group_size": 0, "advantage": "gae"}, "group_size must be a whole number of 1 or more, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
    ({"minibatches": True}, "minibatches must be a whole number"),
    ({"epochs": 0}, "epochs must be a whole number"),
    ({"top_p": 0.9}, "top_p=0.9 cannot be trained on: tokens outside of it are never sampled"),
    ({"temperature": 0}, "temperature must be a number above 0, got 0"),
    ({"kl_coefficient": -0.1}, "kl_coefficient must be a number at least 0, got -0.1"),
    ({"kl": "k3"}, "kl must be one of k1, k2, got 'k3'"),
    ({"loss": "ppo"}, "loss must be one of importance, clip, gspo, cispo, got 'ppo'"),
    ({"advantage": "gpro"}, "advantage must be one of .* did you mean 'grpo'"),
    ({"normalise": "token"}, "normalise must be one of .* did you mean 'tokens'"),
    ({"truncated": "drop"}, "truncated must be one of keep, mask"),
    ({"clip": (0.2, 0.2)}, "clip has no effect with loss='importance'"),
    ({"loss": "clip", "clip": (0.0, 0.2)}, "clip must be two numbers above 0"),
    ({"dual_clip": 3.0}, "dual_clip bounds the ratio of loss='clip'"),
    ({"loss": "clip", "dual_clip": 1.0}, "dual_clip bounds the ratio .* got 1.0"),
    ({"gamma": 0}, "gamma must be in"),
    ({"length_buffer": 300}, "length_buffer must be between 0 and max_new_tokens=5, got 300"),
    ({"mismatch_limit": 0}, "mismatch_limit must be a number above 0"),
    ({"sampler_cap": float("nan")}, "sampler_cap must be a number or None, got nan"),
    ({"kl_coefficient": 0.1, "lora": None}, "kl_coefficient needs a reference, .* lora=None trains the whole model"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_bad_settings_are_refused(options: dict[str, Any], message: str, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        policies.make(llama_folder, **options)


@pytest.mark.filterwarnings("ignore")
def test_a_policy_without_a_reward_is_refused_when_it_is_to_train(llama_folder: Path, tmp_path: Path) -> None:
    module = PolicyGradient(str(llama_folder))
    with pytest.raises(ConfigError, match="PolicyGradient has no reward: give reward= a function"):
        toys.trainer(tmp_path).fit(module, policies.prompt_loader())


def test_weights_of_low_precision_are_not_trained_in_full(llama_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], Any]] = [({"dtype": "bfloat16"}, "32-true"), ({}, "bf16-true")]
    for options, precision in cases:
        with pytest.raises(ConfigError, match=r"the weights are bfloat16 and lora=None trains them all"):
            policies.fit(policies.make(llama_folder, lora=None, **options), tmp_path, precision=precision)
    policies.fit(policies.make(llama_folder, lora=None), tmp_path, precision="bf16-mixed", max_steps=1)
