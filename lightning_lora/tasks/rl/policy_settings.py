"""The settings of a policy gradient, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.errors import PolicySettingError, check_choice, check_count, no_effect
from lightning_lora.tasks.rl.functional.policy_loss import NORMALISE
from lightning_lora.tasks.rl.rewards.pool import RewardPool, is_called_here

# How far the ratio may move, by loss. GSPO's ratio is a mean over tokens, CISPO only caps the weight of a token.
CLIPS: dict[str, tuple[float, float] | None] = {
    "importance": None,
    "clip": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
ADVANTAGES = ("mean", "grpo", "rloo", "batch", "gae")


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """What `PolicyGradient` was asked for; its arguments say what each setting means.

    Raises:
        ConfigError: If a setting is out of its range, or has no effect beside another one.
    """

    group_size: int
    max_new_tokens: int
    loss: str
    advantage: str
    normalise: str
    clip: tuple[float, float] | None
    dual_clip: float | None
    kl: str
    kl_coefficient: float
    minibatches: int
    epochs: int
    temperature: float
    top_p: float
    truncated: str
    length_buffer: int
    gamma: float
    lam: float
    value_coefficient: float
    value_clip: float | None
    sampler_cap: float | None
    mismatch_limit: float
    patience: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "minibatches", "epochs", "patience", "group_size"):
            check_count(name, getattr(self, name), PolicySettingError)
        check_choice("loss", self.loss, tuple(CLIPS))
        check_choice("advantage", self.advantage, ADVANTAGES)
        check_choice("normalise", self.normalise, NORMALISE)
        check_choice("kl", self.kl, ("k1", "k2"))
        check_choice("truncated", self.truncated, ("keep", "mask"))
        if self.group_size < 2 and not self.has_values:
            raise PolicySettingError(
                f"group_size must be at least 2 with advantage={self.advantage!r}, got {self.group_size}: a single "
                "completion of a prompt has nothing to be compared with. advantage='gae' learns what to expect instead."
            )
        if self.top_p != 1:
            raise PolicySettingError(
                f"top_p={self.top_p} cannot be trained on: tokens outside of it are never sampled, so the policy is "
                "another one than its log-probabilities say, and the ratio of a token is off by the share that was "
                "left out. Set top_p=1; lower the temperature for less random completions."
            )
        _check_number("temperature", self.temperature, above=0)
        _check_number("kl_coefficient", self.kl_coefficient)
        _check_number("value_coefficient", self.value_coefficient)
        _check_number("mismatch_limit", self.mismatch_limit, above=0)
        for name in ("value_clip", "sampler_cap"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0)
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise PolicySettingError(f"gamma must be in (0, 1] and lam in [0, 1], got {self.gamma!r} and {self.lam!r}.")
        if not 0 <= self.length_buffer <= self.max_new_tokens:
            raise PolicySettingError(
                f"length_buffer must be between 0 and max_new_tokens={self.max_new_tokens}, got {self.length_buffer!r}."
            )
        if self.loss == "importance" and self.clip is not None:
            raise PolicySettingError("clip has no effect with loss='importance': use loss='clip', 'gspo' or 'cispo'.")
        if self.clip is not None and (len(self.clip) != 2 or min(self.clip) <= 0):
            raise PolicySettingError(f"clip must be two numbers above 0, such as [0.2, 0.28], got {self.clip!r}.")
        if self.dual_clip is not None and (self.loss != "clip" or not self.dual_clip > 1):
            raise PolicySettingError(
                f"dual_clip bounds the ratio of loss='clip' and is above 1, got {self.dual_clip!r} with "
                f"loss={self.loss!r}."
            )

    @property
    def has_values(self) -> bool:
        """Whether a value head learns what to expect."""
        return self.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether the policy is held near its base."""
        return self.kl_coefficient > 0

    @property
    def bounds(self) -> tuple[float, float] | None:
        """How far the ratio may fall below 1 and rise above it."""
        return self.clip if self.clip is not None else CLIPS[self.loss]


def warn_of_unused(task: type, given: Mapping[str, Any]) -> None:
    """Warn of settings that are not the default and that nothing reads beside the others.

    Args:
        task: The class whose arguments they are.
        given: Its arguments by name.
    """
    reward, workers, timeout = (given[name] for name in ("reward", "reward_workers", "reward_timeout"))
    limits = ("reward_timeout",) if timeout is not None else ()  # None says what holds in this process
    unread: list[tuple[bool, str, tuple[str, ...]]] = [
        (given["advantage"] != "gae", "needs advantage='gae'", ("gamma", "lam", "value_coefficient", "value_clip")),
        (given["kl_coefficient"] == 0, "needs a kl_coefficient above 0", ("kl",)),
        (isinstance(reward, RewardPool), "the reward is a RewardPool, with its own", ("reward_workers", *limits)),
        (workers > 0 and is_called_here(reward), "the reward is called in this process", ("reward_workers", *limits)),
        (workers == 0, "a reward in this process has no time limit", limits),
    ]
    for is_unread, why, names in unread:
        if is_unread and (told := no_effect(task, given, names, why)):
            rank_zero_warn(told, stacklevel=4)


def _check_number(name: str, value: object, above: float | None = None) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (above is not None and value <= above):  # type: ignore[operator]
        least = "at least 0" if above is None else f"above {above:g}"
        raise PolicySettingError(f"{name} must be a number {least}, got {value!r}.")
